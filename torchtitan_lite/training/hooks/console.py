"""Lines on the console, and a progress bar if the console is a terminal."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tqdm import tqdm

from torchtitan_lite.training.hooks import Outcome, RunInfo, StepStats
from torchtitan_lite.training.metrics import Reporter
from torchtitan_lite.training.validation import Validation

_NEGLIGIBLE = 0.01
"""Share of the time below which the console does not mention hooks."""


@dataclass(frozen=True, kw_only=True)
class ConsoleConfig:
    """Reports on the console, on the first rank."""

    name: Literal["console"] = "console"

    def build(self, run: RunInfo) -> "Console | None":
        """The hook, on the first rank."""
        return Console(run.job.metrics) if run.rank == 0 else None


class Console(Reporter):
    """Prints a line for each report and each validation."""

    def start(self, run: RunInfo) -> None:
        """Show the progress bar."""
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
        """Move the bar, and print a report if one is due."""
        self._bar.update(stats.step - self._bar.n)
        super().step(stats)

    def write(self, record: Mapping[str, float]) -> None:
        """Print a report."""
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
        """Print the loss on held-out text."""
        say(
            f"step {result.step}/{self.n_steps}  validation loss {result.loss:.4f} nats per token, "
            f"{result.nats_per_byte:.4f} per byte (byte frequencies alone: {result.unigram_entropy:.4f})"
        )

    def end(self, outcome: Outcome) -> None:
        """Remove the bar."""
        self._bar.close()


def say(line: str) -> None:
    """Print a line without breaking the progress bar."""
    tqdm.write(line)
