"""Output projection and cross-entropy in one, chunk by chunk, so that the logits never exist as a whole.

B batch, S sequence, N = B * S rows, C rows of a chunk, D model dim, V vocab, T columns of a tile of V.

    for each chunk of rows:
        logits_CV   = x_CD @ weight_VD^T                the one buffer, used again by every chunk
        loss       += log(sum(exp(logits))) - logits[label]
        logits_CV   = softmax(logits) - onehot(label)   its gradient, in the same buffer
        dx_CD       = logits_CV @ weight_VD
        dweight_VD += logits_CV^T @ x_CD

The gradients are made in the forward pass, where the logits are at hand; the backward pass only scales them.
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

IGNORE = -100
"""The label of a token that has nothing to predict."""

_TILE_COLUMNS = 8192
_LITTLE_BYTES = 8 << 20
"""What may be held without asking how large the logits are: it fits a processor's cache."""


class Vocabulary:
    """The part of the vocabulary whose rows of the weight are at hand: here all of it.

    One that is only a part asks those who have the others for the maximum and the sum over all.
    """

    def rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The row of each label, any row where it has none here, and whether it has one."""
        here = labels != IGNORE
        return torch.where(here, labels, 0), here

    def max(self, x: Tensor) -> Tensor:
        """The maximum over all parts of what is known of this one; `x` may be overwritten."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all parts of what is known of this one; `x` may be overwritten."""
        return x


class LinearCrossEntropy(nn.Module):
    """`linear_cross_entropy` as a part of the model, so that tensor parallel can exchange it from outside."""

    def forward(
        self, x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, vocabulary: Vocabulary | None = None
    ) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(x_BSD, weight_VD, labels_BS, vocabulary)


