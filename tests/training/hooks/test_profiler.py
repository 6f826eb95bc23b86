"""Traces of single steps."""

import json
from pathlib import Path

import pytest
import torch
from hook_cases import DONE, job_with, run_info, started, stats, validation

from torchtitan_lite.training.hooks.profiler import ProfilerConfig, ProfilingConfig


def trace(folder: Path, config: ProfilingConfig, steps: int, last: int = 0, rank: int = 0) -> None:
    """Run `steps` steps of a run of `last` (0: of `steps`), with a validation and a save after each."""
    job = job_with(profiling=config)
    run = run_info(folder=folder, n_steps=last or steps, rank=rank, world_size=rank + 1, job=job)
    hooks = started(ProfilerConfig(), run)
    for step in range(1, steps + 1):
        torch.ones(step).cumsum(0)
        hooks.step(stats(step))
        torch.ones(step).cumprod(0)
        hooks.validated(validation(step, 1.0))
        torch.ones(step).cumprod(0)
        hooks.saved(step)
    hooks.end(DONE)


@pytest.mark.parametrize(("freq", "traced"), [(1, [1, 2, 3, 4, 5, 6, 7]), (2, [2, 4, 6]), (6, [6]), (8, [])])
def test_every_freqth_step_is_traced_and_no_other(tmp_path: Path, freq: int, traced: list[int]) -> None:
    trace(tmp_path, ProfilingConfig(enable_profiling=True, profile_freq=freq), steps=7)
    found = {int(path.stem.removeprefix("step-")): path for path in tmp_path.glob("profile_traces/*")}
    assert sorted(found) == traced
    for step, path in found.items():
        events = json.loads(path.read_text())["traceEvents"]
        sums = [event for event in events if event.get("name") == "aten::cumsum"]
        assert [event["args"]["Input Dims"][0] for event in sums] == [[step]]
        assert not any(event.get("name") == "aten::cumprod" for event in events)


def test_a_run_that_stops_before_a_traced_step_leaves_no_trace_of_it(tmp_path: Path) -> None:
    config = ProfilingConfig(enable_profiling=True, profile_freq=2)
    trace(tmp_path, config, steps=3, last=8)
    assert [path.name for path in tmp_path.glob("profile_traces/*")] == ["step-2.json"]


def test_each_of_several_ranks_has_a_file(tmp_path: Path) -> None:
    trace(tmp_path, ProfilingConfig(enable_profiling=True, profile_freq=1), steps=1, rank=1)
    assert [path.name for path in tmp_path.glob("profile_traces/*")] == ["step-1-rank-1.json"]


def test_without_profiling_there_is_no_hook() -> None:
    assert ProfilerConfig().build(run_info()) is None
