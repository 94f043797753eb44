"""How a script ends when it cannot go on: with one line."""

import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

INTERRUPTED = 128 + signal.SIGINT  # the status of a program that Ctrl-C has ended, as the shell has it
_UNFINISHED: set[Path] = set()  # folders that nobody else would remove


@contextlib.contextmanager
def one_line_errors(kinds: tuple[type[Exception], ...] = (ValueError, OSError)) -> Iterator[None]:
    """Ends the process with one line in place of a traceback: status 1 after errors of these kinds, 130 after Ctrl-C.

    Args:
        kinds: the errors that are the user's to mend.
    """
    try:
        yield
    except kinds as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


@contextlib.contextmanager
def interrupts_end_at_once(message: str) -> Iterator[None]:
    """Lets Ctrl-C end the process without unwinding, for what may be killed at any moment.

    KeyboardInterrupt is lost where it falls into a callback of XLA, and threads in the background complain of it, or
    crash while the interpreter ends.
    """

    def end(*unused: object) -> None:
        os.write(sys.stderr.fileno(), f"\n{message}\n".encode())
        for folder in tuple(_UNFINISHED):
            for _ in range(100):  # other threads may still be writing to it
                shutil.rmtree(folder, ignore_errors=True)
                if not folder.exists():
                    break
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def removed_if_interrupted(folder: Path) -> Iterator[Path]:
    """Removes a folder if `interrupts_end_at_once` ends the process within the block, and leaves it alone otherwise."""
    _UNFINISHED.add(folder)
    try:
        yield folder
    finally:
        _UNFINISHED.discard(folder)
