"""The elementwise part of the loss on CUDA: two Triton kernels, each of which reads the logits once.

C rows of a chunk, V vocab (or this rank's part of it).

There are two kernels because ranks that share the vocabulary exchange maxima and sums of rows between the
first kernel and the second. A single kernel would not move fewer bytes: the rows that a GPU works on at once
do not fit its cache. `models.loss` computes the same with PyTorch alone, and tests compare the two.
"""

# Pyright takes Triton's language for Python, and Triton is not installed everywhere.
# pyright: reportMissingImports=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportReturnType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchtitan_lite.models.loss import Labels

_BLOCK = 4096
_WARPS = 8


def row_sums(logits_CV: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's maximum, its sum of exp(logit - maximum), and its label's logit (0: not here)."""
    # Separate tensors: Triton compiles again if the alignment of an argument changes.
    max_C, sum_C, label_logit_C = (logits_CV.new_empty(len(logits_CV)) for _ in range(3))
    with torch.cuda.device_of(logits_CV):
        _row_sums[(len(logits_CV),)](
            logits_CV,
            labels.row,
            labels.here,
            max_C,
            sum_C,
            label_logit_C,
            logits_CV.stride(0),
            logits_CV.shape[1],
            BLOCK=_block(logits_CV),
            num_warps=_WARPS,
        )
    return max_C, sum_C, label_logit_C


def gradient_(
    logits_CV: Tensor, labels: Labels, max_C: Tensor, total_C: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return softmax(logits) - onehot(label) in `dtype`, or 0 in rows without a label. Overwrite `logits_CV`.

    `total_C` is the sum of exp(logit - max_C). The result shares the memory of the logits, row by row.
    """
    dlogits_CV = logits_CV.view(dtype)[:, : logits_CV.shape[1]]
    with torch.cuda.device_of(logits_CV):
        _gradient[(len(logits_CV),)](
            logits_CV,
            dlogits_CV,
            labels.row,
            labels.here,
            labels.valid,
            max_C,
            total_C,
            logits_CV.stride(0),
            dlogits_CV.stride(0),
            logits_CV.shape[1],
            BLOCK=_block(logits_CV),
            num_warps=_WARPS,
        )
    return dlogits_CV


def try_on(device: torch.device) -> None:
    """Compile and launch a kernel on `device`. Raise Triton's exception if this fails."""
    logits, row = torch.zeros(1, 16, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    row_sums(logits, Labels(row, row == 0, row == 0))


def _block(logits_CV: Tensor) -> int:
    return min(triton.next_power_of_2(logits_CV.shape[1]), _BLOCK)


@triton.jit
def _row_sums(
    logits, labels, here, maxima, sums, label_logits, stride, n_columns: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    # Each lane has its own maximum and sum; they are combined at the end.
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(logits + columns, mask=columns < n_columns, other=float("-inf"))
        higher = tl.maximum(top, x)
        # 0 for a lane that has seen only -inf, because -inf - -inf is NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.exp(x - base)
        top = higher
    row_top = tl.max(top, 0)
    base = tl.where(row_top == float("-inf"), 0.0, row_top)
    tl.store(maxima + row, row_top)
    tl.store(sums + row, tl.sum(total * tl.exp(top - base), 0))
    label_logit = tl.load(logits + tl.load(labels + row), mask=tl.load(here + row), other=0.0)
    tl.store(label_logits + row, label_logit)


@triton.jit
def _gradient(
    logits,
    gradient,
    labels,
    here,
    valid,
    maxima,
    totals,
    stride,
    gradient_stride,
    n_columns: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    gradient += row * gradient_stride
    label = tl.where(tl.load(here + row), tl.load(labels + row), -1)
    is_valid, top, total = tl.load(valid + row), tl.load(maxima + row), tl.load(totals + row)
    scale = 1.0 / total
    # One stage: the loads of the next iteration must not come before the store of this one.
    for start in tl.range(0, n_columns, BLOCK, num_stages=1):
        columns = start + tl.arange(0, BLOCK)
        x = tl.exp(tl.load(logits + columns, mask=columns < n_columns, other=0.0) - top)
        x = tl.where(columns == label, x - total, x) * scale
        # All warps load, then all store: a narrower gradient overwrites logits that other warps must read.
        tl.debug_barrier()
        x = tl.where(is_valid, x, 0.0).to(gradient.dtype.element_ty)
        tl.store(gradient + columns, x, mask=columns < n_columns)
