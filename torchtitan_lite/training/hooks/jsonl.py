"""metrics.jsonl: one object for each report and each validation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchtitan_lite.training.hooks import Outcome, RunInfo
from torchtitan_lite.training.metrics import Reporter
from torchtitan_lite.training.outputs import Lines, keep_lines

_FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class JsonlConfig:
    """Writes metrics.jsonl, on the first rank."""

    name: Literal["metrics_jsonl"] = "metrics_jsonl"

    def build(self, run: RunInfo) -> "Jsonl | None":
        """The hook, on the first rank."""
        return Jsonl(run.job.metrics) if run.rank == 0 else None


class Jsonl(Reporter):
    """Appends to metrics.jsonl. If a run resumes, `cut` has removed the lines that will be written again."""

    def start(self, run: RunInfo) -> None:
        """Open the file."""
        super().start(run)
        self._lines = Lines(run.folder / _FILE)

    def write(self, record: Mapping[str, float]) -> None:
        """Append a line."""
        # JSON has no NaN or infinity.
        self._lines.write({key: value if math.isfinite(value) else None for key, value in record.items()})

    def end(self, outcome: Outcome) -> None:
        """Close the file."""
        self._lines.close()


def cut(folder: Path, step: int, validated: int) -> None:
    """Remove the lines of metrics.jsonl after `step`, from which the run in `folder` resumes.

    Validations are removed after the step `validated`: the step of the last validation when `step` was saved,
    or -1 if there was none. The run repeats the later validations.
    """
    keep_lines(
        folder / _FILE, lambda line: line["step"] <= (validated if "validation_loss" in line else step)
    )
