"""Runs torchrun in real processes, and ends all of them with the test."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from programs import FreshProgram, Program

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "torchtitan_lite" / "train.py"

TORCHRUN = ("-m", "torch.distributed.run")
DEEP = "[ctypes.CDLL(None).pthread_mutex_lock(lock) for lock in [ctypes.create_string_buffer(64)] * 2]"
"""Python code that never returns from a C function, like a wait for a GPU: no signal handler runs."""


class Launched:
    """A torchrun and its child processes, which all write to one pipe."""

    def __init__(self, words: list[str], folder: Path, fresh: bool) -> None:
        self.process = (FreshProgram if fresh else Program)(words, cwd=folder)
        assert self.process.stdout is not None
        self._pipe = os.readlink(f"/proc/self/fd/{self.process.stdout.fileno()}")
        self.out = self.err = ""

    def wait(self, seconds: float = 100) -> int:
        """Wait for the end, set `out` and `err`, and return the exit status."""
        self.out, self.err = self.process.communicate(timeout=seconds)
        return self.process.returncode

    def of_ranks(self) -> str:
        """The ranks' lines on standard error, without log lines and lines of torchrun."""
        own = self.err.partition('Traceback (most recent call last):\n  File "<frozen runpy>"')[0]
        # The last is torchrun's store, of a rank that was killed while it waited there.
        others = ("torch/distributed/elastic", "tokenized ", "USDT:", "DeviceProperties", "TCPStoreLibUv")
        # C++ writes the end of a line by itself: where two ranks write at once, an empty line follows.
        lines = [line for line in own.splitlines() if line]
        return "\n".join(line for line in lines if not any(other in line for other in others))

    def left(self, within: float = 5) -> list[int]:
        """The processes that still run after `within` seconds, including torchrun's own."""
        deadline = time.monotonic() + within
        while (found := self._running()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _running(self) -> list[int]:
        return [pid for pid in holders_of(self._pipe) if pid != os.getpid()]


def holders_of(file: str) -> list[int]:
    """The processes that have a file open; `file` is its name in /proc."""
    return sorted(
        pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))) if file in _open_files(pid)
    )


def _open_files(pid: int) -> set[str]:
    """The files that a process has open; none if it has ended."""
    found = set()
    with contextlib.suppress(OSError):
        for link in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                found.add(os.readlink(link))
    return found


@contextmanager
def launched(
    folder: Path,
    *words: object,
    processes: int = 2,
    nodes: Sequence[str] = ("--standalone",),
    program: Sequence[object] = TORCHRUN,
    fresh: bool = False,
) -> Iterator[Launched]:
    """Run `words` by torchrun on `processes` ranks in `folder`; kill at the end what still runs.

    `fresh`: launcher and ranks are fresh Pythons, as users start them.
    """
    start = [*nodes, "--nproc_per_node", str(processes)]
    run = Launched([*map(str, (*program, *start, *words))], folder, fresh)
    try:
        yield run
    finally:
        for pid in run.left(within=0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.communicate()


@contextmanager
def launched_on_two_nodes(folder: Path, *words: object) -> Iterator[tuple[Launched, Launched]]:
    """One run by two launchers with one rank each; each launcher stands for a machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ("--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(port), "--node_rank")
    with (
        launched(folder, *words, processes=1, nodes=(*meet, "0")) as first,
        launched(folder, *words, processes=1, nodes=(*meet, "1")) as second,
    ):
        yield first, second
