"""The numbers that a run reports: how often it reports them, and how they are computed from the steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from torchtitan_lite.config.problem import Remedy
from torchtitan_lite.training.hardware import peak_flops
from torchtitan_lite.training.hooks import RunInfo, StepStats
from torchtitan_lite.training.validation import Validation


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """The numbers that a run reports, and how often."""

    log_freq: Annotated[int, Field(ge=1)] = 10
    """Steps between two reports; the first and the last step are always reported."""
    enable_tensorboard: bool = True
    """Write the same numbers for TensorBoard."""
    save_tb_folder: str = "tb"
    """Folder for TensorBoard, inside the run's folder."""
    peak_flops: Annotated[float, Field(ge=0), Remedy("use 0 for the speed of the device")] = 0.0
    """FLOP per second that MFU is measured against. 0: the maker's figure if known, else a measurement."""


class Reporter:
    """Base of the hooks that report: makes records of steps and validations; a subclass writes them.

    Every `log_freq`-th step is reported, and also the first and the last step.
    """

    def __init__(self, config: MetricsConfig) -> None:
        self.config = config
        self._unreported: list[StepStats] = []

    def start(self, run: RunInfo) -> None:
        """Find the speed that MFU is measured against."""
        self.n_steps, self.flops_per_token = run.n_steps, run.flops_per_token
        peak = self.config.peak_flops or peak_flops(run.device, run.job.training.compute_dtype)
        self.peak_flops = peak * run.world_size

    def step(self, stats: StepStats) -> None:
        """Write a report if one is due."""
        self._unreported.append(stats)
        if stats.step % self.config.log_freq == 0 or stats.step in (1, self.n_steps):
            self.write(self._report())
            self._unreported.clear()

    def validated(self, result: Validation) -> None:
        """Write the loss on held-out text."""
        self.write({"step": result.step, "validation_loss": result.loss})

    def write(self, record: Mapping[str, float]) -> None:
        """Write numbers by name, `step` among them."""
        raise NotImplementedError

    def _report(self) -> dict[str, float]:
        """The numbers of the last step, and the speed since the previous report."""
        steps, last = self._unreported, self._unreported[-1]
        seconds = sum(step.seconds for step in steps)
        tokens_per_second = sum(step.n_tokens for step in steps) / seconds
        return {
            "step": last.step,
            "loss": last.loss,
            "grad_norm": last.grad_norm,
            "lr": last.lr,
            "n_tokens_seen": last.n_tokens_seen,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self.flops_per_token / self.peak_flops,
            "peak_memory_gib": last.peak_memory_gib,
            "data_wait_fraction": sum(step.data_seconds for step in steps) / seconds,
            "hooks_fraction": sum(step.hook_seconds for step in steps) / seconds,
        }
