"""Runs functions on the ranks of a process group.

    ranks(4).run(function, *args)  ->  [function(*args) on rank 0, ..., on rank 3]

Each run starts new processes, so torch carries nothing over from one run to the next. The processes are forks
of a server that has imported torch (programs.py), and start within hundredths of a second.
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
"""After the first failure, wait this long for failures of other ranks that have the same cause."""


class RankFailed(AssertionError):
    """A rank raised, died or did not finish."""


class _Outcome(NamedTuple):
    """How and when a function ended on a rank. All processes share the clock."""

    failed: bool
    seconds: float
    value: Any
    """The pickled result of the function, or the traceback of its exception."""


class _Rank(NamedTuple):
    process: BaseProcess
    connection: Connection


@dataclass(frozen=True)
class Ranks:
    """Runs each function on `size` new processes."""

    size: int
    filters: Sequence[str] = ()
    """Warning filters, in the form of pytest's filterwarnings."""

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """Run `function(*args)` on each rank, in a gloo process group, and return the results by rank.

        The ranks must be able to import the function. Raises RankFailed with the traceback of the rank that
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
        """Start the processes of a task, and end them afterwards."""
        ranks: list[_Rank] = []
        try:
            with programs.import_path_in_environment():
                for rank in range(self.size):
                    ours, theirs = programs.context().Pipe()
                    arguments = (rank, self.size, theirs, self.filters, folder, task)
                    process = programs.context().Process(target=_serve, args=arguments, daemon=True)
                    process.start()
                    theirs.close()  # then the connection ends with the process
                    assert isinstance(ours, Connection)
                    ranks.append(_Rank(process, ours))
            yield ranks
            _end(ranks)
        except BaseException:
            # The other ranks may wait for the failed rank for a long time.
            for rank in ranks:
                rank.process.kill()
            raise
        finally:
            for rank in ranks:
                rank.process.join()
                rank.connection.close()


RanksOf = Callable[[int], Ranks]


def _end(ranks: Sequence[_Rank]) -> None:
    """Tell the ranks that all have finished, and wait for their processes to end."""
    for rank in ranks:
        with contextlib.suppress(BrokenPipeError):  # the exit code, checked below, says why
            rank.connection.send_bytes(b"all have finished")
    for number, rank in enumerate(ranks):
        rank.process.join()
        if rank.process.exitcode:
            code = rank.process.exitcode
            raise RankFailed(f"rank {number} of {len(ranks)} had finished, and died with exit code {code}")


def _outcomes(ranks: Sequence[_Rank], timeout: float) -> dict[int, _Outcome]:
    """The outcomes by rank. Outcomes are missing if a rank fails or the time is up."""
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
    """Wait for an outcome of ranks that are not in `done`, and return all that came; none after `seconds`."""
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
        # 0 seconds, so that this failure counts as the first: the other ranks fail because of it.
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
    """Run the task, send the outcome, and wait for all ranks to finish."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
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
        # Skip Python's own end, in which this rank would destroy a process group that others still use.
        os._exit(0)
    threading.Event().wait()  # until _end_with_parent ends this process


def _outcome(task: bytes, rank: int, size: int, folder: Path) -> _Outcome:
    """Run a pickled task."""
    try:
        timeout, function, args = pickle.loads(task)
        store = f"file://{folder / 'store'}"
        limit = timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=limit)
        return _Outcome(False, time.monotonic(), pickle.dumps(function(*args)))
    except BaseException:  # noqa: BLE001 (also pytest.fail's; the caller raises RankFailed)
        return _Outcome(True, time.monotonic(), traceback.format_exc())


def _end_with_parent(folder: Path) -> None:
    """End this rank and remove the folder of the ranks when the parent ends, even if it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    for _ in range(100):  # another rank may create files during the removal
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
    os._exit(1)


def _write_to(output: Path) -> None:
    """Send all output of this process to a file, also that of gloo and of a crash."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
