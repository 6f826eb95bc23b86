"""The hooks that write files of JSON lines: metrics.jsonl, and the log of sample ids.

The log of sample ids shows that a resumed run reads the same data as an uninterrupted run.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchtitan_lite.training.hooks import Outcome, RunInfo, StepStats
from torchtitan_lite.training.metrics import Reporter
from torchtitan_lite.training.outputs import Lines, keep_lines

_METRICS = "metrics.jsonl"
_SAMPLES = "sample_ids"


@dataclass(frozen=True, kw_only=True)
class JsonlConfig:
    """The config of the hook that writes metrics.jsonl. Only the first rank builds the hook."""

    name: Literal["metrics_jsonl"] = "metrics_jsonl"

    def build(self, run: RunInfo) -> "Jsonl | None":
        return Jsonl(run.job.metrics) if run.rank == 0 else None


class Jsonl(Reporter):
    """A hook that appends a JSON object to metrics.jsonl for each report and each validation.

    `time` in each object is the time when the line was written, in seconds since 1970 (UTC).
    """

    def start(self, run: RunInfo) -> None:
        super().start(run)
        self._lines = Lines(run.folder / _METRICS)

    def write(self, record: Mapping[str, float]) -> None:
        # JSON has no NaN or infinity.
        numbers = {key: value if math.isfinite(value) else None for key, value in record.items()}
        self._lines.write({"step": record["step"], "time": round(time.time(), 3), **numbers})

    def end(self, outcome: Outcome) -> None:
        self._lines.close()


@dataclass(frozen=True, kw_only=True)
class SampleLogConfig:
    """The config of the hook that logs sample ids on every rank, if `debug.log_sample_ids` is set."""

    name: Literal["samples"] = "samples"

    def build(self, run: RunInfo) -> "SampleLog | None":
        return SampleLog() if run.job.debug.log_sample_ids else None


class SampleLog:
    """A hook that appends to `sample_ids/rank-R.jsonl` the global ids of the samples of each step."""

    def start(self, run: RunInfo) -> None:
        (run.folder / _SAMPLES).mkdir(parents=True, exist_ok=True)
        self._lines = Lines(run.folder / _SAMPLES / f"rank-{run.rank}.jsonl")

    def step(self, stats: StepStats) -> None:
        self._lines.write({"step": stats.step, "sample_ids": list(stats.sample_ids)})

    def end(self, outcome: Outcome) -> None:
        self._lines.close()


def cut(folder: Path, step: int, validated: int) -> None:
    """Remove the lines that a run in `folder` writes again when it resumes from `step`, for all ranks.

    Lines of steps after `step` are removed. Validations are removed if they are later than the step
    `validated`, which is the last validation before `step` was saved, or -1 if there was none.
    """
    for path in (folder / _METRICS, *sorted((folder / _SAMPLES).glob("rank-*.jsonl"))):
        keep_lines(path, lambda line: line["step"] <= (validated if "validation_loss" in line else step))
