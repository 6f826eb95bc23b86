"""Output projection and cross-entropy in one, chunk by chunk, so that the logits never exist as a whole.

B batch, S sequence, N = B * S rows, C rows of a chunk, D model dim, V vocab, T columns of a tile of V.

    for each chunk of rows:
        logits_CV   = x_CD @ weight_VD^T                the one buffer, used again by every chunk
        loss       += log(sum(exp(logits))) - logits[label]
        logits_CV   = softmax(logits) - onehot(label)   its gradient, in the same buffer
        dx_CD       = logits_CV @ weight_VD
        dweight_VD += logits_CV^T @ x_CD

The gradients are made in the forward pass, where the logits are at hand; the backward pass only scales them.

On CUDA the two lines between the products are the kernels of `models.loss_kernels`, which write the gradient
in the dtype of the next products, and products of half precision add to float32 without a copy.
"""

import logging
from collections.abc import Iterator
from functools import cache, partial
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE = -100
"""The label of a token that has nothing to predict."""

_TILE_COLUMNS = 8192
_ALIGNED_COLUMNS = 16
"""The rows of the buffer on CUDA start at multiples of this: products are slow where they do not."""
_LITTLE_BYTES = 8 << 20
"""A chunk may always take this much memory: it fits a processor's cache."""
_LOG = logging.getLogger(__name__)


class Vocabulary:
    """The part of the vocabulary whose rows of the weight are at hand: here all of it.

    A class for a smaller part exchanges maxima and sums with those who hold the other parts.
    """

    n_parts = 1
    """Into how many equal parts the vocabulary is split."""

    def rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The row of the weight for each label, and whether it is here; if not, the row is arbitrary."""
        here = labels != IGNORE
        return torch.where(here, labels, 0), here

    def max(self, x: Tensor) -> Tensor:
        """The maximum over all parts of what is known of this one; `x` may be overwritten."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all parts of what is known of this one; `x` may be overwritten."""
        return x


