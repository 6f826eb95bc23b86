"""What a run reports: lines on the console, metrics.jsonl and TensorBoard."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tqdm import tqdm

from torchtitan_lite.config.load import Problem
from torchtitan_lite.training.outputs import Lines, is_inside, keep_lines

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


_FILE = "metrics.jsonl"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is reported, and how often."""

    log_freq: int = 10
    """Steps between two reports; the first and the last step are always reported."""
    enable_tensorboard: bool = True
    """Write the same numbers for TensorBoard."""
    save_tb_folder: str = "tb"
    """Folder for TensorBoard, inside the run's folder."""
    peak_flops: float = 0.0
    """FLOP per second that MFU is measured against. 0: what the device's maker states, else a measurement."""

    def problems(self, key: str) -> list[Problem]:
        """Values out of range."""
        rules = (
            ("log_freq", self.log_freq >= 1, "must be at least 1", "use 1 for every step"),
            ("peak_flops", self.peak_flops >= 0, "must be at least 0", "use 0 to find it out"),
            (
                "save_tb_folder",
                is_inside(self.save_tb_folder),
                "is not a folder of its own inside the run's",
                'use "tb"',
            ),
        )
        return [
            Problem(f"{key}.{name}", getattr(self, name), rule, fix)
            for name, ok, rule, fix in rules
            if not ok
        ]


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What one optimizer step was like."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean over the step's valid tokens, in nats per token."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    n_tokens: int
    """Tokens of all ranks and micro-batches."""
    seconds: float
    data_seconds: float
    """The part of `seconds` that went into waiting for data."""


class Metrics:
    """Reports every `log_freq`-th step. A context manager: leaving it closes the files.

    A run that goes on from `resumed_step` has seen `n_tokens_seen` tokens by then; `cut` drops later reports.
    That step may be 0; a new run has none.
    """

    def __init__(
        self,
        config: MetricsConfig,
        folder: Path,
        *,
        steps: int,
        flops_per_token: float,
        peak_flops: Callable[[], float],
        resumed_step: int | None = None,
        n_tokens_seen: int = 0,
    ) -> None:
        self.config, self.steps = config, steps
        self.flops_per_token = flops_per_token
        # Found out for the first report: the first step does not wait for a measurement.
        self._peak_flops = cache(peak_flops)
        self.n_tokens_seen = n_tokens_seen
        self._window: list[StepStats] = []
        self._lines = Lines(folder / _FILE)
        self._tensorboard = (
            _tensorboard(folder / config.save_tb_folder, resumed_step) if config.enable_tensorboard else None
        )
        self._bar = tqdm(
            initial=resumed_step or 0,
            total=steps,
            unit="step",
            desc="training",
            disable=None,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._lines.close()
        self._to_tensorboard(lambda board: board.close())

    def log(self, stats: StepStats, peak_memory_gib: float) -> None:
        """Count a step and report it when it is due, with the speed since the report before."""
        self.n_tokens_seen += stats.n_tokens
        self._window.append(stats)
        self._bar.update(stats.step - self._bar.n)
        if stats.step % self.config.log_freq and stats.step not in (1, self.steps):
            return
        seconds = sum(s.seconds for s in self._window)
        tokens_per_second = sum(s.n_tokens for s in self._window) / seconds
        record = {
            "step": stats.step,
            "loss": stats.loss,
            "grad_norm": stats.grad_norm,
            "lr": stats.lr,
            "n_tokens_seen": self.n_tokens_seen,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self.flops_per_token / self._peak_flops(),
            "peak_memory_gib": peak_memory_gib,
            "data_wait_fraction": sum(s.data_seconds for s in self._window) / seconds,
        }
        self._window.clear()
        self._write(record)
        self.say(
            "step {step:>{width}}/{steps}  loss {loss:7.4f}  gradient norm {grad_norm:7.3f}  lr {lr:.2e}  "
            "{tokens_per_second:,.0f} tokens/s  memory {peak_memory_gib:.2f} GiB  MFU {mfu:.1%}  "
            "data wait {data_wait_fraction:.1%}".format(
                width=len(str(self.steps)), steps=self.steps, **record
            )
        )

    def log_validation(self, step: int, loss: float) -> None:
        """Record the loss on held-out text."""
        self._write({"step": step, "validation_loss": loss})

    def say(self, line: str) -> None:
        """Print a line without breaking the progress bar."""
        tqdm.write(line)

    def _write(self, record: Mapping[str, float]) -> None:
        # JSON has no NaN or infinity.
        line = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self._lines.write(line)
        for key in record.keys() - {"step"}:
            self._to_tensorboard(
                lambda board, key=key: board.add_scalar(key, record[key], int(record["step"]))
            )

    def _to_tensorboard(self, act: Callable[["SummaryWriter"], object]) -> None:
        try:
            if self._tensorboard is not None:
                act(self._tensorboard)
        except OSError as error:  # its own thread has ended with it
            _LOG.warning("no more is written for TensorBoard (%s)", error.strerror)
            self._tensorboard = None


class Silence:
    """The reports of a rank that leaves them to the first one: none."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing."""

    def log(self, stats: StepStats, peak_memory_gib: float) -> None:
        """Nothing."""

    def log_validation(self, step: int, loss: float) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""


def cut(folder: Path, step: int, validated: int) -> None:
    """Drop from metrics.jsonl what was reported after `step`, from which the run in `folder` goes on.

    Of validations, what came after step `validated`, the last one that `step` knows of (-1: none): they are
    done again.
    """
    keep_lines(
        folder / _FILE, lambda line: line["step"] <= (validated if "validation_loss" in line else step)
    )


def _tensorboard(folder: Path, resumed_step: int | None) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter  # slow to import, so not for --dry-run

    # It appends; whoever reads is told to forget what an earlier start reported from there on.
    return SummaryWriter(str(folder), purge_step=None if resumed_step is None else resumed_step + 1)
