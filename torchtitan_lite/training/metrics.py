"""The numbers that a run reports: how often, and how they are made from the steps."""

from dataclasses import dataclass
from functools import cache
from typing import Annotated

from pydantic import Field

from torchtitan_lite.training.hardware import peak_flops
from torchtitan_lite.training.hooks import RunInfo, StepStats

# A measurement takes a tenth of a second: one serves all reports.
_peak_flops = cache(peak_flops)


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is reported, and how often."""

    log_freq: Annotated[int, Field(ge=1)] = 10
    """Steps between two reports; the first and the last step are always reported."""
    enable_tensorboard: bool = True
    """Write the same numbers for TensorBoard."""
    save_tb_folder: str = "tb"
    """Folder for TensorBoard, inside the run's folder."""
    peak_flops: Annotated[float, Field(ge=0)] = 0.0
    """FLOP per second that MFU is measured against. 0: what the device's maker states, else a measurement."""


class Meter:
    """Makes a report of every `log_freq`-th step, and of the first and the last one."""

    def __init__(self, config: MetricsConfig, run: RunInfo) -> None:
        self.log_freq, self.n_steps = config.log_freq, run.n_steps
        self.flops_per_token = run.flops_per_token
        peak = config.peak_flops or _peak_flops(run.device, run.job.training.compute_dtype)
        self.peak_flops = peak * run.world_size
        self._since_report: list[tuple[int, float, float, float]] = []
        """Tokens and seconds of each step: all, those of waiting for data, those of hooks."""

    def report(self, stats: StepStats) -> dict[str, float] | None:
        """Count a step; its report if one is due, with the speed since the report before."""
        parts = (stats.n_tokens, stats.seconds, stats.data_seconds, stats.hook_seconds)
        self._since_report.append(parts)
        if stats.step % self.log_freq and stats.step not in (1, self.n_steps):
            return None
        n_tokens, seconds, data_seconds, hook_seconds = map(sum, zip(*self._since_report, strict=True))
        self._since_report.clear()
        tokens_per_second = n_tokens / seconds
        return {
            "step": stats.step,
            "loss": stats.loss,
            "grad_norm": stats.grad_norm,
            "lr": stats.lr,
            "n_tokens_seen": stats.n_tokens_seen,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self.flops_per_token / self.peak_flops,
            "peak_memory_gib": stats.peak_memory_gib,
            "data_wait_fraction": data_seconds / seconds,
            "hooks_fraction": hook_seconds / seconds,
        }
