"""metrics.jsonl, in a new run and in a resumed run."""

import json
import os
from pathlib import Path

import pytest
from hook_cases import DONE, job_with, json_lines, run_info, started, stats, validation

from torchtitan_lite.training.hooks.jsonl import JsonlConfig, cut
from torchtitan_lite.training.metrics import MetricsConfig

JOB = job_with(metrics=MetricsConfig(log_freq=1, peak_flops=6e6))


def test_each_report_and_each_validation_is_a_line(tmp_path: Path) -> None:
    hooks = started(JsonlConfig(), run_info(folder=tmp_path, job=JOB))
    for step in (1, 2):
        hooks.step(stats(step))
    hooks.validated(validation(2, 3.5))
    hooks.end(DONE)
    first, second, validated = json_lines(tmp_path / "metrics.jsonl")
    assert list(first) == [
        *("step", "loss", "grad_norm", "lr", "n_tokens_seen", "tokens_per_second", "mfu"),
        *("peak_memory_gib", "data_wait_fraction", "hooks_fraction"),
    ]
    assert (first["step"], second["step"]) == (1, 2)
    assert validated == {"step": 2, "validation_loss": 3.5}


def test_a_loss_of_nan_is_null(tmp_path: Path) -> None:
    hooks = started(JsonlConfig(), run_info(folder=tmp_path, job=JOB))
    hooks.validated(validation(1, float("nan")))
    hooks.end(DONE)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "validation_loss": null}\n'


def test_other_ranks_write_nothing() -> None:
    assert JsonlConfig().build(run_info(rank=1)) is None


@pytest.mark.parametrize(("validated", "left"), [(-1, []), (0, [0]), (2, [0, 2]), (3, [0, 2, 3])])
def test_a_cut_removes_the_validations_that_are_repeated(
    tmp_path: Path, validated: int, left: list[int]
) -> None:
    for step in range(5):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": {step}, "loss": 1.0}}\n')
            file.write(f'{{"step": {step}, "validation_loss": null}}\n' if step != 1 else "")
    cut(tmp_path, 3, validated)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_loss" in line] == left
    assert [line["step"] for line in lines if "loss" in line] == [0, 1, 2, 3]


def test_a_complete_last_line_stays_also_without_a_newline(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    cut(tmp_path, 2, -1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_cut_that_fails_leaves_the_file_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError("the disk is full")

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        cut(tmp_path, 1, -1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_without_a_file_a_cut_does_nothing(tmp_path: Path) -> None:
    cut(tmp_path, 3, 3)
    cut(tmp_path / "nowhere", 3, 3)
    assert list(tmp_path.iterdir()) == []