def linear_cross_entropy(
    x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, vocabulary: Vocabulary | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of -log softmax(x @ weight^T)[label] over the labels that are not IGNORE, and how many those are.

    The products are computed in the dtype of `x_BSD`, all else in float32 (float64 if that is float64).
    The sum is a scalar in nats, the count int64. Memory beyond the two gradients: one chunk of logits.
    Where `weight_VD` is a part of the `vocabulary`, so is the gradient of `x_BSD`: a term of the whole one.
    """
    x_ND, labels_N = x_BSD.flatten(0, -2), labels_BS.flatten()
    grad = torch.is_grad_enabled()
    needs = grad and x_ND.requires_grad, grad and weight_VD.requires_grad
    loss = _LinearCrossEntropy.apply(x_ND, weight_VD, labels_N, *needs, vocabulary or Vocabulary())
    return loss, (labels_N != IGNORE).sum()


def reference_cross_entropy(x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
    """What `linear_cross_entropy` must equal, with all the logits at once: for tests and measurements."""
    logits_BSV = F.linear(x_BSD, weight_VD.to(x_BSD.dtype)).to(_sum_dtype(x_BSD))
    logits_NV, labels_N = logits_BSV.flatten(0, -2), labels_BS.flatten()
    loss = F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum")
    return loss, (labels_N != IGNORE).sum()


def chunk_rows(n_rows: int, x: Tensor) -> int:
    """Rows of a chunk: so many that it takes a sixteenth of the memory of all the logits in the dtype of `x`.

    At least 16 rows on a CPU and 512 elsewhere, lest the weight be read too often, and at most 2048, which
    keep any device busy; more of a vocabulary so small that they are little memory anyhow. docs/models.md has
    the measurements.
    """
    least = 16 if x.device.type == "cpu" else 512
    share = n_rows * x.dtype.itemsize // (16 * _sum_dtype(x).itemsize)
    return min(max(share, least), 2048)


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
        little = _LITTLE_BYTES // (sum_dtype.itemsize * len(weight_VD))
        rows = min(max(chunk_rows(n_rows, x_ND), little), n_rows)
        loss = x_ND.new_zeros((), dtype=sum_dtype)
        dx_ND = torch.empty_like(x_ND) if needs_dx else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=sum_dtype) if needs_dweight else None
        buffer_CV = x_ND.new_empty(rows, len(weight_VD), dtype=sum_dtype)
        ctx.weight_dtype, weight_VD = weight_VD.dtype, _cast_once(weight_VD, x_ND, buffer_CV.nbytes)
        for start in range(0, n_rows, max(rows, 1)):
            chunk = slice(start, min(start + rows, n_rows))
            logits_CV = buffer_CV[: chunk.stop - start]
            _project(x_ND[chunk], weight_VD, logits_CV)
            loss += _cross_entropy_(logits_CV, labels_N[chunk], needs_dx or needs_dweight, vocabulary)
            if dx_ND is not None or dweight_VD is not None:
                dx_CD = None if dx_ND is None else dx_ND[chunk]
                _project_back(logits_CV, x_ND[chunk], weight_VD, dx_CD, dweight_VD)
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
            # Handed over for good: scaled in place, and free to become the parameter's .grad without a copy.
            ctx.gradients = None
            for each in (dx_ND, dweight_VD):
                if each is not None:
                    each *= dloss
        return dx_ND, None if dweight_VD is None else dweight_VD.to(ctx.weight_dtype), None, None, None, None


def _cross_entropy_(logits_CV: Tensor, labels_C: Tensor, gradient: bool, vocabulary: Vocabulary) -> Tensor:
    """Sum of the losses of a chunk; overwrites its logits, with `gradient` by the gradient of the sum."""
    valid_C1 = (labels_C != IGNORE)[:, None]
    label_C1, here_C1 = vocabulary.rows(labels_C[:, None])
    logits_CV -= vocabulary.max(logits_CV.amax(dim=1, keepdim=True))
    label_logit_C1 = torch.where(here_C1, logits_CV.gather(1, label_C1), 0)
    sums_C2 = torch.cat([logits_CV.exp_().sum(dim=1, keepdim=True), label_logit_C1], dim=1)
    total_C1, label_logit_C1 = vocabulary.sum(sums_C2).chunk(2, dim=1)
    if gradient:
        logits_CV.scatter_add_(1, label_C1, torch.where(here_C1, -total_C1, 0))
        logits_CV *= valid_C1 / total_C1
    return torch.where(valid_C1, total_C1.log() - label_logit_C1, 0).sum()


def _cast_once(weight_VD: Tensor, x: Tensor, n_bytes: int) -> Tensor:
    """The weight in the dtype of `x`, if that takes little beside a buffer of `n_bytes`; else as it is."""
    size = weight_VD.numel() * x.dtype.itemsize
    is_little = size <= max(n_bytes // (4 if x.is_cpu else 1), _LITTLE_BYTES)
    return weight_VD.to(x.dtype) if is_little else weight_VD


def _project(x_CD: Tensor, weight_VD: Tensor, logits_CV: Tensor) -> None:
    """logits_CV = x_CD @ weight_VD^T."""
    for tile in _tiles(x_CD, weight_VD):
        _matmul_into(logits_CV[:, tile], x_CD, weight_VD[tile].to(x_CD.dtype).t(), beta=0)


def _project_back(
    dlogits_CV: Tensor, x_CD: Tensor, weight_VD: Tensor, dx_CD: Tensor | None, dweight_VD: Tensor | None
) -> None:
    """dx_CD = dlogits_CV @ weight_VD, and dweight_VD += dlogits_CV^T @ x_CD; those that are asked for."""
    sum_CD = torch.zeros_like(x_CD, dtype=dlogits_CV.dtype)
    for tile in _tiles(x_CD, weight_VD):
        dlogits_CT = dlogits_CV[:, tile].to(x_CD.dtype)
        if dx_CD is not None:
            _matmul_into(sum_CD, dlogits_CT, weight_VD[tile].to(x_CD.dtype), beta=1)
        if dweight_VD is not None:
            _matmul_into(dweight_VD[tile], dlogits_CT.t(), x_CD, beta=1)
    if dx_CD is not None:
        dx_CD.copy_(sum_CD)


def _tiles(x_CD: Tensor, weight_VD: Tensor) -> Iterator[slice]:
    """The vocabulary: in one piece, or in small ones where a copy in another dtype is made of each."""
    converts = {x_CD.dtype, weight_VD.dtype} != {_sum_dtype(x_CD)}
    step = _TILE_COLUMNS if converts else len(weight_VD)
    return (slice(start, start + step) for start in range(0, len(weight_VD), step))


def _matmul_into(out: Tensor, a: Tensor, b: Tensor, beta: Literal[0, 1]) -> None:
    """out = beta * out + a @ b, the sum in the dtype of `out`."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif beta == 0:
        out.copy_(a @ b)
    else:
        out.add_(a @ b)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _graph_is_kept() -> bool:
    """Whether the running backward pass may be run again; yes where torch cannot tell."""
    tell = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return tell is None or tell()
