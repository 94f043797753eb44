"""Stopping in an orderly way when told to."""

import signal
from types import FrameType


class GracefulStop:
    """Context in which SIGTERM and Ctrl-C ask for a stop instead of killing the process.

    The training loop looks at `requested` after each step, saves and leaves. A second signal acts as it would have
    without this context (Ctrl-C raises KeyboardInterrupt, SIGTERM ends the process). Use it from the main thread.

    Attributes:
        requested: name of the signal that came ("SIGTERM", "SIGINT"), None as long as none came.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "GracefulStop":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous = {}
