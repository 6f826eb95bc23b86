"""metrics.jsonl and the log of sample ids, in a new run and in a resumed run."""

import json
import os
import time
from pathlib import Path

import pytest
from hook_cases import DONE, job_with, json_lines, run_info, started, stats, validation

from torchtitan_lite.training.config import DebugConfig
from torchtitan_lite.training.hooks.jsonl import JsonlConfig, SampleLogConfig, cut
from torchtitan_lite.training.metrics import MetricsConfig

JOB = job_with(metrics=MetricsConfig(log_freq=1, peak_flops=6e6))
LOGGED = job_with(debug=DebugConfig(log_sample_ids=True))


def test_each_report_and_each_validation_is_a_line_with_its_time(tmp_path: Path) -> None:
    began = time.time()
    hooks = started(JsonlConfig(), run_info(folder=tmp_path, job=JOB))
    for step in (1, 2):
        hooks.step(stats(step))
    hooks.validated(validation(2, 3.5))
    hooks.end(DONE)
    first, second, validated = json_lines(tmp_path / "metrics.jsonl")
    assert list(first) == [
        *("step", "time", "loss", "grad_norm", "lr", "n_tokens_seen", "tokens_per_second", "mfu"),
        *("peak_memory_gib", "data_wait_fraction", "hooks_fraction"),
    ]
    assert (first["step"], second["step"]) == (1, 2)
    times = [line.pop("time") for line in (first, second, validated)]
    assert began - 1 < times[0] <= times[1] <= times[2] < time.time() + 1
    assert validated == {"step": 2, "validation_loss": 3.5}


def test_a_loss_of_nan_is_null(tmp_path: Path) -> None:
    hooks = started(JsonlConfig(), run_info(folder=tmp_path, job=JOB))
    hooks.validated(validation(1, float("nan")))
    hooks.end(DONE)
    assert (tmp_path / "metrics.jsonl").read_text().endswith('"validation_loss": null}\n')


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


def steps(folder: Path, rank: int) -> list[tuple[int, list[int]]]:
    lines = (folder / "sample_ids" / f"rank-{rank}.jsonl").read_text().splitlines()
    return [(record["step"], record["sample_ids"]) for record in map(json.loads, lines)]


def write(folder: Path, rank: int, first: int, last: int, ids: list[int]) -> None:
    hooks = started(SampleLogConfig(), run_info(folder=folder, rank=rank, job=LOGGED))
    for step in range(first, last + 1):
        hooks.step(stats(step, sample_ids=ids))
    hooks.end(DONE)


def test_each_step_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    hooks = started(SampleLogConfig(), run_info(folder=tmp_path, rank=3, job=LOGGED))
    hooks.step(stats(1, sample_ids=[4, 5]))
    hooks.step(stats(2, sample_ids=[9, 8]))
    assert steps(tmp_path, 3) == [(1, [4, 5]), (2, [9, 8])]
    hooks.end(DONE)


def test_the_log_is_written_only_on_request() -> None:
    assert SampleLogConfig().build(run_info()) is None


def test_a_run_resumed_on_fewer_ranks_logs_each_step_once(tmp_path: Path) -> None:
    for rank in range(2):
        write(tmp_path, rank, 1, 5, [rank])
    with (tmp_path / "sample_ids" / "rank-1.jsonl").open("a") as file:
        file.write('{"step": 6, "sample_i')
    cut(tmp_path, 3, -1)
    write(tmp_path, 0, 4, 6, [7])
    assert steps(tmp_path, 0) == [(1, [0]), (2, [0]), (3, [0]), (4, [7]), (5, [7]), (6, [7])]
    assert steps(tmp_path, 1) == [(1, [1]), (2, [1]), (3, [1])]
    assert len(list((tmp_path / "sample_ids").iterdir())) == 2
