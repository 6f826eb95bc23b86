"""Copies to a GPU that the host does not wait for."""

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`. A copy to a GPU is made from pinned memory, so that the host does not wait for it.

    From pageable memory CUDA first copies to a buffer of its own, and the host waits for this copy:
    https://docs.nvidia.com/cuda/cuda-driver-api/api-sync-behavior.html
    """
    device = torch.device(device)
    if x.is_cpu and device.type == "cuda":
        # Contiguous first: for another layout torch makes an unpinned copy.
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=True)
