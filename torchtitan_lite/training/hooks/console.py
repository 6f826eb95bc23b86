"""The hooks that print to the console: reports, a progress bar, and the balance of attention work."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

from torchtitan_lite.training.hooks import Outcome, RunInfo, StepStats
from torchtitan_lite.training.metrics import Reporter
from torchtitan_lite.training.validation import Validation

_NEGLIGIBLE = 0.01
"""The share of the time that hooks must take before the console mentions them."""


@dataclass(frozen=True, kw_only=True)
class ConsoleConfig:
    """The config of the hook that prints reports on the console. Only the first rank builds the hook."""

    name: Literal["console"] = "console"

    def build(self, run: RunInfo) -> "Console | None":
        return Console(run.job.metrics) if run.rank == 0 else None


class Console(Reporter):
    """A hook that prints a line per report and per validation. A terminal also gets a progress bar."""

    def start(self, run: RunInfo) -> None:
        super().start(run)
        self._bar = tqdm(
            initial=run.resumed_step or 0,
            total=run.n_steps,
            unit="step",
            desc="training",
            disable=None,
            dynamic_ncols=True,
        )

    def step(self, stats: StepStats) -> None:
        self._bar.update(stats.step - self._bar.n)
        super().step(stats)

    def write(self, record: Mapping[str, float]) -> None:
        line = (
            "step {step:>{width}}/{steps}  loss {loss:7.4f}  gradient norm {grad_norm:7.3f}  lr {lr:.2e}  "
            "{tokens_per_second:,.0f} tokens/s  memory {peak_memory_gib:.2f} GiB  MFU {mfu:.1%}  "
            "data wait {data_wait_fraction:.1%}".format(
                width=len(str(self.n_steps)), steps=self.n_steps, **record
            )
        )
        share = record["hooks_fraction"]
        say(line if share < _NEGLIGIBLE else f"{line}  hooks {share:.1%}")

    def validated(self, result: Validation) -> None:
        say(
            f"step {result.step}/{self.n_steps}  validation loss {result.loss:.4f} nats per token, "
            f"{result.nats_per_byte:.4f} per byte (byte frequencies alone: {result.unigram_entropy:.4f})"
        )

    def end(self, outcome: Outcome) -> None:
        self._bar.close()


def say(line: str) -> None:
    """Print a line without breaking the progress bar."""
    tqdm.write(line)


@dataclass(frozen=True, kw_only=True)
class WorkConfig:
    """The config of the hook that reports the balance of attention work under context parallel."""

    name: Literal["work"] = "work"

    def build(self, run: RunInfo) -> "Work | None":
        # Every rank needs the hook: the ranks exchange their work in an all-reduce.
        degrees = run.job.parallelism.degrees(run.world_size)
        return Work(run, degrees.context, degrees.tensor) if degrees.context > 1 else None


class Work:
    """A hook that prints max/mean of the ranks' attention work, after the first step of this process."""

    def __init__(self, run: RunInfo, context_degree: int, tensor_degree: int) -> None:
        self.run, self.degrees = run, (context_degree, tensor_degree)

    def step(self, stats: StepStats) -> None:
        if stats.attention_work is None:
            return
        # Each rank fills in its own entry, so the sum over ranks holds every rank's work.
        work = torch.zeros(self.run.world_size, dtype=torch.float64)
        work[self.run.rank] = stats.attention_work
        work = work.to(self.run.device)
        dist.all_reduce(work)
        # Only ranks that share a sequence can share its work: compare these, and report the worst sequence.
        shared = work.view(-1, *self.degrees)
        ratio = (shared.amax(1) / shared.mean(1).clamp(min=1)).max()
        if self.run.rank == 0:
            say(f"attention work per rank in the first step: max/mean {ratio:.3f}")
