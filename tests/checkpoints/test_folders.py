"""Folders that take another's place whole, or not at all."""

import os
from pathlib import Path

import pytest

from gramjax.checkpoints.folders import check_destination, whole_folder


def test_a_folder_appears_whole_and_replaces_what_was_there(tmp_path):
    for text in ("first", "second"):
        with whole_folder(tmp_path / "a" / "new") as folder:
            (folder / "text").write_text(text)
        assert (tmp_path / "a" / "new" / "text").read_text() == text
    assert os.listdir(tmp_path / "a") == ["new"]


def test_only_what_is_of_its_kind_is_replaced(tmp_path):
    marks = ("config.json", "parameters")
    for name, files in {"empty": (), "model": (*marks, "notes"), "half": marks[:1], "mine": ("thesis.txt",)}.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    for name in ("empty", "model", "new"):
        check_destination(tmp_path / name, marks, overwrite=True)
    for name in ("half", "mine", "file"):
        message = rf"index must be one to be replaced \(a folder with config.json and parameters, .*{name}, which is"
        with pytest.raises(ValueError, match=message):
            check_destination(tmp_path / name, marks, overwrite=True, name="index")
    with pytest.raises(ValueError, match=r"path must not exist unless overwrite=True, got .*model"):
        check_destination(tmp_path / "model", marks, overwrite=False)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("path", ["file/new", "file/new/new", "/proc/new"])
def test_where_no_folder_can_be_made(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"path must be where a folder can be made, got .*{path}: "):
        check_destination(tmp_path / path, ("x",), overwrite=False)


def test_what_was_there_survives_whatever_fails(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine").touch()
    with pytest.raises(RuntimeError, match="half-way"), whole_folder(tmp_path / "old"):
        raise RuntimeError("half-way")
    rename = Path.rename

    def fails_for_the_new_one(self, target):
        if self.name.endswith(".partial"):
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="disk full"), whole_folder(tmp_path / "old"):
        pass
    assert os.listdir(tmp_path) == ["old"]
    assert os.listdir(tmp_path / "old") == ["mine"]
