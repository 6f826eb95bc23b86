"""Runs functions on the ranks of a process group.

    ranks(4).run(function, *args)  ->  [function(*args) on rank 0, ..., on rank 3]

Each run has processes of its own, forks of one that has torch imported (programs.py), which start within
hundredths of a second. So nothing that torch remembers of one run reaches the next.
"""

import builtins
import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import programs
import torch
import torch.distributed as dist

_GRACE_SECONDS = 0.5
"""Within which ranks fail for one reason; what fails later fails because of the first."""


class RankFailed(AssertionError):
    """A rank raised, died or did not finish."""


class _Outcome(NamedTuple):
    """How a function ended on a rank, and when, by a clock that all processes share."""

    failed: bool
    seconds: float
    value: Any
    """What it returned, pickled, or the traceback of what it raised."""


class _Rank(NamedTuple):
    process: BaseProcess
    connection: Connection


@dataclass(frozen=True)
class Ranks:
    """Runs each function on `size` new processes."""

    size: int
    filters: Sequence[str] = ()
    """Filters of warnings, in the form of pytest's filterwarnings."""

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """What `function(*args)` returns on each rank, in a gloo process group of all of them.

        The function is one that the ranks can import. Raises RankFailed with the traceback of the rank that
        failed first, or with the ranks that had not finished after `timeout` seconds.
        """
        __tracebackhide__ = True
        name = f"{function.__module__}.{function.__qualname__}"
        task = pickle.dumps((timeout, function, args))
        with (
            tempfile.TemporaryDirectory(prefix="ranks-") as folder,
            self._started(Path(folder), task) as ranks,
        ):
            done = _outcomes(ranks, timeout)
            if any(outcome.failed for outcome in done.values()):
                raise RankFailed(f"{name}: {_failure(done, self.size, Path(folder))}")
            if late := [str(rank) for rank in range(self.size) if rank not in done]:
                which = f"rank{'s' if len(late) > 1 else ''} {', '.join(late)} of {self.size}"
                raise RankFailed(f"{name}: {which} had not finished after {timeout:g} seconds")
            return [pickle.loads(done[rank].value) for rank in range(self.size)]

    @contextlib.contextmanager
    def _started(self, folder: Path, task: bytes) -> Iterator[list[_Rank]]:
        """The processes at work on a task; none is left afterwards."""
        ranks: list[_Rank] = []
        try:
            with programs.import_path_in_environment():
                for rank in range(self.size):
                    ours, theirs = programs.context().Pipe()
                    arguments = (rank, self.size, theirs, self.filters, folder, task)
                    process = programs.context().Process(target=_serve, args=arguments, daemon=True)
                    process.start()
                    theirs.close()  # so that the end of the process ends the connection
                    assert isinstance(ours, Connection)
                    ranks.append(_Rank(process, ours))
            yield ranks
            _end(ranks)
        except BaseException:
            # The others wait for the rank that failed, and may do so for long.
            for rank in ranks:
                rank.process.kill()
            raise
        finally:
            for rank in ranks:
                rank.process.join()
                rank.connection.close()


RanksOf = Callable[[int], Ranks]


def _end(ranks: Sequence[_Rank]) -> None:
    """Tell ranks that all have finished, and wait for the ends of their processes."""
    for rank in ranks:
        with contextlib.suppress(BrokenPipeError):  # its exit code says why
            rank.connection.send_bytes(b"all have finished")
    for number, rank in enumerate(ranks):
        rank.process.join()
        if rank.process.exitcode:
            code = rank.process.exitcode
            raise RankFailed(f"rank {number} of {len(ranks)} had finished, and died with exit code {code}")


def _outcomes(ranks: Sequence[_Rank], timeout: float) -> dict[int, _Outcome]:
    """The outcomes by rank: of all ranks, or of fewer if a rank fails or the time is up."""
    done: dict[int, _Outcome] = {}
    deadline = time.monotonic() + timeout
    while len(done) < len(ranks):
        found = _finished(ranks, done, max(0, deadline - time.monotonic()))
        if not found:
            break  # time is up
        if any(outcome.failed for outcome in found.values()):
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        done |= found
    return done


def _finished(ranks: Sequence[_Rank], done: dict[int, _Outcome], seconds: float) -> dict[int, _Outcome]:
    """The outcomes that have come, once there is one, of ranks that are not in `done`; none in `seconds`."""
    waited = {rank.connection: number for number, rank in enumerate(ranks) if number not in done}
    ready = multiprocessing.connection.wait(waited, seconds)
    return {
        waited[connection]: _received(ranks[waited[connection]])
        for connection in ready
        if isinstance(connection, Connection)
    }


def _received(rank: _Rank) -> _Outcome:
    try:
        return _Outcome(*pickle.loads(rank.connection.recv_bytes()))
    except (EOFError, ConnectionError):
        rank.process.join()
        # At 0 seconds: whatever the others complain of, this is why.
        return _Outcome(True, 0.0, f"the process died with exit code {rank.process.exitcode}")


def _failure(done: dict[int, _Outcome], size: int, folder: Path) -> str:
    """The error and the last output of the rank that failed first."""
    failed = {rank: outcome for rank, outcome in done.items() if outcome.failed}
    first = min(failed, key=lambda rank: failed[rank].seconds)
    others = [str(rank) for rank in sorted(failed) if rank != first]
    also = f"\n(ranks that failed after it: {', '.join(others)})" if others else ""
    output = _output(folder, first)
    words = output.read_text(errors="replace").strip() if output.exists() else ""
    said = f"\nIts last output:\n{words[-4000:]}" if words else ""
    return f"rank {first} of {size} failed:\n{failed[first].value}{said}{also}"


def _output(folder: Path, rank: int) -> Path:
    return folder / f"output-{rank}"


# --- in the process of a rank -------------------------------------------------------------------------


def _serve(
    rank: int, size: int, connection: Connection, filters: Sequence[str], folder: Path, task: bytes
) -> None:
    """The life of a rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    _write_to(_output(folder, rank))
    torch.set_num_threads(1)
    for line in filters:
        action, message, category, *_ = [*line.split(":"), "", ""]
        kind = getattr(builtins, category.strip() or "Warning")
        warnings.filterwarnings(action.strip(), message.strip(), kind)  # pyright: ignore[reportArgumentType]
    outcome = _outcome(task, rank, size, folder)
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        connection.send_bytes(pickle.dumps(outcome))
        connection.recv_bytes()
        # At once: no rank takes the process group apart while another still uses it.
        os._exit(0)
    threading.Event().wait()  # for _end_with_parent


def _outcome(task: bytes, rank: int, size: int, folder: Path) -> _Outcome:
    """How a pickled task ends, its value pickled."""
    try:
        timeout, function, args = pickle.loads(task)
        store = f"file://{folder / 'store'}"
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=limit)
        return _Outcome(False, time.monotonic(), pickle.dumps(function(*args)))
    except BaseException:  # noqa: BLE001 (pytest.fail's, too: the caller raises it)
        return _Outcome(True, time.monotonic(), traceback.format_exc())


def _end_with_parent(folder: Path) -> None:
    """However the parent ends, no rank outlives it, nor does the folder of the ranks."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    for _ in range(100):  # another rank may make its files again meanwhile
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
    os._exit(1)


def _write_to(output: Path) -> None:
    """Send what this process prints, gloo's own words and those of a crash too, to a file."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
