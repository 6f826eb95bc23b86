"""The numbers that a run reports, and the speed and memory of the device."""

import logging
import math
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from torchtitan_lite.config.problem import Remedy
from torchtitan_lite.training.hooks import RunInfo, StepStats
from torchtitan_lite.training.validation import Validation

_LOG = logging.getLogger(__name__)
_MEASURING_SHARE = 0.004
"""The most that measuring the CPU again may take of the time of the run."""
_MEASURING_SECONDS = 0.1
"""The most seconds that one of these measurements is expected to take."""
_CREDIT = 0.25
"""The seconds that measuring may take beyond its share, if a figure is above 100 %."""

# Peak dense BF16 FLOP per second, by device name. The first name that matches counts. The figures are from
# the makers, halved where they assume sparsity:
# https://www.nvidia.com/en-us/data-center/h100/    https://www.nvidia.com/en-us/data-center/h200/
# https://www.nvidia.com/en-us/data-center/a100/    https://www.nvidia.com/en-us/data-center/hgx/ (B200)
# https://www.nvidia.com/en-us/data-center/l40s/    https://www.nvidia.com/en-us/data-center/l40/
# https://www.nvidia.com/en-us/data-center/l4/
_BF16_PEAK = (
    ("B200", 2250e12),
    ("H200 NVL", 836e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
)


@dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """The numbers that a run reports, and how often."""

    log_freq: Annotated[int, Field(ge=1)] = 10
    """Steps between two reports. The first and the last step are always reported."""
    enable_tensorboard: bool = True
    """Write the numbers of metrics.jsonl for TensorBoard too."""
    save_tb_folder: str = "tb"
    """Folder for TensorBoard, inside the run's folder."""
    peak_flops: Annotated[float, Field(ge=0), Remedy("use 0 for the speed of the device")] = 0.0
    """Peak FLOP per second of one device, to compute MFU. 0: the maker's figure if known, else measured."""
    sample_tokens: Annotated[int, Field(ge=0, le=2**16), Remedy("use 0 for no sample")] = 0
    """Tokens of text that the model writes when the run is done, from its saved step. 0: no sample."""


class Reporter:
    """The base class of hooks that report: a subclass writes the records of the run's Meter.

    There is a record for every `log_freq`-th step, for the first and the last step, and for every validation.
    """

    def __init__(self, config: MetricsConfig) -> None:
        self.config = config

    def start(self, run: RunInfo) -> None:
        """Find the Meter of the run, which all reporting hooks share."""
        self.n_steps, self._meter = run.n_steps, run.meter

    def step(self, stats: StepStats) -> None:
        """Write a report if this step is due for one."""
        if record := self._meter.step(stats):
            self.write(record)

    def validated(self, result: Validation) -> None:
        """Write the loss on held-out text."""
        self.write({"step": result.step, "validation_loss": result.loss})

    def write(self, record: Mapping[str, float]) -> None:
        """Write a record of numbers by name, including `step`. NaN is a number that is not known.

        A subclass must override this method.
        """
        raise NotImplementedError


class Meter:
    """The numbers of a run's reports. All hooks that report share them, so that their numbers agree."""

    def __init__(self, run: RunInfo) -> None:
        config = run.job.metrics
        self._log_freq, self._n_steps = config.log_freq, run.n_steps
        self._flops_per_token = run.flops_per_token / run.world_size
        self._peak = Peak(run.device, run.job.training.compute_dtype, config.peak_flops)
        self._unreported: list[StepStats] = []
        self._stats: StepStats | None = None
        self._record: dict[str, float] | None = None

    def step(self, stats: StepStats) -> dict[str, float] | None:
        """Return the record of this step, or None if no report is due. Each hook calls this once per step."""
        if stats is not self._stats:
            self._stats, self._record = stats, self._take(stats)
        return self._record

    def _take(self, stats: StepStats) -> dict[str, float] | None:
        self._unreported.append(stats)
        if stats.step % self._log_freq and stats.step not in (1, self._n_steps):
            return None
        steps, self._unreported = self._unreported, []
        return self._report(steps)

    def _report(self, steps: Sequence[StepStats]) -> dict[str, float]:
        """Return the numbers of the last of `steps`, and the speed and shares over all of them."""
        last, seconds = steps[-1], sum(step.seconds for step in steps)
        tokens_per_second = sum(step.n_tokens for step in steps) / seconds
        return {
            "step": last.step,
            "loss": last.loss,
            "grad_norm": last.grad_norm,
            "lr": last.lr,
            "n_tokens_seen": last.n_tokens_seen,
            "tokens_per_second": tokens_per_second,
            "mfu": self._peak.share(tokens_per_second * self._flops_per_token),
            "peak_memory_gib": last.peak_memory_gib,
            "data_wait_fraction": sum(step.data_seconds for step in steps) / seconds,
            "hooks_fraction": sum(step.hook_seconds for step in steps) / seconds,
        }


class Peak:
    """The peak FLOP per second of one device.

    Other programs slow a measurement on a CPU. So the CPU is measured again now and then, and the best
    measurement counts.

    Args:
        given: the peak, if it is known. 0: the maker's figure, or a measurement.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, given: float = 0.0) -> None:
        self.flops = given or peak_flops(device, dtype)
        self._device, self._dtype, self._given = device, dtype, given
        self._began, self._spent = time.perf_counter(), 0.0
        self._has_warned = False

    def share(self, flops: float) -> float:
        """Return `flops`, the FLOP per second of a device, as a share of the peak. NaN: above the peak."""
        self._measure_again()
        if flops > self.flops:
            self._measure_again(credit=_CREDIT)
        if flops <= self.flops:
            return flops / self.flops
        if self._given and not self._has_warned:
            self._has_warned = True
            _LOG.warning(
                "no MFU is reported: the run computes more than metrics.peak_flops = %.3g", self._given
            )
        return math.nan

    def _measure_again(self, credit: float = 0.0) -> None:
        """Measure a CPU again, unless all measurements then take more than `credit` and their share."""
        began = time.perf_counter()
        allowed = credit + _MEASURING_SHARE * (began - self._began)
        if self._device.type == "cpu" and not self._given and self._spent + _MEASURING_SECONDS <= allowed:
            measured = measured_flops(self._device, self._dtype, _MEASURING_SECONDS / 2)
            self.flops = max(self.flops, measured)
            self._spent += time.perf_counter() - began


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP per second of dense matrix products: the maker's figure if known, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, flops in _BF16_PEAK:
            if re.search(rf"\b{known}\b", name):
                return flops
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Multiply square matrices for about `seconds`, and return the FLOP per second of the fastest product."""
    size = 8192 if device.type == "cuda" else 1024
    # A separate generator: drawing from the global generator would change the random numbers of the run.
    left = torch.randn(size, size, device=device, generator=torch.Generator(device)).to(dtype)
    out = left @ left
    best, deadline = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < deadline:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(left, left, out=out)
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory held so far, in GiB: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**30 if sys.platform == "darwin" else most / 2**20  # macOS counts bytes, Linux KiB


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
