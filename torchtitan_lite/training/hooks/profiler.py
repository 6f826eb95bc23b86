"""Traces of where a step's time goes."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from torchtitan_lite.training.hooks import Outcome, RunInfo, StepStats
from torchtitan_lite.training.validation import Validation


@dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    """Whether and how often a trace of one step is saved."""

    enable_profiling: bool = False
    """Save traces of single steps, for https://ui.perfetto.dev or chrome://tracing."""
    save_traces_folder: str = "profile_traces"
    """Folder for the traces, inside the run's folder."""
    profile_freq: Annotated[int, Field(ge=1)] = 10
    """Steps between two traces."""


@dataclass(frozen=True, kw_only=True)
class ProfilerConfig:
    """The traces of every rank, if they are asked for."""

    name: Literal["profiler"] = "profiler"

    def build(self, run: RunInfo) -> "Profiler | None":
        """The hook, on every rank."""
        return Profiler(run.job.profiling, run) if run.job.profiling.enable_profiling else None


class Profiler:
    """Saves a trace of every `profile_freq`-th step.

    As `step-N.json`, or `step-N-rank-R.json` for each of several ranks.
    """

    def __init__(self, config: ProfilingConfig, run: RunInfo) -> None:
        self.config, self.run = config, run
        self._step = 0
        """The step that the next trace would be of."""
        self._profiler: torch.profiler.profile | None = None

    def start(self, run: RunInfo) -> None:
        """Trace the first step if its trace is due."""
        self._begin(run.first_step)

    def step(self, stats: StepStats) -> None:
        """Save the trace of this step, and begin that of the next one."""
        if self._profiler is not None:
            self._profiler.stop()
            self._save(self._profiler, stats.step)
        self._begin(stats.step + 1)

    def validated(self, result: Validation) -> None:
        """Leave the validation out of the trace of the next step."""
        self._begin_again()

    def saved(self, step: int) -> None:
        """Leave the save out of the trace of the next step."""
        self._begin_again()

    def end(self, outcome: Outcome) -> None:
        """Drop the trace of a step that does not come."""
        if self._profiler is not None:
            self._profiler.stop()

    def _begin(self, step: int) -> None:
        self._step, self._profiler = step, None
        if step > self.run.n_steps or step % self.config.profile_freq:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.run.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        # acc_events: without it some versions warn of further cycles, of which there are none here.
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True)
        self._profiler.start()

    def _begin_again(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._begin(self._step)

    def _save(self, profiler: torch.profiler.profile, step: int) -> None:
        folder = self.run.folder / self.config.save_traces_folder
        folder.mkdir(parents=True, exist_ok=True)
        several = self.run.world_size > 1
        name = f"step-{step}-rank-{self.run.rank}.json" if several else f"step-{step}.json"
        profiler.export_chrome_trace(str(folder / name))
