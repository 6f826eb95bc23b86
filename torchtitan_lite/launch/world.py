"""The ranks of a run: the number of this rank, how the ranks meet, and their collectives."""

import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Annotated, TypeVar, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import ProcessGroup, Store
from torch.distributed.rendezvous import rendezvous

from torchtitan_lite.config.load import MISSING, ConfigError, Problem
from torchtitan_lite.launch.end import OnAnotherRank

T = TypeVar("T")

_BACKEND = {"cpu": "gloo", "cuda": "nccl"}
_NCCL_GRACE = 20
_MOST_RANKS = 1_000_000
SAVING = "saving"
"""The name of the process group that the saving thread uses."""
_SAVING_TIMEOUT = timedelta(minutes=30)
"""The longest time that the other ranks wait for a rank that saves or loads."""
_PERIOD = 0.5
"""The seconds between two progress reports while the main thread waits for another thread."""


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    """The timeouts after which a run counts as hung, because a rank still waits for other ranks."""

    init_timeout_seconds: Annotated[int, Field(ge=1)] = 300
    """Timeout in seconds until the first step is done, and for each save."""
    train_timeout_seconds: Annotated[int, Field(ge=1)] = 100
    """Timeout in seconds for every later step."""


class SameOnAllRanks(Exception):
    """The base of errors that `World.together` raises unchanged on every rank, as it raises a ConfigError."""


class Progress:
    """The time of the main thread's last progress report, and the time when the next report is due."""

    def __init__(self, seconds: float = math.inf) -> None:
        self.report(seconds)

    def report(self, seconds: float) -> None:
        """Report progress now. The next report is due in `seconds`."""
        self.seconds, self.reported_at = seconds, time.monotonic()
        self.due = self.reported_at + seconds

    @property
    def is_late(self) -> bool:
        """True if a report is overdue. Any thread may read this property, because it reads one number."""
        return time.monotonic() > self.due


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks of a run, seen from one rank. `World()` is a run of one process."""

    rank: int = 0
    local_rank: int = 0
    """The number of this rank among the ranks of its machine."""
    size: int = 1
    store: Store | None = None
    """The store where the ranks met; None without a process group."""
    group: ProcessGroup | None = None
    """The process group that the methods use; None: the default group."""
    saving_group: ProcessGroup | None = None
    """A gloo process group of all ranks, with long timeouts; None in a run of one rank."""
    progress: Progress = field(default_factory=Progress, compare=False)
    """The progress of the main thread. The Guard ends a run of several ranks if a rank is late."""

    @property
    def is_first(self) -> bool:
        """True on rank 0, which prints and writes for all ranks."""
        return self.rank == 0

    @property
    def saving(self) -> "World":
        """The same ranks with the long timeouts of `saving_group`: for the one thread that saves or loads."""
        return self if self.saving_group is None else replace(self, group=self.saving_group)

    def alive(self, seconds: float | None = None) -> None:
        """Report progress of the main thread. The next report is due in `seconds` (None: as before)."""
        self.progress.report(self.progress.seconds if seconds is None else seconds)

    def wait_for(self, working: Future[T]) -> T:
        """Report progress until `working` is done in another thread. Return its result or raise its error."""
        while not wait([working], _PERIOD).done:
            self.alive()
        return working.result()

    def patiently(self, act: Callable[["World"], T]) -> T:
        """Run `act(self.saving)` in a thread, however long it takes. Return its result or raise its error."""
        return self.wait_for(in_thread(lambda: act(self.saving)))

    def sum(self, x: Tensor) -> Tensor:
        """Sum `x` over all ranks, in place."""
        if dist.is_initialized():
            dist.all_reduce(x, group=self.group)
        return x

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank."""
        if self.size == 1:
            return flag
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        return bool(self.sum(torch.tensor(int(flag), device=device)))

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, ordered by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def together(self, act: Callable[[], T]) -> T:
        """Run `act` on every rank. If `act` raises on one rank, every rank raises.

        The other ranks raise the same error if it is a ConfigError or SameOnAllRanks, else OnAnotherRank.
        """
        try:
            done, error = act(), None
        except Exception as raised:  # noqa: BLE001 - raised again once the other ranks know
            done, error = None, raised
        is_shared = error is None or isinstance(error, (ConfigError, SameOnAllRanks))
        told = error if is_shared else OnAnotherRank(f"rank {self.rank}: {type(error).__name__}: {error}")
        first = next((found for found in self.gather(told) if found is not None), None)
        if first is not None:
            raise first if is_shared or error is None else error
        return cast(T, done)

    def on_first(self, act: Callable[[], T]) -> T:
        """Run `act` on rank 0, and return its result on every rank. Raise errors as `together` does."""
        return cast(T, self.broadcast(self.together(act if self.is_first else lambda: None)))

    def in_turn(self, build: Callable[[], T]) -> T:
        """Run `build` on the first rank of each machine, then on the other ranks, which find cached results.

        Raise errors as `together` does.
        """
        is_first_here = self.local_rank == 0
        first = self.together(lambda: build() if is_first_here else None)
        second = self.together(lambda: None if is_first_here else build())
        return cast(T, first if is_first_here else second)

    def set_timeout(self, seconds: int) -> None:
        """Set the timeouts of progress reports and collectives to `seconds`. A save may still take longer."""
        if dist.is_initialized():
            self.alive(seconds)
            timeout = _timeout(seconds, dist.get_backend())
            for group in set(distributed_c10d._world.pg_map) - {self.saving_group}:
                distributed_c10d._set_pg_timeout(timeout, group)


