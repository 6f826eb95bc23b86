"""How evenly the ranks of a sequence share the work of attention."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from torchtitan_lite.training.hooks import RunInfo, StepStats
from torchtitan_lite.training.hooks.console import say


@dataclass(frozen=True, kw_only=True)
class WorkConfig:
    """The report on every rank of a run in which ranks share sequences."""

    name: Literal["work"] = "work"

    def build(self, run: RunInfo) -> "Work | None":
        """The hook."""
        degrees = run.job.parallelism.degrees(run.world_size)
        return Work(run, degrees.context, degrees.tensor) if degrees.context > 1 else None


class Work:
    """Prints the ratio of the largest to the mean work, as the first step of a start had it."""

    def __init__(self, run: RunInfo, context_degree: int, tensor_degree: int) -> None:
        self.run, self.degrees = run, (context_degree, tensor_degree)

    def step(self, stats: StepStats) -> None:
        """Report the first step. All ranks meet."""
        if stats.attention_work is None:
            return
        # Every rank's in a row of its own, so that one sum shows them all.
        work = torch.zeros(self.run.world_size, dtype=torch.float64)
        work[self.run.rank] = stats.attention_work
        work = work.to(self.run.device)
        dist.all_reduce(work)
        # Only the ranks of one sequence can share its work; of all sequences, the one that is shared worst.
        shared = work.view(-1, *self.degrees)
        ratio = (shared.amax(1) / shared.mean(1).clamp(min=1)).max()
        if self.run.rank == 0:
            say(f"attention work per rank in the first step: max/mean {ratio:.3f}")
