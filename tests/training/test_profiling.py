"""Traces of single steps."""

import json
from pathlib import Path

import pytest
import torch

from torchtitan_lite.training.profiling import ProfilingConfig, traced

CPU = torch.device("cpu")


def trace(folder: Path, config: ProfilingConfig, steps: int) -> None:
    for step in range(1, steps + 1):
        with traced(config, folder, CPU, step):
            torch.ones(step).cumsum(0)


@pytest.mark.parametrize(("freq", "traced"), [(1, [1, 2, 3, 4, 5, 6, 7]), (2, [2, 4, 6]), (6, [6]), (8, [])])
def test_every_freqth_step_is_traced_and_no_other(tmp_path: Path, freq: int, traced: list[int]) -> None:
    trace(tmp_path, ProfilingConfig(enable_profiling=True, profile_freq=freq), steps=7)
    found = {int(path.stem.removeprefix("step-")): path for path in tmp_path.glob("profile_traces/*")}
    assert sorted(found) == traced
    for step, path in found.items():
        events = json.loads(path.read_text())["traceEvents"]
        sums = [event for event in events if event.get("name") == "aten::cumsum"]
        assert [event["args"]["Input Dims"][0] for event in sums] == [[step]]


def test_without_profiling_nothing_is_written(tmp_path: Path) -> None:
    trace(tmp_path, ProfilingConfig(), steps=20)
    assert list(tmp_path.iterdir()) == []


def test_a_frequency_below_one_is_a_problem() -> None:
    (problem,) = ProfilingConfig(profile_freq=0).problems("profiling")
    assert problem.key == "profiling.profile_freq"
