"""Pools of processes, one for each number of ranks, on which tests run functions of a process group.

    pool(4).run(function, *args)  ->  [function(*args) on rank 0, ..., on rank 3]

Starting ranks is what costs: a pool is started once and used again, until a rank of it fails or is left with
too many threads.
"""

import builtins
import contextlib
import functools
import gc
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import programs
import torch
import torch.distributed as dist
from torch.distributed.tensor import _redistribute, debug

from torchtitan_lite.attention import native

_GRACE_SECONDS = 0.5
"""Within which ranks fail for one reason; what fails later fails because of the first."""

_MOST_THREADS = 12
"""A pool with a rank that has more is started anew: each thread left by gloo wakes up 99 times a second."""


class RankFailed(AssertionError):
    """A rank raised, died or did not finish."""


class _Rank(NamedTuple):
    process: BaseProcess
    connection: Connection


class _Outcome(NamedTuple):
    """How a function ended on a rank, and when, by a clock that all processes share."""

    failed: bool
    seconds: float
    value: Any
    """What it returned, pickled, or the traceback of what it raised."""


class Pool:
    """`size` processes that wait for functions."""

    def __init__(self, size: int, filters: Sequence[str] = ()) -> None:
        self.size, self.filters = size, filters
        self._ranks: list[_Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._tasks = itertools.count()

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """What `function(*args)` returns on each rank, in a gloo process group of all of them.

        The function is one that the ranks can import. Raises RankFailed with the traceback of the rank that
        failed first, or with the ranks that had not finished after `timeout` seconds.
        """
        __tracebackhide__ = True
        if not self._ranks:
            self._start()
        try:
            if self._n_threads() > _MOST_THREADS:
                self.stop()
                self._start()
                self._n_threads()
            assert self._folder is not None
            store = Path(self._folder.name) / f"store-{next(self._tasks)}"
            task = pickle.dumps((store, timeout, function, args))
            for rank in self._ranks:
                with contextlib.suppress(BrokenPipeError):  # its end is found out with the others' results
                    rank.connection.send_bytes(task)
            results = self._results(f"{function.__module__}.{function.__qualname__}", timeout)
        except BaseException:
            # The others wait for the rank that failed, and may do so for long.
            self.stop()
            raise
        return results

    def stop(self) -> None:
        """Kill the processes; the next `run` starts others."""
        for rank in self._ranks:
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.connection.close()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        with programs.import_path_in_environment():
            for rank in range(self.size):
                context = programs.context()
                ours, theirs = context.Pipe()
                output = Path(self._folder.name) / f"output-{rank}"
                arguments = (rank, self.size, theirs, self.filters, output)
                process = context.Process(target=_serve, args=arguments, name=f"rank {rank}", daemon=True)
                process.start()
                theirs.close()  # so that the end of the process ends the connection
                assert isinstance(ours, Connection)
                self._ranks.append(_Rank(process, ours))

    def _n_threads(self) -> int:
        """The most threads of a rank; each says so once, when it is ready for a task."""
        found = [0]
        for rank in self._ranks:
            with contextlib.suppress(EOFError, ConnectionResetError):  # it has died: its result will say so
                found.append(rank.connection.recv())
        return max(found)

    def _results(self, name: str, timeout: float) -> list[Any]:
        __tracebackhide__ = True
        deadline = time.monotonic() + timeout
        done: dict[int, _Outcome] = {}
        while len(done) < self.size:
            done |= self._finished(done, max(0, deadline - time.monotonic()))
            if any(outcome.failed for outcome in done.values()):
                until = time.monotonic() + _GRACE_SECONDS
                while len(done) < self.size and (seconds := until - time.monotonic()) > 0:
                    done |= self._finished(done, seconds)
                raise RankFailed(self._failure(name, done))
            if time.monotonic() >= deadline and len(done) < self.size:
                late = [str(rank) for rank in range(self.size) if rank not in done]
                which = f"rank{'s' if len(late) > 1 else ''} {', '.join(late)} of {self.size}"
                raise RankFailed(f"{name}: {which} had not finished after {timeout:g} seconds")
        return [pickle.loads(done[rank].value) for rank in range(self.size)]

    def _finished(self, done: dict[int, _Outcome], seconds: float) -> dict[int, _Outcome]:
        """The outcomes that have come, once there is one, of ranks that are not in `done`."""
        waited = {self._ranks[rank].connection: rank for rank in range(self.size) if rank not in done}
        ready = multiprocessing.connection.wait(waited, seconds)
        return {
            waited[connection]: self._receive(waited[connection])
            for connection in ready
            if isinstance(connection, Connection)
        }

    def _receive(self, rank: int) -> _Outcome:
        process, connection = self._ranks[rank]
        try:
            return _Outcome(*pickle.loads(connection.recv_bytes()))
        except (EOFError, ConnectionResetError):
            process.join()
            # At 0 seconds: whatever the others complain of, this is why.
            return _Outcome(True, 0.0, f"the process died with exit code {process.exitcode}")

    def _failure(self, name: str, done: dict[int, _Outcome]) -> str:
        assert self._folder is not None
        failed = {rank: outcome for rank, outcome in done.items() if outcome.failed}
        first = min(failed, key=lambda rank: failed[rank].seconds)
        others = [str(rank) for rank in sorted(failed) if rank != first]
        also = f"\n(ranks that failed after it: {', '.join(others)})" if others else ""
        output = (Path(self._folder.name) / f"output-{first}").read_text(errors="replace").strip()
        said = f"\nIts last output:\n{output[-4000:]}" if output else ""
        return f"{name}: rank {first} of {self.size} failed:\n{failed[first].value}{said}{also}"


class Pools:
    """A pool for each number of ranks, made when it is first asked for."""

    def __init__(self, filters: Sequence[str] = ()) -> None:
        """`filters`: what is done about warnings in the ranks, as pytest's filterwarnings has them."""
        self._filters = list(filters)
        self._pools: dict[int, Pool] = {}

    def __call__(self, size: int) -> Pool:
        """The pool of `size` ranks."""
        if size not in self._pools:
            self._pools[size] = Pool(size, self._filters)
        return self._pools[size]

    def stop(self) -> None:
        """Stop every pool."""
        for pool in self._pools.values():
            pool.stop()


def _serve(rank: int, size: int, connection: Connection, filters: Sequence[str], output: Path) -> None:
    """The life of a rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    threading.Thread(target=_end_with_parent, args=(output.parent,), daemon=True).start()
    _write_to(output)
    torch.set_num_threads(1)
    for line in filters:
        action, message, category, *_ = [*line.split(":"), "", ""]
        kind = getattr(builtins, category.strip() or "Warning")
        warnings.filterwarnings(action.strip(), message.strip(), kind)  # pyright: ignore[reportArgumentType]
    with contextlib.suppress(EOFError, BrokenPipeError):  # the parent is gone
        while True:
            connection.send(len(os.listdir("/proc/self/task")))
            outcome = _outcome(connection.recv_bytes(), rank, size)
            connection.send_bytes(pickle.dumps(outcome))
            if outcome.failed:
                break  # the others may be anywhere in the function
            _forget_process_group()
    threading.Event().wait()  # for the end


def _outcome(task: bytes, rank: int, size: int) -> _Outcome:
    """How a pickled task ends, its value pickled."""
    try:
        store, timeout, function, args = pickle.loads(task)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
        return _Outcome(False, time.monotonic(), pickle.dumps(function(*args)))
    except BaseException:  # noqa: BLE001 (pytest.fail's, too: the caller raises it)
        return _Outcome(True, time.monotonic(), traceback.format_exc())


_FROZEN_CACHES: list[Any] = []


def freeze() -> None:
    """Keep what is there now out of garbage collection, in the server that ranks are forked from.

    A rank that looks for garbage would otherwise write to, and so copy, every page of it.
    """
    gc.collect()
    _FROZEN_CACHES.extend(_caches())
    gc.freeze()


def _forget_process_group() -> None:
    """End the process group, and what torch remembers of its meshes.

    The next one's look the same; and a group that is remembered keeps its threads, hundreds after some tests,
    which look around ever so often and leave no time for anything else.
    """
    dist.barrier()  # one that leaves early would cut off those who are still meeting
    debug._clear_sharding_prop_cache()
    _redistribute.clear_redistribute_planner_cache()
    for cache in (*_FROZEN_CACHES, *_caches()):
        cache.cache_clear()
    _forget_what_is_compiled()
    gc.collect()
    dist.destroy_process_group()


def _forget_what_is_compiled() -> None:
    """Drop our compiled kernels and torch's compiled functions, which keep their meshes."""
    native.forget_kernels()
    # torch._dynamo.reset() does not remove the functions from the modules that they were compiled for.
    modules = [vars(module) for name, module in sys.modules.items() if name.startswith("torchtitan_lite")]
    if left := [(names, name) for names in modules for name in names if name.startswith("__compiled_fn")]:
        torch._dynamo.reset()
        for names, name in left:
            if name in names:
                names[name] = None  # not deleted: torch may delete the name later, and must find it


def _caches() -> list[Any]:
    """Those of torch's DTensors, among what is not frozen yet."""
    wrappers = [found for found in gc.get_objects() if type(found) is functools._lru_cache_wrapper]
    return [found for found in wrappers if (found.__module__ or "").startswith("torch.distributed")]


def _end_with_parent(folder: Path) -> None:
    """However the parent ends, no rank outlives it, nor does the pool's folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    for _ in range(100):  # a rank that is in a task may make its store's file again meanwhile
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
    os._exit(1)


def _write_to(output: Path) -> None:
    """Send what this process prints, gloo's own words too, to a file."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
