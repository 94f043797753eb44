"""Directories and files of runs that are not as they should be: one line each, before any work is done."""

import contextlib
import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from experiments import loop, processes, runs, train
from experiments.cli import one_line_errors
from experiments.config import ConfigError, TrainConfig
from gramjax.data import emoji
from gramjax.models import to_json
from tests.damage import cut

ROOT = Path(__file__).parents[2]
CONFIG = TrainConfig()


def claim(config, *, started):
    loop.claim_run_dir(config.run_dir, train.make_record(config), train.NOT_COMPARED, started=started)


@pytest.fixture
def run_dir(tmp_path):
    """The directory of a run that has begun."""
    claim(dataclasses.replace(CONFIG, run_dir=tmp_path), started=False)
    return tmp_path


def test_one_start_at_a_time_trains_in_a_directory(tmp_path):
    for _ in range(2):  # the first leaves nothing that hinders the second
        with contextlib.ExitStack() as stack:
            stack.enter_context(processes.alone_in(tmp_path))
            with pytest.raises(ConfigError, match=f"run_dir {tmp_path} is being trained in"):
                stack.enter_context(processes.alone_in(tmp_path))


def test_a_killed_process_leaves_the_directory_free(tmp_path):
    code = (
        "import sys, pathlib; from gramjax._locks import exclusive\n"
        "with exclusive(pathlib.Path(sys.argv[1]) / '.lock'): print('locked', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(ConfigError, match="is being trained in"), processes.alone_in(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    with processes.alone_in(tmp_path):
        pass


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "file").touch()
    for path, reason in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "run", "Not a directory")):
        with pytest.raises(ConfigError, match=f"run_dir must be a folder to write to, got {path}: {reason}"):
            processes.check_agreement({}, path)


def test_what_has_left_no_checkpoint_begins_again_with_other_options(run_dir, capsys):
    claim(dataclasses.replace(CONFIG, run_dir=run_dir, seed=5), started=False)
    assert capsys.readouterr().out == f"{run_dir}: begins again, as what was started there has left no checkpoint\n"
    assert runs.read_config(run_dir / "config.json")["seed"] == 5


@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda path: path.write_text("[]")], ids=["cut", "gone", "other"])
def test_checkpoints_without_their_configuration_are_left_alone(run_dir, damage):
    damage(run_dir / "config.json")
    with pytest.raises(ConfigError, match=rf"run_dir {run_dir} holds checkpoints, but what they are of cannot be read"):
        claim(dataclasses.replace(CONFIG, run_dir=run_dir), started=True)


def test_runs_that_cannot_be_loaded(run_dir):
    path = run_dir / "config.json"
    values = json.loads(path.read_text())
    with pytest.raises(FileNotFoundError, match="a run that has come to a checkpoint"):
        runs.load_run(run_dir)
    for changed, message in (
        (values | {"data_version": "0.9"}, rf"on version {emoji.EmojiBuilder.VERSION} of the data, .* trained on 0\.9"),
        (values | {"colour": 1}, "is damaged, or of another version of gramjax: .* has no colour"),
        ([], "is damaged: it holds no configuration"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            runs.load_run(run_dir)
    path.write_text(json.dumps(values)[:-1])
    with pytest.raises(ValueError, match=r"config\.json is damaged: Expecting"):
        runs.load_run(run_dir)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("evaluate", ["--run", "{}/none"], "run_dir must be the folder of a run, got"),
        ("evaluate", ["--run", "{}/broken"], "is damaged"),
        ("embed", ["{}/none", "{}/index", "--emoji"], "run_dir must be the folder of a run, got"),
        ("embed", ["{}/broken", "{}/index", "--emoji"], "is damaged"),
        ("search", ["{}/none", "words"], "index must be a folder that experiments.embed wrote, got"),
        ("seeds", ["{}/none", "{}/broken"], "runs must have been evaluated; there is no"),
        ("seeds", ["{}/broken", "{}/none"], "is damaged or no run's results; evaluate the run again"),
        ("convert", ["{}/none.pt", "{}/model", "gram"], "source must be a file or a folder, got"),
        ("convert", ["{}/broken/config.json", "{}/model", "gram"], ""),
    ],
)
def test_what_is_missing_or_broken_is_one_line(tmp_path, monkeypatch, script, arguments, message):
    (tmp_path / "broken").mkdir()
    for name in ("config.json", "results.json"):
        (tmp_path / "broken" / name).write_text(json.dumps(to_json(CONFIG))[:40])
    monkeypatch.setattr(sys, "argv", [script, *(argument.format(tmp_path) for argument in arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "experiments" / f"{script}.py"), run_name="__main__")
    assert stop.value.code.startswith("error: ")
    assert message in stop.value.code
    assert len(stop.value.code.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (OSError("disk full"), "error: disk full")])
def test_how_scripts_end(error, status):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    assert stop.value.code == status
    with pytest.raises(KeyError), one_line_errors():  # not the user's to mend
        raise KeyError("bug")


@pytest.mark.parametrize("script", ["convert", "embed", "evaluate_clips", "search"])
def test_ctrl_c_is_not_unwound(monkeypatch, capfd, script):
    class Ended(BaseException):
        pass

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(tyro, "cli", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Ended, match="130"):
        runpy.run_path(str(ROOT / "experiments" / f"{script}.py"), run_name="__main__")
    assert capfd.readouterr().err == "\ninterrupted\n"


def test_ctrl_c_ends_at_once_wherever_it_falls(tmp_path):
    for name in ("finished", "unfinished"):
        (tmp_path / name).mkdir()
    code = (
        "import gc, os, pathlib, signal\nfrom experiments.cli import interrupts_end_at_once, removed_if_interrupted\n"
        f"root = pathlib.Path({str(tmp_path)!r})\n"
        "with removed_if_interrupted(root / 'finished'): pass\n"
        "def callback(*_): os.kill(os.getpid(), signal.SIGINT)\n"
        "gc.callbacks.append(callback)  # where exceptions are lost\n"
        "with interrupts_end_at_once('done for'), removed_if_interrupted(root / 'unfinished'):\n"
        "    gc.collect(); print('goes on')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr.strip()) == (130, "", "done for")
    assert [path.name for path in tmp_path.iterdir()] == ["finished"]