def in_thread(act: Callable[[], T]) -> Future[T]:
    """Run `act` in a new thread, on the GPU of this thread. The process may end before the thread does."""
    done: Future[T] = Future()
    # A new thread has GPU 0 as its current device, and would take memory there.
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)
            done.set_result(act())
        except BaseException as error:  # noqa: BLE001 - raised again by `wait_for`
            done.set_exception(error)

    threading.Thread(target=run, name="background", daemon=True).start()
    return done


def _timeout(seconds: int, backend: str) -> timedelta:
    """Return the timeout of a collective if a rank may go `seconds` without progress."""
    # After its timeout NCCL ends the process without a Python error, so the Guard must notice first.
    return timedelta(seconds=seconds + _NCCL_GRACE * (backend == "nccl"))


def world_size() -> int:
    """Return the number of ranks that the launcher started, or 1 without a launcher."""
    return _number("WORLD_SIZE", 1, _MOST_RANKS) if "WORLD_SIZE" in os.environ else 1


def join(device_type: str, *, init_seconds: int = 300, offload: bool = False) -> World:
    """Meet the other ranks that the launcher started, and take this rank's GPU.

    Raises ConfigError if the launcher's variables make no sense, if this machine has more ranks than GPUs, or
    if the ranks do not meet.

    Args:
        offload: make a process group even without a launcher, because FSDP's CPU offload needs one.
    """
    size = world_size()
    if "RANK" not in os.environ and size == 1:
        if offload:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(_BACKEND[device_type], store=store, rank=0, world_size=1)
        return World()
    rank = _number("RANK", 0, size - 1)
    local_size = _number("LOCAL_WORLD_SIZE", 1, size)
    local_rank = _number("LOCAL_RANK", 0, local_size - 1)
    if device_type == "cuda":
        _take_gpu(local_rank, local_size)
    backend = _BACKEND[device_type]
    timeout = _timeout(init_seconds, backend)
    try:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        saving_group = _build_saving_group(timeout) if size > 1 else None
    except (dist.DistError, ValueError) as error:  # ValueError: MASTER_PORT is missing or not a number
        address = os.environ.get("MASTER_ADDR", MISSING)
        rule = f"did not bring the {size} ranks together ({str(error).splitlines()[0]})"
        remedy = "see what became of the others, or raise comm.init_timeout_seconds"
        raise ConfigError([Problem("MASTER_ADDR", address, rule, remedy)]) from None
    return World(
        rank=rank,
        local_rank=local_rank,
        size=size,
        store=store,
        saving_group=saving_group,
        progress=Progress(seconds=init_seconds),
    )


def _build_saving_group(timeout: timedelta) -> ProcessGroup:
    """Return a gloo group of all ranks, with `timeout` to meet and `_SAVING_TIMEOUT` for each collective."""
    group = dist.new_group(backend="gloo", timeout=timeout, group_desc=SAVING)
    assert isinstance(group, ProcessGroup)
    distributed_c10d._set_pg_timeout(_SAVING_TIMEOUT, group)
    return group


def leave(wait: bool = True) -> None:
    """Leave the process group. With `wait`, first wait until every rank gets here."""
    if dist.is_initialized():
        nccl = dist.get_backend() == "nccl"
        if wait:
            dist.barrier(device_ids=[torch.cuda.current_device()] if nccl else None)
        dist.destroy_process_group()


def _take_gpu(local_rank: int, local_size: int) -> None:
    count = torch.cuda.device_count()
    if count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:  # the launcher gave each rank one GPU
        local_rank, local_size = 0, 1
    if local_size > count:
        rule = f"is more ranks than this machine has GPUs, which is {count}"
        remedy = f"use --nproc_per_node {count}, or --job.device cpu"
        raise ConfigError([Problem("LOCAL_WORLD_SIZE", local_size, rule, remedy)])
    torch.cuda.set_device(local_rank)


def _number(name: str, least: int, most: int) -> int:
    """Return the launcher's variable `name`, which must be a number from `least` to `most`."""
    given = os.environ.get(name)
    if given is not None and given.isascii() and given.isdecimal() and least <= int(given) <= most:
        return int(given)
    rule = f"must be a number from {least} to {most}, as there are other variables of a launcher"
    remedy = "start with torchrun, which sets it, or unset those"
    raise ConfigError([Problem(name, MISSING if given is None else given, rule, remedy)])
