"""Speed and memory of the device."""

import re
import resource
import sys
import time
from functools import cache

import torch

# Dense BF16 FLOP per second; the first match counts. The figures are from the makers, halved if they assume
# sparsity:
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


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of dense matrix products: the maker's figure if it is known, else measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, flops in _BF16_PEAK:
            if re.search(rf"\b{known}\b", name):
                return flops
    return measured_flops(device, dtype)


@cache  # a measurement takes a tenth of a second, and every hook that reports needs it
def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP per second of the fastest square matrix product among those that fit in about `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    # A generator of its own: the state of the global one belongs to the run.
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
    """The most memory held so far, in GiB: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**30 if sys.platform == "darwin" else most / 2**20  # macOS counts bytes, Linux KiB


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
