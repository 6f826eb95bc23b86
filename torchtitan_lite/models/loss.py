"""Output projection and cross-entropy in one function, chunk by chunk, so that few logits exist at once.

B batch, S sequence, N = B * S rows, C rows of a chunk, D model dim, V vocab, T columns of a tile of V.

    for each chunk of rows:
        logits_CV   = x_CD @ weight_VD^T                the one buffer, which every chunk overwrites
        loss       += log(sum(exp(logits))) - logits[label]
        logits_CV   = softmax(logits) - onehot(label)   its gradient, in the same buffer
        dx_CD       = logits_CV @ weight_VD
        dweight_VD += logits_CV^T @ x_CD

The forward pass computes the gradients, while it has the logits. The backward pass only scales them.

On CUDA the two lines between the products are the kernels of `models.loss_kernels`. They write the gradient
in the dtype of the products that follow. Half-precision products are added to float32 without a copy.
"""

import logging
from collections.abc import Iterator
from functools import cache, partial
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE = -100
"""The label of a token that has nothing to predict."""

_TILE_COLUMNS = 8192
_ALIGNED_COLUMNS = 16
"""The alignment, in elements, of the rows of the logits on CUDA. Products of unaligned rows are slow."""
_LITTLE_BYTES = 8 << 20
"""The memory that a chunk may always take. It fits a processor's cache."""
_LOG = logging.getLogger(__name__)


class Vocabulary:
    """The part of the vocabulary that this process holds. In this class it is the whole vocabulary.

    A class for a smaller part exchanges maxima and sums with the processes that hold the other parts.
    """

    n_parts = 1
    """The number of equal parts that the vocabulary is split into."""

    def rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return a row of the weight for each label, and whether this part of the vocabulary has the label.

        If this part does not have the label, the row is arbitrary.
        """
        here = labels != IGNORE
        return torch.where(here, labels, 0), here

    def max(self, x: Tensor) -> Tensor:
        """Return the maximum of `x` over all parts. `x` may be overwritten."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over all parts. `x` may be overwritten."""
        return x


class Labels(NamedTuple):
    """The labels of tokens, as rows of one part of the vocabulary."""

    row: Tensor
    """Each label's row of the weight. It is arbitrary where `here` is False."""
    here: Tensor
    """True where this part of the vocabulary has the row."""
    valid: Tensor
    """True where the token has a label."""

    @classmethod
    def of(cls, labels_N: Tensor, vocabulary: Vocabulary, n_weights: int) -> "Labels":
        is_valid_N = labels_N != IGNORE
        # The kernels do not check bounds. A part would take an unknown label for a label of another part.
        if labels_N.is_cuda or vocabulary.n_parts > 1:
            is_known_N = (labels_N >= 0) & (labels_N < n_weights * vocabulary.n_parts)
            torch._assert_async((is_known_N | ~is_valid_N).all(), "a label is out of bounds")  # pyright: ignore[reportPrivateImportUsage]
        return cls(*vocabulary.rows(labels_N), is_valid_N)

    def part(self, rows: slice) -> "Labels":
        return Labels(*(each[rows] for each in self))


