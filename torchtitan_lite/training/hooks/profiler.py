"""The hook that saves traces of single steps, which show where the time goes."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from torchtitan_lite.training.hooks import Outcome, RunInfo, StepStats
from torchtitan_lite.training.validation import Validation


@dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    """The settings of profiling: whether and how often to save a trace of one step."""

    enable_profiling: bool = False
    """Save traces of single steps, for https://ui.perfetto.dev or chrome://tracing."""
    save_traces_folder: str = "profile_traces"
    """Folder for the traces, inside the run's folder."""
    profile_freq: Annotated[int, Field(ge=1)] = 10
    """Steps between two traces."""


@dataclass(frozen=True, kw_only=True)
class ProfilerConfig:
    """The config of the hook that traces steps on every rank, if `profiling.enable_profiling` is set."""

    name: Literal["profiler"] = "profiler"

    def build(self, run: RunInfo) -> "Profiler | None":
        return Profiler(run.job.profiling) if run.job.profiling.enable_profiling else None


class Profiler:
    """A hook that saves a trace of every `profile_freq`-th step.

    The file is `step-N.json`, or `step-N-rank-R.json` if there are several ranks.
    """

    def __init__(self, config: ProfilingConfig) -> None:
        self.config = config
        self._profiler: torch.profiler.profile | None = None

    def start(self, run: RunInfo) -> None:
        """Begin the trace of the first step, if that step is due for a trace."""
        self.run = run
        self._begin(run.first_step)

    def step(self, stats: StepStats) -> None:
        """Save the trace of this step, if there is one. Begin the trace of the next step, if it is due."""
        if profiler := self._stop():
            folder = self.run.folder / self.config.save_traces_folder
            folder.mkdir(parents=True, exist_ok=True)
            suffix = f"-rank-{self.run.rank}" if self.run.world_size > 1 else ""
            profiler.export_chrome_trace(str(folder / f"step-{stats.step}{suffix}.json"))
        self._begin(stats.step + 1)

    def validated(self, result: Validation) -> None:
        """Restart the trace of the next step, so that it does not contain the validation."""
        self._begin_again()

    def saved(self, step: int) -> None:
        """Restart the trace of the next step, so that it does not contain the save."""
        self._begin_again()

    def end(self, outcome: Outcome) -> None:
        """Drop an unfinished trace."""
        self._stop()

    def _begin(self, step: int) -> None:
        if step <= self.run.n_steps and step % self.config.profile_freq == 0:
            self._begin_trace()

    def _begin_trace(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.run.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        # acc_events: without it some versions of torch warn about several cycles. This profiler has only one.
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True)
        self._profiler.start()

    def _begin_again(self) -> None:
        if self._stop():
            self._begin_trace()

    def _stop(self) -> torch.profiler.profile | None:
        """Stop the current trace and return it, or None if there is no trace."""
        profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
        return profiler