class Labels(NamedTuple):
    """The labels of some rows, for a part of the vocabulary."""

    row: Tensor
    """The row of the weight for each label; arbitrary where it is not `here`."""
    here: Tensor
    """Whether the row of the weight is at hand."""
    valid: Tensor
    """Whether there is a label at all."""

    @classmethod
    def of(cls, labels_N: Tensor, vocabulary: Vocabulary, n_weights: int) -> "Labels":
        is_valid_N = labels_N != IGNORE
        # The kernels do not check bounds, and a part takes a label that it lacks for another part's.
        if labels_N.is_cuda or vocabulary.n_parts > 1:
            is_known_N = (labels_N >= 0) & (labels_N < n_weights * vocabulary.n_parts)
            torch._assert_async((is_known_N | ~is_valid_N).all(), "a label is out of bounds")  # pyright: ignore[reportPrivateImportUsage]
        return cls(*vocabulary.rows(labels_N), is_valid_N)

    def part(self, rows: slice) -> "Labels":
        return Labels(*(each[rows] for each in self))


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` as a part of the model, so that tensor parallel can replace it from outside."""

    def forward(
        self, x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, vocabulary: Vocabulary | None = None
    ) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(x_BSD, weight_VD, labels_BS, vocabulary)


def linear_cross_entropy(
    x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, vocabulary: Vocabulary | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(x @ weight^T)[label] over the labels that are not IGNORE, and how many those are.

    The products are computed in the dtype of `x_BSD`, all else in float32 (float64 if that is float64).
    The sum is a scalar in nats, the count int64. Memory beyond the two gradients: one chunk of logits, and on
    CUDA the weight in the dtype of `x_BSD` if it has another.
    Where `weight_VD` is a part of the `vocabulary`, so is the gradient of `x_BSD`: a term of the whole one.
    """
    x_ND, labels_N = x_BSD.flatten(0, -2), labels_BS.flatten()
    grad = torch.is_grad_enabled()
    needs = grad and x_ND.requires_grad, grad and weight_VD.requires_grad
    loss = _LinearCrossEntropy.apply(x_ND, weight_VD, labels_N, *needs, vocabulary or Vocabulary())
    return loss, (labels_N != IGNORE).sum()


def reference_cross_entropy(x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """The reference for `linear_cross_entropy`, with all the logits at once: for tests and measurements."""
    logits_BSV = F.linear(x_BSD, weight_VD.to(x_BSD.dtype)).to(_sum_dtype(x_BSD))
    logits_NV, labels_N = logits_BSV.flatten(0, -2), labels_BS.flatten()
    loss = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum")
    return loss, (labels_N != IGNORE).sum()


def chunk_rows(n_rows: int, x: Tensor) -> int:
    """Rows of a chunk for a large vocabulary.

    On a GPU 2048, so that the weight and its gradient are seldom read and written. On a CPU, where that
    matters less, so many that the chunk takes a sixteenth of the memory of all the logits in the dtype of
    `x`, between 16 and 2048. docs/models.md has the measurements.
    """
    if x.device.type != "cpu":
        return 2048
    share = n_rows * x.dtype.itemsize // (16 * _sum_dtype(x).itemsize)
    return min(max(share, 16), 2048)


def rows_of_chunks(n_rows: int, n_columns: int, x: Tensor) -> int:
    """Rows of a chunk: those of `chunk_rows`, or more if they fit _LITTLE_BYTES; at most all."""
    little = _LITTLE_BYTES // (_sum_dtype(x).itemsize * n_columns)
    return min(max(chunk_rows(n_rows, x), little), n_rows)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        needs_dx: bool,
        needs_dweight: bool,
        vocabulary: Vocabulary,
    ) -> Tensor:
        n_rows, sum_dtype = len(x_ND), _sum_dtype(x_ND)
        rows = rows_of_chunks(n_rows, len(weight_VD), x_ND)
        kernels = _kernels(x_ND.device, sum_dtype)
        cross_entropy_ = _cross_entropy_ if kernels is None else partial(_fused_cross_entropy_, kernels)
        loss = x_ND.new_zeros((), dtype=sum_dtype)
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
        ctx.gradients = dx_ND, dweight_VD
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.gradients is None:
            raise RuntimeError("this loss was differentiated before: pass retain_graph=True the first time")
        dx_ND, dweight_VD = ctx.gradients
        if _graph_is_kept():
            dx_ND, dweight_VD = (None if each is None else each * dloss for each in (dx_ND, dweight_VD))
        else:
            # The gradient is given away: it is scaled in place and becomes `.grad` without a copy.
            ctx.gradients = None
            for each in (dx_ND, dweight_VD):
                if each is not None:
                    each *= dloss
        return dx_ND, None if dweight_VD is None else dweight_VD.to(ctx.weight_dtype), None, None, None, None


def _cross_entropy_(
    logits_CV: Tensor, labels: Labels, gradient: torch.dtype | None, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """The sum of a chunk's losses, and the gradient if `gradient` is not None; overwrites the logits.

    The reference for `_fused_cross_entropy_`. Its gradient keeps the dtype of the logits.
    """
    label_C1, here_C1, valid_C1 = (each[:, None] for each in labels)
    logits_CV -= vocabulary.max(logits_CV.amax(dim=1))[:, None]
    label_logit_C1 = torch.where(here_C1, logits_CV.gather(1, label_C1), 0)
    # Laid out as the kernels have it: ranks that share the vocabulary may differ in what they use.
    sums_2C = torch.stack([logits_CV.exp_().sum(dim=1), label_logit_C1[:, 0]])
    total_C1, label_logit_C1 = (each[:, None] for each in vocabulary.sum(sums_2C))
    if gradient is not None:
        logits_CV.scatter_add_(1, label_C1, torch.where(here_C1, -total_C1, 0))
        logits_CV *= valid_C1 / total_C1
    return torch.where(valid_C1, total_C1.log() - label_logit_C1, 0).sum(), logits_CV


def _fused_cross_entropy_(
    kernels: Any, logits_CV: Tensor, labels: Labels, gradient: torch.dtype | None, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """`_cross_entropy_` with the kernels of `models.loss_kernels`; the gradient has the dtype `gradient`."""
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
    """`models.loss_kernels` if it takes such logits; None, with the reason logged, where Triton fails."""
    if device.type != "cuda" or dtype != torch.float32:
        return None
    try:
        from torchtitan_lite.models import loss_kernels

        # Triton also needs a C compiler and Python's headers; only a launch shows whether they are there.
        loss_kernels.try_on(device)
    except Exception as error:  # noqa: BLE001 (whatever Triton raises, torch's own kernels can do it)
        _LOG.warning("the loss is left to PyTorch's own kernels: %s: %s", type(error).__name__, error)
        return None
    return loss_kernels


def _buffer(rows: int, columns: int, x: Tensor) -> Tensor:
    """Room for the logits of so many rows."""
    stride = -(-columns // _ALIGNED_COLUMNS) * _ALIGNED_COLUMNS if x.is_cuda else columns
    return x.new_empty(rows, stride, dtype=_sum_dtype(x))[:, :columns]


def _cast_once(weight_VD: Tensor, x: Tensor, n_bytes: int) -> Tensor:
    """The weight in the dtype of `x`; on a CPU only if the copy is small beside a buffer of `n_bytes`."""
    is_little = weight_VD.numel() * x.dtype.itemsize <= max(n_bytes // 4, _LITTLE_BYTES)
    return weight_VD.to(x.dtype) if x.is_cuda or is_little else weight_VD


def _project(x_CD: Tensor, weight_VD: Tensor, logits_CV: Tensor) -> None:
    """logits_CV = x_CD @ weight_VD^T."""
    for tile in _tiles(x_CD, weight_VD):
        _matmul_into(logits_CV[:, tile], x_CD, weight_VD[tile].to(x_CD.dtype).t(), beta=0)


def _project_back(
    dlogits_CV: Tensor, x_CD: Tensor, weight_VD: Tensor, dx_CD: Tensor | None, dweight_VD: Tensor | None
) -> None:
    """dx_CD = dlogits_CV @ weight_VD, and dweight_VD += dlogits_CV^T @ x_CD; those that are asked for."""
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
    """Slices of the vocabulary: one, or small ones if a factor or a product is copied to another dtype."""
    copies_product = x_CD.dtype != _sum_dtype(x_CD) and not x_CD.is_cuda
    copies = copies_product or any(each.dtype != x_CD.dtype for each in (weight_VD, *others))
    step = _TILE_COLUMNS if copies else len(weight_VD)
    return (slice(start, start + step) for start in range(0, len(weight_VD), step))


def _matmul_into(out: Tensor, a: Tensor, b: Tensor, beta: Literal[0, 1]) -> None:
    """out = beta * out + a @ b, the sum in the dtype of `out`."""
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


def _graph_is_kept() -> bool:
    """True if the running backward pass keeps its graph, or if torch cannot tell."""
    tell = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return tell is None or tell()
