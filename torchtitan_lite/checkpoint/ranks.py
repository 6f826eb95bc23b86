"""What the ranks of a run tell each other about a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from torchtitan_lite.checkpoint.manifest import Damaged, Unreadable
from torchtitan_lite.config.load import ConfigError

T = TypeVar("T")


class OnAnotherRank(RuntimeError):
    """Something went wrong on another rank; the message says where and what."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """All ranks, as one of them sees them: a process group for checkpoints alone, or one process."""

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None
    """Of the CPU, patient, and used by no other thread meanwhile."""

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that acts for all."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def share(self, value: T) -> T:
        """The value of the first rank, on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def together(self, act: Callable[[], T]) -> T:
        """What `act` gives on this rank; what it raises on one raises on all, elsewhere as OnAnotherRank.

        What is wrong with a step or with what the user has said, in our own words, is the same on every rank.
        """
        done: list[T] = []
        error: Exception | None = None
        try:
            done.append(act())
        except Exception as raised:  # noqa: BLE001 - raised again once the others know
            error = raised
        words = error
        is_own = error is not None and not isinstance(error, (Damaged, Unreadable, ConfigError))
        if is_own:
            words = OnAnotherRank(f"rank {self.rank}: {type(error).__name__}: {error}")
        first = next((found for found in self.gather(words) if found is not None), None)
        if first is not None:
            raise error if error is not None and is_own else first
        return done[0]
