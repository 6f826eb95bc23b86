"""Packed documents for variable-length FlashAttention kernels, which take many documents in one call.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, K head dim;
T = B * Q and U = B * S packed query and key tokens, D documents of a pack.

A pack is a sequence of documents whose queries and whose keys follow each other in memory: one kernel call. A
batch without padding is one pack. Padding splits it, and so do queries that are only some chunks of the
sequence.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_lite.attention.mask import Ranges, check_window, count_queries, segments
from torchtitan_lite.attention.operator import (
    EVALUATORS,
    Calls,
    Kernel,
    Work,
    contiguous_like,
    make_calls,
    sum_dtype,
)

aten = torch.ops.aten
ALL_ROWS = -1
"""The `row` of a pack over all batch rows, one row after the other."""


class Pack(NamedTuple):
    """Queries [q0, q1) and keys [k0, k1) of `row`, or of all rows one after the other."""

    row: int
    q0: int
    q1: int
    k0: int
    k1: int
    first: int
    """The index in Calls.data of the cumulative query counts [D + 1]; the cumulative key counts follow."""
    n_documents: int
    max_q: int
    """The largest number of queries of a document."""
    max_k: int
    """The largest number of keys of a document."""

    def q(self, x_BQHK: Tensor) -> Tensor:
        """The pack's part [T, H, K] of q, the output, or the gradient of either."""
        return _tokens(x_BQHK, self.row)[self.q0 : self.q1]

    def k(self, x_BSGK: Tensor) -> Tensor:
        """The pack's part [U, G, K] of k, v, or the gradient of either."""
        return _tokens(x_BSGK, self.row)[self.k0 : self.k1]

    def lse(self, lse_HT: Tensor, n_queries: int) -> Tensor:
        """The pack's part of the log-sum-exp."""
        before = max(self.row, 0) * n_queries
        return lse_HT[:, before + self.q0 : before + self.q1]


def document_packs(
    positions_BS: Tensor,
    queries: Ranges | None = None,
    sliding_window: int | None = None,
    device: torch.device | str = "cpu",
    kernel: str = "torch",
) -> Calls:
    """The packs of a micro-batch: one if there is no padding, one for each row and range of `queries`.

    The table has the packs over all batch rows first, then the packs of each row alone, which serve tensors
    whose rows do not follow each other in memory. `kernel` is the name of the evaluator.
    """
    check_window(sliding_window)
    segments_N5 = segments(positions_BS.cpu(), queries)
    (batch, seq_len), n_queries = positions_BS.shape, count_queries(queries, positions_BS.shape[1])
    row_N, spans_N4 = segments_N5[:, 0], segments_N5[:, 1:]
    before_N4 = row_N[:, None] * torch.tensor([n_queries, n_queries, seq_len, seq_len])
    parts = [(ALL_ROWS, spans_N4 + before_N4)]
    parts += [(row, spans_N4[row_N == row]) for row in range(batch) if batch > 1]
    packs, counts, n_counts = [], [torch.zeros(0, dtype=torch.int32)], 0
    for row, spans in parts:
        for pack_D4 in _cut(spans):
            (q0, k0), (q1, k1) = pack_D4[0, [0, 2]].tolist(), pack_D4[-1, [1, 3]].tolist()
            cu_q_D = torch.cat([pack_D4[:1, 0], pack_D4[:, 1]]) - q0
            cu_k_D = torch.cat([pack_D4[:1, 2], pack_D4[:, 3]]) - k0
            longest = int(cu_q_D.diff().max()), int(cu_k_D.diff().max())
            packs.append(Pack(row, q0, q1, k0, k1, n_counts, len(pack_D4), *longest))
            counts += [cu_q_D.int(), cu_k_D.int()]
            n_counts += 2 * len(cu_q_D)
    packs = packs or [Pack(*[0] * 9)]
    return make_calls(kernel, packs, torch.cat(counts), (batch, n_queries, seq_len), device, sliding_window)


def _cut(spans_N4: Tensor) -> list[Tensor]:
    """Documents (q0, q1, k0, k1), in order, cut if the queries or keys of the next document do not follow."""
    breaks = (spans_N4[1:, 0] != spans_N4[:-1, 1]) | (spans_N4[1:, 2] != spans_N4[:-1, 3])
    edges = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(spans_N4)]
    return [spans_N4[start:stop] for start, stop in pairwise(edges) if start < stop]


class Documents(NamedTuple):
    """The documents of a pack, and how to compute their attention: causal, aligned at the bottom right."""

    cu_q_D: Tensor
    """Cumulative query counts, [D + 1] int32."""
    cu_k_D: Tensor
    """Cumulative key counts, [D + 1] int32."""
    max_q: int
    max_k: int
    window: int | None
    scale: float


def _tokens(x_BSHK: Tensor, row: int) -> Tensor:
    return x_BSHK.view(-1, *x_BSHK.shape[2:]) if row == ALL_ROWS else x_BSHK[row]


