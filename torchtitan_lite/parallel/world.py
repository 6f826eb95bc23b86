"""The ranks of a run: who this one is, how they meet, and what they settle between them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, TypeVar

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import ProcessGroup, Store
from torch.distributed.rendezvous import rendezvous

from torchtitan_lite.config.load import MISSING, ConfigError, Problem

T = TypeVar("T")

_BACKEND = {"cpu": "gloo", "cuda": "nccl"}
_NCCL_GRACE = 20
_SAVING = timedelta(minutes=30)
"""How long a rank may write while the others wait for it."""


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    """How long a rank waits for the others before the run counts as hung."""

    init_timeout_seconds: Annotated[int, Field(ge=1)] = 300
    """Seconds until the first step is done."""
    train_timeout_seconds: Annotated[int, Field(ge=1)] = 100
    """Seconds for every later step."""


@dataclass(frozen=True, kw_only=True)
class World:
    """All ranks of a run, as one of them sees them; as it is made without arguments, a run of one process."""

    rank: int = 0
    local_rank: int = 0
    """Number of this rank among those of its machine."""
    size: int = 1
    local_size: int = 1
    train_seconds: int = 100
    """How long a rank waits for the others in a `steady` run."""
    store: Store | None = None
    """Where the ranks met; None without a process group."""
    saving: ProcessGroup | None = None
    """All ranks once more, on the CPU, for the thread that saves alone; None where there are no others."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """`x` summed over all ranks, in place."""
        if dist.is_initialized():
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        if self.size == 1:
            return flag
        found = torch.tensor(int(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def share(self, value: T) -> T:
        """The `value` of rank 0, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def in_turn(self, build: Callable[[], T]) -> T:
        """What `build` gives, first on one rank of each machine, so that the others find what it has cached.

        What it raises on one rank stops all: elsewhere a ConfigError is the same, anything else a DistError.
        """
        if self.size == 1:
            return build()
        built: list[T] = []
        for turn in (True, False):
            error = None
            if (self.local_rank == 0) == turn:
                try:
                    built.append(build())
                except Exception as raised:  # noqa: BLE001 - raised again once the others know
                    error = raised
            self._stop_all_on(error)
        return built[0]

    def steady(self) -> None:
        """From now on a rank waits no longer than `train_seconds` for the others: the slow start is over.

        Only while it saves it may wait for long, as before.
        """
        if dist.is_initialized():
            timeout = _timeout(self.train_seconds, dist.get_backend())
            for group in set(distributed_c10d._world.pg_map) - {self.saving}:
                distributed_c10d._set_pg_timeout(timeout, group)

    def _stop_all_on(self, error: Exception | None) -> None:
        """Raise on every rank if there is an `error` on any."""
        words = error
        if error is not None and not isinstance(error, ConfigError):
            words = dist.DistError(f"rank {self.rank}: {type(error).__name__}: {error}")
        found: list[Exception | None] = [None] * self.size
        dist.all_gather_object(found, words)
        first = next((other for other in found if other is not None), None)
        if first is not None:
            raise first if error is None or isinstance(error, ConfigError) else error


def _timeout(seconds: int, backend: str) -> timedelta:
    """How long an exchange may take where one rank is given `seconds`."""
    # NCCL ends the process that waits, without a word of Python: by then the rank that hangs has spoken.
    return timedelta(seconds=seconds + _NCCL_GRACE * (backend == "nccl"))


def world_size() -> int:
    """How many ranks the launcher started; one without a launcher."""
    return _number("WORLD_SIZE", at_least=1) if "WORLD_SIZE" in os.environ else 1


def join(
    device_type: str, *, init_seconds: int = 300, train_seconds: int = 100, offload: bool = False
) -> World:
    """Meet the other ranks that the launcher started, and take this rank's GPU.

    `offload` makes a group of this process alone where there is no launcher, as FSDP needs one for it. Raises
    ConfigError where the launcher's variables make no sense, or give this machine more ranks than GPUs.
    """
    size = world_size()
    if "RANK" not in os.environ and size == 1:
        if offload:  # FSDP does it, and needs a group of at least this process
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(_BACKEND[device_type], store=store, rank=0, world_size=1)
        return World()
    rank = _number("RANK", below=size)
    local_size = _number("LOCAL_WORLD_SIZE", at_least=1)
    local_rank = _number("LOCAL_RANK", below=local_size)
    address, _ = _variable("MASTER_ADDR"), _variable("MASTER_PORT")
    if device_type == "cuda":
        _take_gpu(local_rank, local_size)
    backend = _BACKEND[device_type]
    timeout = _timeout(init_seconds, backend)
    try:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        saving = _build_saving(timeout) if size > 1 else None
    except (dist.DistError, ValueError) as error:  # ValueError: a port that is no number
        rule = f"did not bring the {size} ranks together ({str(error).splitlines()[0]})"
        remedy = "see what became of the others, or raise comm.init_timeout_seconds"
        raise ConfigError([Problem("MASTER_ADDR", address, rule, remedy)]) from None
    return World(
        rank=rank,
        local_rank=local_rank,
        size=size,
        local_size=local_size,
        train_seconds=train_seconds,
        store=store,
        saving=saving,
    )


def _build_saving(timeout: timedelta) -> ProcessGroup:
    """A gloo group of all ranks, which meet within `timeout` and then have `_SAVING` for each exchange."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, ProcessGroup)
    distributed_c10d._set_pg_timeout(_SAVING, group)
    return group


def leave(wait: bool = True) -> None:
    """Part from the other ranks; with `wait`, when every one of them is done."""
    if dist.is_initialized():
        nccl = dist.get_backend() == "nccl"
        if wait:
            dist.barrier(device_ids=[torch.cuda.current_device()] if nccl else None)
        dist.destroy_process_group()


def _take_gpu(local_rank: int, local_size: int) -> None:
    count = torch.cuda.device_count()
    if count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:  # the launcher has given each rank its own
        local_rank, local_size = 0, 1
    if local_size > count:
        rule = f"is more ranks than this machine has GPUs, which is {count}"
        remedy = f"use --nproc_per_node {count}, or --job.device cpu"
        raise ConfigError([Problem("LOCAL_WORLD_SIZE", local_size, rule, remedy)])
    torch.cuda.set_device(local_rank)


def _number(name: str, *, at_least: int = 0, below: int | None = None) -> int:
    """The launcher's variable `name` as a number in its range."""
    given = _variable(name)
    if not (given.isascii() and given.isdecimal()) or int(given) < at_least:
        rule = "is not the number of a rank" if at_least == 0 else "is not a number of ranks"
        raise ConfigError([Problem(name, given, rule, "unset it, or start with torchrun, which sets it")])
    if below is not None and int(given) >= below:
        rule = f"is not below the {below} ranks there are"
        raise ConfigError([Problem(name, int(given), rule, "start with torchrun, which sets it")])
    return int(given)


def _variable(name: str) -> str:
    if name not in os.environ:
        rule, remedy = (
            "is not set, and other variables of a launcher are",
            "start with torchrun, or unset those",
        )
        raise ConfigError([Problem(name, MISSING, rule, remedy)])
    return os.environ[name]
