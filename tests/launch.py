"""Runs of torchrun in real processes, none of which outlives its test."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "torchtitan_lite" / "train.py"

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
_MARK = "TORCHTITAN_LITE_TEST_RUN"


class Launched:
    """A torchrun and the processes below it, to be found by a mark in their environment."""

    def __init__(self, words: list[str], folder: Path, mark: str, program: Sequence[object]) -> None:
        self.mark = mark
        self.process = subprocess.Popen(
            [*map(str, program), *words],
            cwd=folder,
            env={
                **os.environ,
                "PYTHON": sys.executable,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                _MARK: mark,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.out = self.err = ""

    def wait(self, seconds: float = 100) -> int:
        """The exit status; what was printed is in `out` and `err` then."""
        self.out, self.err = self.process.communicate(timeout=seconds)
        return self.process.returncode

    def of_ranks(self) -> str:
        """What the ranks printed on standard error, without log lines and what torchrun says itself."""
        own = self.err.partition('Traceback (most recent call last):\n  File "<frozen runpy>"')[0]
        others = ("torch/distributed/elastic", "tokenized ", "USDT:", "DeviceProperties")
        return "\n".join(line for line in own.splitlines() if not any(other in line for other in others))

    def left(self, within: float = 5) -> list[int]:
        """The processes that are still there after some seconds, torchrun's own included."""
        deadline = time.monotonic() + within
        while (found := self._running()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _running(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"{_MARK}={self.mark}".encode() in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found


@contextmanager
def launched(
    folder: Path,
    *words: object,
    processes: int = 2,
    nodes: Sequence[str] = ("--standalone",),
    program: Sequence[object] = TORCHRUN,
) -> Iterator[Launched]:
    """A run of `words` by torchrun on `processes` ranks in `folder`; killed at the end if need be."""
    start = [*nodes, "--nproc_per_node", str(processes)]
    run = Launched([*start, *map(str, words)], folder, uuid.uuid4().hex, program)
    try:
        yield run
    finally:
        for pid in run.left(within=0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.communicate()


@contextmanager
def launched_on_two_nodes(folder: Path, *words: object) -> Iterator[tuple[Launched, Launched]]:
    """The same run by two launchers that stand for a machine each, with a rank each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ("--nnodes", "2", "--master_addr", "127.0.0.1", "--master_port", str(port), "--node_rank")
    with (
        launched(folder, *words, processes=1, nodes=(*meet, "0")) as first,
        launched(folder, *words, processes=1, nodes=(*meet, "1")) as second,
    ):
        yield first, second