def linear_cross_entropy(
    x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, vocabulary: Vocabulary | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sum of -log softmax(x @ weight^T)[label], and the number of labels that are not IGNORE.

    The sum is over these labels, a scalar in nats. The number is int64. The products are computed in the
    dtype of `x_BSD`, all else in float32 (float64 if `x_BSD` is float64). Memory beyond the two gradients:
    one chunk of logits, and on CUDA a copy of the weight if its dtype is not that of `x_BSD`.

    If `weight_VD` is a part of the `vocabulary`, the gradient of `x_BSD` must be summed over the parts.
    """
    x_ND, labels_N = x_BSD.flatten(0, -2), labels_BS.flatten()
    args = x_ND, weight_VD, labels_N, vocabulary or Vocabulary(), torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(*args), (labels_N != IGNORE).sum()


def reference_cross_entropy(x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `linear_cross_entropy` returns, from all logits at once. For tests and benchmarks."""
    logits_BSV = F.linear(x_BSD, weight_VD.to(x_BSD.dtype)).to(_sum_dtype(x_BSD))
    logits_NV, labels_N = logits_BSV.flatten(0, -2), labels_BS.flatten()
    loss = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum")
    return loss, (labels_N != IGNORE).sum()


def chunk_rows(n_rows: int, n_columns: int, x: Tensor) -> int:
    """Return the number of rows of a chunk, for `n_rows` rows like `x` and a vocabulary of `n_columns`.

    On a GPU a chunk has 2048 rows, so that the weight and its gradient are seldom read and written. This
    matters less on a CPU. There a chunk takes a sixteenth of the memory of all logits in the dtype of `x`,
    but has between 16 and 2048 rows. On any device a chunk has more rows if they fit _LITTLE_BYTES.
    docs/models.md has measurements.
    """
    itemsize = _sum_dtype(x).itemsize
    sixteenth = n_rows * x.dtype.itemsize // (16 * itemsize)
    rows = min(max(sixteenth, 16), 2048) if x.device.type == "cpu" else 2048
    return min(max(rows, _LITTLE_BYTES // (itemsize * n_columns)), n_rows)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        vocabulary: Vocabulary,
        is_grad_enabled: bool,
    ) -> Tensor:
        n_rows, sum_dtype = len(x_ND), _sum_dtype(x_ND)
        rows = chunk_rows(n_rows, len(weight_VD), x_ND)
        kernels = _kernels(x_ND.device, sum_dtype)
        cross_entropy_ = _cross_entropy_ if kernels is None else partial(_fused_cross_entropy_, kernels)
        loss = x_ND.new_zeros((), dtype=sum_dtype)
        needs_dx, needs_dweight = (is_grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        dx_ND = torch.empty_like(x_ND) if needs_dx else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=sum_dtype) if needs_dweight else None
        buffer_CV = _buffer(rows, len(weight_VD), x_ND)
        ctx.weight_dtype, weight_VD = weight_VD.dtype, _cast_once(weight_VD, x_ND, buffer_CV.nbytes)
        labels = Labels.of(labels_N, vocabulary, len(weight_VD))
        gradient = x_ND.dtype if needs_dx or needs_dweight else None
        for start in range(0, n_rows, max(rows, 1)):
            chunk = slice(start, min(start + rows, n_rows))
            logits_CV = buffer_CV[: chunk.stop - start]
            _project(x_ND[chunk], weight_VD, logits_CV)
            loss_of_chunk, dlogits_CV = cross_entropy_(logits_CV, labels.part(chunk), gradient, vocabulary)
            loss += loss_of_chunk
            if gradient is not None:
                dx_CD = None if dx_ND is None else dx_ND[chunk]
                _project_back(dlogits_CV, x_ND[chunk], weight_VD, dx_CD, dweight_VD)
        ctx.save_for_backward(dx_ND, dweight_VD)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # The gradient is given away unless the graph is kept: it is scaled in place and becomes `.grad`.
        scale = torch.mul if torch._C._autograd._get_current_graph_task_keep_graph() else Tensor.mul_  # pyright: ignore[reportAttributeAccessIssue]
        dx_ND, dweight_VD = (None if each is None else scale(each, dloss) for each in ctx.saved_tensors)
        return dx_ND, None if dweight_VD is None else dweight_VD.to(ctx.weight_dtype), None, None, None


def _cross_entropy_(
    logits_CV: Tensor, labels: Labels, gradient: torch.dtype | None, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """Return the sum of a chunk's losses and, unless `gradient` is None, the gradient of the logits.

    The gradient overwrites the logits and has their dtype. This is the reference for `_fused_cross_entropy_`.
    """
    label_C1, here_C1, valid_C1 = (each[:, None] for each in labels)
    logits_CV -= vocabulary.max(logits_CV.amax(dim=1))[:, None]
    label_logit_C1 = torch.where(here_C1, logits_CV.gather(1, label_C1), 0)
    # The same layout as in `_fused_cross_entropy_`: the ranks of a vocabulary need not use the same function.
    sums_2C = torch.stack([logits_CV.exp_().sum(dim=1), label_logit_C1[:, 0]])
    total_C1, label_logit_C1 = (each[:, None] for each in vocabulary.sum(sums_2C))
    if gradient is not None:
        logits_CV.scatter_add_(1, label_C1, torch.where(here_C1, -total_C1, 0))
        logits_CV *= valid_C1 / total_C1
    return torch.where(valid_C1, total_C1.log() - label_logit_C1, 0).sum(), logits_CV


def _fused_cross_entropy_(
    kernels: Any, logits_CV: Tensor, labels: Labels, gradient: torch.dtype | None, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """Do what `_cross_entropy_` does, with Triton kernels. The gradient has the dtype `gradient`."""
    max_C, total_C, label_logit_C = kernels.row_sums(logits_CV, labels)
    if vocabulary.n_parts > 1:
        own_max_C, max_C = max_C, vocabulary.max(max_C.clone())
        total_C *= (own_max_C - max_C).exp()
        sums_2C = torch.stack([total_C, torch.where(labels.here, label_logit_C - max_C, 0)])
        total_C, label_logit_C = vocabulary.sum(sums_2C)
    else:
        label_logit_C -= max_C
    loss = torch.where(labels.valid, total_C.log() - label_logit_C, 0).sum()
    if gradient is None:
        return loss, logits_CV
    return loss, kernels.gradient_(logits_CV, labels, max_C, total_C, gradient)


@cache
def _kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Return the module `models.loss_kernels`, or None if its kernels do not support the device or the dtype.

    Also returns None, with a warning, if Triton fails.
    """
    if device.type != "cuda" or dtype != torch.float32:
        return None
    try:
        from torchtitan_lite.models import loss_kernels

        # Triton needs a C compiler and Python's headers too; only a launch shows whether they are there.
        loss_kernels.try_on(device)
    except Exception as error:  # noqa: BLE001 (whatever Triton raises, torch's own kernels do the same work)
        _LOG.warning("the loss is left to PyTorch's own kernels: %s: %s", type(error).__name__, error)
        return None
    return loss_kernels


def _buffer(rows: int, columns: int, x: Tensor) -> Tensor:
    """Return a new buffer for logits of this many rows and columns, on the device of `x`."""
    stride = -(-columns // _ALIGNED_COLUMNS) * _ALIGNED_COLUMNS if x.is_cuda else columns
    return x.new_empty(rows, stride, dtype=_sum_dtype(x))[:, :columns]


def _cast_once(weight_VD: Tensor, x: Tensor, n_bytes: int) -> Tensor:
    """Return the weight in the dtype of `x`. On a CPU copy it only if the copy is small beside `n_bytes`."""
    is_little = weight_VD.numel() * x.dtype.itemsize <= max(n_bytes // 4, _LITTLE_BYTES)
    return weight_VD.to(x.dtype) if x.is_cuda or is_little else weight_VD


def _project(x_CD: Tensor, weight_VD: Tensor, logits_CV: Tensor) -> None:
    """Write x_CD @ weight_VD^T to `logits_CV`."""
    for tile in _tiles(x_CD, weight_VD):
        _matmul_into(logits_CV[:, tile], x_CD, weight_VD[tile].to(x_CD.dtype).t(), beta=0)


def _project_back(
    dlogits_CV: Tensor, x_CD: Tensor, weight_VD: Tensor, dx_CD: Tensor | None, dweight_VD: Tensor | None
) -> None:
    """Write dlogits_CV @ weight_VD to `dx_CD` and add dlogits_CV^T @ x_CD to `dweight_VD`, unless None."""
    sum_CD = torch.empty_like(x_CD, dtype=_sum_dtype(x_CD))
    for tile in _tiles(x_CD, weight_VD, dlogits_CV):
        dlogits_CT = dlogits_CV[:, tile].to(x_CD.dtype)
        if dx_CD is not None:
            beta = 1 if tile.start else 0
            _matmul_into(sum_CD, dlogits_CT, weight_VD[tile].to(x_CD.dtype), beta=beta)
        if dweight_VD is not None:
            _matmul_into(dweight_VD[tile], dlogits_CT.t(), x_CD, beta=1)
    if dx_CD is not None:
        dx_CD.copy_(sum_CD)


def _tiles(x_CD: Tensor, weight_VD: Tensor, *others: Tensor) -> Iterator[slice]:
    """Return slices of the vocabulary: one, or small ones if products need copies in another dtype."""
    copies_product = x_CD.dtype != _sum_dtype(x_CD) and not x_CD.is_cuda
    copies = copies_product or any(each.dtype != x_CD.dtype for each in (weight_VD, *others))
    step = _TILE_COLUMNS if copies else len(weight_VD)
    return (slice(start, start + step) for start in range(0, len(weight_VD), step))


def _matmul_into(out: Tensor, a: Tensor, b: Tensor, beta: Literal[0, 1]) -> None:
    """Compute out = beta * out + a @ b, summed in the dtype of `out`."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif out.is_cuda:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
    elif beta == 0:
        out.copy_(a @ b)
    else:
        out.add_(a @ b)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
