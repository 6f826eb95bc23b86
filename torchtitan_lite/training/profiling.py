"""Traces of where a step's time goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from torchtitan_lite.config.load import Problem
from torchtitan_lite.training.outputs import is_inside

_REMEDY = 'use a name such as "profile_traces"'


@dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    """Whether and how often a trace of one step is saved."""

    enable_profiling: bool = False
    """Save traces of single steps, for https://ui.perfetto.dev or chrome://tracing."""
    save_traces_folder: str = "profile_traces"
    """Folder for the traces, inside the run's folder."""
    profile_freq: int = 10
    """Steps between two traces."""

    def problems(self, key: str) -> list[Problem]:
        """Values out of range."""
        rules = (
            ("profile_freq", self.profile_freq >= 1, "must be at least 1", "use 10 or so"),
            (
                "save_traces_folder",
                is_inside(self.save_traces_folder),
                "is not a folder of its own inside the run's",
                _REMEDY,
            ),
        )
        return [
            Problem(f"{key}.{name}", getattr(self, name), rule, fix)
            for name, ok, rule, fix in rules
            if not ok
        ]


@contextmanager
def traced(config: ProfilingConfig, folder: Path, device: torch.device, step: int) -> Iterator[None]:
    """Around the work of `step`: leaves its trace in `folder`, if one is due.

    As `step-N.json`, or `step-N-rank-R.json` for each of several ranks.
    """
    if not config.enable_profiling or step % config.profile_freq:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    # acc_events: without it some versions warn of further cycles, of which there are none here.
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        yield
    traces = folder / config.save_traces_folder
    traces.mkdir(parents=True, exist_ok=True)
    several = dist.is_initialized() and dist.get_world_size() > 1
    name = f"step-{step}-rank-{dist.get_rank()}.json" if several else f"step-{step}.json"
    profiler.export_chrome_trace(str(traces / name))
