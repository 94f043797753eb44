"""Starting several Python processes that `jax.distributed` makes one computation of."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def free_address() -> str:
    """An address on this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


class Group:
    """Processes that live and die together."""

    def __init__(self, commands: Sequence[Sequence[str]], folder: Path, devices: int):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            # Threads of XLA. Simulated devices that wait for one another in two collectives at once hold one each, and
            # with no more threads than devices may wait for ever.
            **({"NPROC": str(4 * devices)} if devices > 1 else {}),
        }
        self._outputs = [folder / f"output_{number}.txt" for number in range(len(commands))]
        self.processes = []
        # A shell that runs the tests in the background has Ctrl-C ignored, and so would these processes.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        for command, path in zip(commands, self._outputs):
            with path.open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command], env=environment, cwd=REPOSITORY, stdout=output, stderr=output
                    )
                )
        signal.signal(signal.SIGINT, before)

    def outputs(self) -> list[str]:
        """What each has printed so far."""
        return [path.read_text() for path in self._outputs]

    def codes(self) -> list[int | None]:
        """How each ended, None for one that runs."""
        return [process.poll() for process in self.processes]

    def finish(self, timeout: float, code: int = 0) -> list[str]:
        """Wait until all have ended with `code`; what each printed. Of one that failed the others wait in vain."""
        deadline = time.monotonic() + timeout
        while None in self.codes() and set(self.codes()) <= {None, code} and time.monotonic() < deadline:
            time.sleep(0.05)
        if set(self.codes()) != {code}:
            printed = "\n".join(f"--- process {i}:\n{text}" for i, text in enumerate(self.outputs()))
            raise AssertionError(f"processes ended with {self.codes()} (None: not within {timeout} s)\n{printed}")
        return self.outputs()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def started(commands: Sequence[Sequence[str]], devices: int = 1) -> Iterator[Group]:
    """Python processes with these arguments and so many simulated devices each, all killed in the end.

    Args:
        commands: the arguments of each, such as `("-m", "module", "option")`.
        devices: of each process.
    """
    with tempfile.TemporaryDirectory() as folder:
        group = Group(commands, Path(folder), devices)
        try:
            yield group
        finally:
            group.kill()
