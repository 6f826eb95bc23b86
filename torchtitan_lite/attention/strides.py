"""Memory layouts: those that kernels accept, and those that operators promise to torch.compile."""

import torch
from torch import Tensor


def unit_stride(x: Tensor) -> Tensor:
    """`x` with stride 1 in its last dim, copied if necessary: the fused kernels assume it without a check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def are_packed(x_BSHK: Tensor) -> bool:
    """True if each row starts where the row before it ends, so that a view can join all rows."""
    return len(x_BSHK) == 1 or x_BSHK.stride(0) == x_BSHK.shape[1] * x_BSHK.stride(1)


def laid_out_like(given: Tensor, made: Tensor) -> Tensor:
    """`made` with the strides of `torch.empty_like(given)`, as torch.compile expects; copied if necessary."""
    layout = torch.empty_like(given, device="meta").stride()
    return made if made.stride() == layout else torch.empty_like(given).copy_(made)
