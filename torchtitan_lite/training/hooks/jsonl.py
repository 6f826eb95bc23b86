"""metrics.jsonl: one object for each report and each validation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchtitan_lite.training.hooks import Outcome, RunInfo, StepStats
from torchtitan_lite.training.metrics import Meter, MetricsConfig
from torchtitan_lite.training.outputs import Lines, keep_lines
from torchtitan_lite.training.validation import Validation

_FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class JsonlConfig:
    """metrics.jsonl, which the first rank writes."""

    name: Literal["metrics_jsonl"] = "metrics_jsonl"

    def build(self, run: RunInfo) -> "Jsonl | None":
        """The hook, on the first rank."""
        return Jsonl(run.job.metrics) if run.rank == 0 else None


class Jsonl:
    """Appends to metrics.jsonl; `cut` drops first what a run that goes on will report again."""

    def __init__(self, config: MetricsConfig) -> None:
        self.config = config

    def start(self, run: RunInfo) -> None:
        """Open the file."""
        self._meter = Meter(self.config, run)
        self._lines = Lines(run.folder / _FILE)

    def step(self, stats: StepStats) -> None:
        """Write the report if one is due."""
        if report := self._meter.report(stats):
            self._write(report)

    def validated(self, result: Validation) -> None:
        """Write the loss on held-out text."""
        self._write({"step": result.step, "validation_loss": result.loss})

    def end(self, outcome: Outcome) -> None:
        """Close the file."""
        self._lines.close()

    def _write(self, record: Mapping[str, float]) -> None:
        # JSON has no NaN or infinity.
        self._lines.write({key: value if math.isfinite(value) else None for key, value in record.items()})


def cut(folder: Path, step: int, validated: int) -> None:
    """Drop from metrics.jsonl what was reported after `step`, from which the run in `folder` goes on.

    Of validations, what came after step `validated`, the last one that `step` knows of (-1: none): they are
    done again.
    """
    keep_lines(
        folder / _FILE, lambda line: line["step"] <= (validated if "validation_loss" in line else step)
    )
