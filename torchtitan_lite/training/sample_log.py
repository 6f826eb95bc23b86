"""Which samples each step and rank had, to hold a resumed run against an uninterrupted one."""

from pathlib import Path
from typing import Self

from torchtitan_lite.training.outputs import Lines, keep_lines

_FOLDER = "sample_ids"


class SampleLog:
    """Appends to `sample_ids/rank-R.jsonl` in the run's folder, where `is_on`; leaving it closes the file."""

    def __init__(self, folder: Path, rank: int, is_on: bool) -> None:
        self._lines = None
        if is_on:
            (folder / _FOLDER).mkdir(parents=True, exist_ok=True)
            self._lines = Lines(folder / _FOLDER / f"rank-{rank}.jsonl")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, sample_ids: list[int]) -> None:
        """Record the global sample ids of this rank's micro-batches of a step."""
        if self._lines is not None:
            self._lines.write({"step": step, "sample_ids": sample_ids})

    def close(self) -> None:
        """Nothing more is recorded."""
        if self._lines is not None:
            self._lines.close()


def cut(folder: Path, step: int) -> None:
    """Drop what any rank of the run in `folder` recorded after `step`, from which it goes on."""
    for path in sorted((folder / _FOLDER).glob("rank-*.jsonl")):
        keep_lines(path, lambda line: line["step"] <= step)
