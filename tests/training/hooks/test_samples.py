"""The log of the samples of each step and rank."""

import json
from pathlib import Path

from hook_cases import DONE, job_with, run_info, started, stats

from torchtitan_lite.training.hooks.samples import SampleLogConfig, cut
from torchtitan_lite.training.process import DebugConfig

LOGGED = job_with(debug=DebugConfig(log_sample_ids=True))


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
    cut(tmp_path, 3)
    write(tmp_path, 0, 4, 6, [7])
    assert steps(tmp_path, 0) == [(1, [0]), (2, [0]), (3, [0]), (4, [7]), (5, [7]), (6, [7])]
    assert steps(tmp_path, 1) == [(1, [1]), (2, [1]), (3, [1])]
    assert len(list((tmp_path / "sample_ids").iterdir())) == 2


def test_without_a_log_a_cut_does_nothing(tmp_path: Path) -> None:
    cut(tmp_path, 3)
    cut(tmp_path / "nowhere", 3)
    assert list(tmp_path.iterdir()) == []
