"""The layouts that kernels take and that torch.compile is told."""

import torch
from torch import Tensor


def unit_stride(x: Tensor) -> Tensor:
    """`x` with the features of a head as neighbours: the fused kernels read them so without a check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def are_packed(x_BSHK: Tensor) -> bool:
    """Whether each row's tokens follow those of the row before, so that all rows are one by a view."""
    return len(x_BSHK) == 1 or x_BSHK.stride(0) == x_BSHK.shape[1] * x_BSHK.stride(1)


def laid_out_like(given: Tensor, made: Tensor) -> Tensor:
    """`made` in the layout that `torch.empty_like(given)` has, which is what torch.compile is told."""
    layout = torch.empty_like(given, device="meta").stride()
    return made if made.stride() == layout else torch.empty_like(given).copy_(made)
