"""What a run reports: lines on the console, metrics.jsonl and TensorBoard."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tqdm import tqdm

from torchtitan_lite.config.load import Problem
from torchtitan_lite.training.outputs import is_inside

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


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
    """Reports every `log_freq`-th step. A context manager: leaving it closes the files."""

    def __init__(
        self, config: MetricsConfig, folder: Path, *, steps: int, flops_per_token: float, peak_flops: float
    ) -> None:
        self.config, self.steps = config, steps
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.n_tokens_seen = 0
        self._window: list[StepStats] = []
        self._file = (folder / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        self._tensorboard = (
            _tensorboard(folder / config.save_tb_folder) if config.enable_tensorboard else None
        )
        self._bar = tqdm(total=steps, unit="step", desc="training", disable=None, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

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
            "mfu": tokens_per_second * self.flops_per_token / self.peak_flops,
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
        self._file.write(json.dumps(line) + "\n")
        if self._tensorboard is not None:
            for key in record.keys() - {"step"}:
                self._tensorboard.add_scalar(key, record[key], int(record["step"]))


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


def _tensorboard(folder: Path) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter  # slow to import, so not for --dry-run

    return SummaryWriter(str(folder))
