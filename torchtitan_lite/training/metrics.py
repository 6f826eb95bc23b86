"""The numbers that a run reports, and the speed and memory of the device."""

import re
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import torch
from pydantic import Field

from torchtitan_lite.config.problem import Remedy
from torchtitan_lite.training.hooks import RunInfo, StepStats
from torchtitan_lite.training.validation import Validation

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


class Reporter:
    """The base class of hooks that report. It makes records, which a subclass writes.

    There is a record for every `log_freq`-th step, for the first and the last step, and for every validation.
    """

    def __init__(self, config: MetricsConfig) -> None:
        self.config = config
        self._unreported: list[StepStats] = []

    def start(self, run: RunInfo) -> None:
        """Find the peak FLOP per second of all devices, to compute MFU."""
        self.n_steps, self.flops_per_token = run.n_steps, run.flops_per_token
        peak = self.config.peak_flops or peak_flops(run.device, run.job.training.compute_dtype)
        self.peak_flops = peak * run.world_size

    def step(self, stats: StepStats) -> None:
        """Write a report if this step is due for one."""
        self._unreported.append(stats)
        if stats.step % self.config.log_freq == 0 or stats.step in (1, self.n_steps):
            self.write(self._report())
            self._unreported.clear()

    def validated(self, result: Validation) -> None:
        """Write the loss on held-out text."""
        self.write({"step": result.step, "validation_loss": result.loss})

    def write(self, record: Mapping[str, float]) -> None:
        """Write a record of numbers by name, including `step`. A subclass must override this method."""
        raise NotImplementedError

    def _report(self) -> dict[str, float]:
        """Return the numbers of the most recent step, and the speed and shares since the previous report."""
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


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP per second of dense matrix products: the maker's figure if known, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, flops in _BF16_PEAK:
            if re.search(rf"\b{known}\b", name):
                return flops
    return measured_flops(device, dtype)


@cache  # a measurement takes a tenth of a second, and every hook that reports needs it
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
