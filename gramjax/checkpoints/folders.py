"""Folders that appear only once everything is in them."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def check_destination(
    path: Path, marks: Sequence[str], *, overwrite: bool, name: str = "path", option: str = "overwrite=True"
) -> None:
    """Refuses a folder that cannot be made, or that would replace what is none of its kind.

    Args:
        path: the folder.
        marks: what every such folder holds; only one with all of these, or an empty one, is replaced.
        overwrite: whether anything is replaced at all.
        name: of the argument, in messages.
        option: how the user asks for `overwrite`, in messages.

    Raises:
        ValueError: the folder must not be made.
    """
    if path.exists():
        if not overwrite:
            raise ValueError(f"{name} must not exist unless {option}, got {path}")
        if not path.is_dir() or (any(path.iterdir()) and not all((path / mark).exists() for mark in marks)):
            raise ValueError(
                f"{name} must be one to be replaced (a folder with {' and '.join(marks)}, or an empty one), "
                f"got {path}, which is something else"
            )
    try:
        parent = path.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise ValueError(f"{name} must be where a folder can be made, got {path}: {error.strerror}") from error


def partial_folder(path: Path) -> Path:
    """Where this process fills the folder that is to become `path`, see `whole_folder`."""
    path = path.absolute()
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `path` when the block ends, and is gone if that raises.

    What was at `path` stays there until then, and is put back if the new folder cannot take its place.
    """
    path = path.absolute()
    partial = partial_folder(path)
    replaced = partial.with_suffix(".replaced")
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            path.rename(replaced)
        try:
            partial.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
    finally:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
