"""The log of sample ids: it shows that a resumed run reads the same data as an uninterrupted run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchtitan_lite.training.hooks import Outcome, RunInfo, StepStats
from torchtitan_lite.training.outputs import Lines, keep_lines

_FOLDER = "sample_ids"


@dataclass(frozen=True, kw_only=True)
class SampleLogConfig:
    """Writes the sample log, on every rank, if `debug.log_sample_ids` is set."""

    name: Literal["samples"] = "samples"

    def build(self, run: RunInfo) -> "SampleLog | None":
        """The hook, on every rank."""
        return SampleLog() if run.job.debug.log_sample_ids else None


class SampleLog:
    """Appends to `sample_ids/rank-R.jsonl` in the run's folder."""

    def start(self, run: RunInfo) -> None:
        """Open the file of this rank."""
        (run.folder / _FOLDER).mkdir(parents=True, exist_ok=True)
        self._lines = Lines(run.folder / _FOLDER / f"rank-{run.rank}.jsonl")

    def step(self, stats: StepStats) -> None:
        """Append the global ids of the samples that this rank read."""
        self._lines.write({"step": stats.step, "sample_ids": list(stats.sample_ids)})

    def end(self, outcome: Outcome) -> None:
        """Close the file."""
        self._lines.close()


def cut(folder: Path, step: int) -> None:
    """Remove the lines of all ranks after `step`, from which the run in `folder` resumes."""
    for path in sorted((folder / _FOLDER).glob("rank-*.jsonl")):
        keep_lines(path, lambda line: line["step"] <= step)
