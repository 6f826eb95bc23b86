"""What the device can do, and how much of its memory the run has taken."""

import contextlib
import ctypes
import re
import resource
import sys
import time

import torch

# Dense BF16 FLOP per second, first match wins. The makers' figures, halved where they count sparsity:
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
    """FLOP per second of dense matrix products: the maker's figure where there is one, else measured here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for known, flops in _BF16_PEAK:
            if re.search(rf"\b{known}\b", name):
                return flops
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """The best of the square matrix products that fit in about `seconds`."""
    size = 8192 if device.type == "cuda" else 1024
    # Of a generator of its own: a run that goes on has just put the others where they were.
    left = torch.randn(size, size, device=device, generator=torch.Generator(device)).to(dtype)
    out = left @ left
    best, deadline = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < deadline:
        _wait_for(device)
        start = time.perf_counter()
        torch.mm(left, left, out=out)
        _wait_for(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far, in GiB: tensors on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**30 if sys.platform == "darwin" else most / 2**20  # macOS counts bytes, Linux KiB


def keep_freed_memory() -> None:
    """Have glibc keep the memory that a step frees for the next one; other C libraries do as they do.

    Else it gives much of it back to the system, which hands it out again page by page, filled with zeros:
    40,000 pages in a step of the tiny preset. mallopt(3) has the settings; 32 MiB is the most that it takes.
    """
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 << 20)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
