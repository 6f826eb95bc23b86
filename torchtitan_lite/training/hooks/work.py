"""The balance of attention among the ranks that share a sequence."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from torchtitan_lite.training.hooks import RunInfo, StepStats
from torchtitan_lite.training.hooks.console import say


@dataclass(frozen=True, kw_only=True)
class WorkConfig:
    """Reports the balance of attention, if ranks share sequences (context parallel)."""

    name: Literal["work"] = "work"

    def build(self, run: RunInfo) -> "Work | None":
        """The hook, on every rank: all ranks take part in the sum."""
        degrees = run.job.parallelism.degrees(run.world_size)
        return Work(run, degrees.context, degrees.tensor) if degrees.context > 1 else None


class Work:
    """Prints the ratio of the largest to the mean work of a rank in the first step."""

    def __init__(self, run: RunInfo, context_degree: int, tensor_degree: int) -> None:
        self.run, self.degrees = run, (context_degree, tensor_degree)

    def step(self, stats: StepStats) -> None:
        """Report the first step of this start. All ranks exchange their work."""
        if stats.attention_work is None:
            return
        # Each rank fills in its own entry, so that one sum gives every rank's work.
        work = torch.zeros(self.run.world_size, dtype=torch.float64)
        work[self.run.rank] = stats.attention_work
        work = work.to(self.run.device)
        dist.all_reduce(work)
        # Only ranks of one sequence can share work: compare them, and report the worst sequence.
        shared = work.view(-1, *self.degrees)
        ratio = (shared.amax(1) / shared.mean(1).clamp(min=1)).max()
        if self.run.rank == 0:
            say(f"attention work per rank in the first step: max/mean {ratio:.3f}")