def _calls(work: Work, *tensors: Tensor) -> list[tuple[Pack, Documents]]:
    """The kernel calls: the packs over all rows, or the packs of each row alone.

    Each row alone if the rows of a tensor do not follow each other in memory: joining the rows would copy the
    tensor.
    """
    packed = all(len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in tensors)
    calls = []
    for fields in work.table.tolist():
        pack = Pack(*fields)
        if pack.n_documents and (pack.row == ALL_ROWS) == packed:
            cu_q_D, cu_k_D = work.data[pack.first :][: 2 * (pack.n_documents + 1)].chunk(2)
            documents = Documents(cu_q_D, cu_k_D, pack.max_q, pack.max_k, work.window, work.scale)
            calls.append((pack, documents))
    return calls


def _is_whole(calls: list[tuple[Pack, Documents]], q_BQHK: Tensor, k_BSGK: Tensor) -> bool:
    """True if one call has all queries and all keys, so that no results must be put together."""
    whole = (ALL_ROWS, 0, q_BQHK.shape[:2].numel(), 0, k_BSGK.shape[:2].numel())
    return len(calls) == 1 and calls[0][0][:5] == whole


class PackEvaluator:
    """Attention by packs, with one kernel: q and out [T, H, K], k and v [U, G, K], log-sum-exp [H, T]."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def lse_shape(self, q_BQHK):
        batch, n_queries, heads = q_BQHK.shape[:3]
        return heads, batch * n_queries

    def forward(self, q, k, v, how):
        calls = _calls(how, q, k, v)
        found = (self.kernel.forward(pack.q(q), pack.k(k), pack.k(v), documents) for pack, documents in calls)
        if _is_whole(calls, q, k):
            out_THK, lse_HT = next(found)
            return out_THK.unflatten(0, q.shape[:2]), lse_HT
        out_BQHK, lse_HT = torch.zeros_like(q), q.new_zeros(self.lse_shape(q), dtype=sum_dtype(q.dtype))
        for (pack, _), (out, lse) in zip(calls, found, strict=True):
            pack.q(out_BQHK).copy_(out)
            pack.lse(lse_HT, q.shape[1]).copy_(lse)
        return out_BQHK, lse_HT

    def backward(self, dout, q, k, v, out, lse, how):
        calls = _calls(how, q, k, v, dout, out)
        parts = []
        for pack, documents in calls:
            given = pack.q(dout), pack.q(q), pack.k(k), pack.k(v), pack.q(out)
            lse_HT = pack.lse(lse, q.shape[1]).contiguous()
            parts.append(self.kernel.backward(*given, lse_HT, documents))
        if _is_whole(calls, q, k):
            return tuple(part.contiguous().view(x.shape) for part, x in zip(parts[0], (q, k, v), strict=True))
        dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
        for (pack, _), (dq_part, dk_part, dv_part) in zip(calls, parts, strict=True):
            pack.q(dq).copy_(dq_part)
            # Summed in the dtype of the keys: under context parallel at most two packs share a key.
            pack.k(dk).add_(dk_part)
            pack.k(dv).add_(dv_part)
        return dq, dk, dv


def _left(window: int | None) -> int:
    """The number of keys that a query sees before its own key, as FlashAttention counts them; -1: all."""
    return -1 if window is None else window - 1


class TorchFlash:
    """torch's FlashAttention-2, or FlashAttention-3 or -4 once `activate_flash_attention_impl` has chosen it.

    torch's `varlen_attn` calls the same operators (torch/nn/attention/varlen.py).
    """

    def forward(self, q, k, v, how):
        *documents, window, scale = how
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, *documents, 0.0, window is None, False,
            scale=scale, window_size_left=_left(window), window_size_right=0,
        )  # fmt: skip
        return out, lse

    def backward(self, dout, q, k, v, out, lse, how):
        *documents, window, scale = how
        # There is no dropout, so the random state is never read.
        seed, unused = (torch.empty(n, dtype=torch.uint64, device=q.device) for n in (2, 0))
        return aten._flash_attention_backward(
            dout, q, k, v, out, lse, *documents, 0.0, window is None, seed, unused,
            scale=scale, window_size_left=_left(window), window_size_right=0,
        )  # fmt: skip


class FlashAttnPackage:
    """The flash-attn package, version 2.7 or later."""

    def forward(self, q, k, v, how):
        from flash_attn import flash_attn_interface  # pyright: ignore[reportMissingImports]

        *documents, window, scale = how
        out, lse, *_ = flash_attn_interface._flash_attn_varlen_forward(
            q, k, v, *documents, dropout_p=0.0, softmax_scale=scale, causal=True,
            window_size_left=_left(window), window_size_right=0,
        )  # fmt: skip
        return out, lse

    def backward(self, dout, q, k, v, out, lse, how):
        from flash_attn import flash_attn_interface  # pyright: ignore[reportMissingImports]

        *documents, window, scale = how
        dq, dk, dv = (contiguous_like(x) for x in (q, k, v))
        flash_attn_interface._flash_attn_varlen_backward(
            dout, q, k, v, out, lse, dq, dk, dv, *documents,
            dropout_p=0.0, softmax_scale=scale, causal=True,
            window_size_left=_left(window), window_size_right=0, softcap=0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq, dk, dv


EVALUATORS["torch"] = PackEvaluator(TorchFlash())
EVALUATORS["flash_attn"] = PackEvaluator(FlashAttnPackage())
