"""Packed documents for variable-length FlashAttention kernels, which take many documents in one call.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, K head dim;
T = B * Q and U = B * S packed query and key tokens, D documents of a pack.

A pack is a sequence of documents whose queries are contiguous in memory, and whose keys are contiguous too.
One kernel call computes a pack. A batch without padding is one pack. Padding splits a batch into several
packs, and so do queries that are only some chunks of the sequence.
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
"""The value of `Pack.row` for a pack over the concatenation of all batch rows."""


class Pack(NamedTuple):
    """The queries [q0, q1) and keys [k0, k1) of batch row `row`, or of the concatenation of all rows."""

    row: int
    q0: int
    q1: int
    k0: int
    k1: int
    first: int
    """The index in Calls.data of the cumulative query counts [D + 1]. The cumulative key counts follow."""
    n_documents: int
    max_q: int
    """The largest number of queries of a document."""
    max_k: int
    """The largest number of keys of a document."""

    def q(self, x_BQHK: Tensor) -> Tensor:
        """Return the pack's part [T, H, K] of q, of the output, or of a gradient of q or the output."""
        return _tokens(x_BQHK, self.row)[self.q0 : self.q1]

    def k(self, x_BSGK: Tensor) -> Tensor:
        """Return the pack's part [U, G, K] of k, of v, or of a gradient of k or v."""
        return _tokens(x_BSGK, self.row)[self.k0 : self.k1]

    def lse(self, lse_HT: Tensor, n_queries: int) -> Tensor:
        """Return the pack's part of the log-sum-exp, in which each batch row has `n_queries` queries."""
        before = max(self.row, 0) * n_queries
        return lse_HT[:, before + self.q0 : before + self.q1]


def document_packs(
    positions_BS: Tensor,
    queries: Ranges | None = None,
    sliding_window: int | None = None,
    device: torch.device | str = "cpu",
    kernel: str = "torch",
) -> Calls:
    """Return the packs of a micro-batch as kernel calls. `kernel` is the name of the evaluator.

    Without padding there is one pack, or one for each row and range if `queries` is given. The table first
    lists the packs over all batch rows, then the packs of each row alone. The packs of each row alone are for
    tensors whose rows are not contiguous in memory.
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
    """Split the documents (q0, q1, k0, k1) into groups whose queries and whose keys are contiguous."""
    breaks = (spans_N4[1:, 0] != spans_N4[:-1, 1]) | (spans_N4[1:, 2] != spans_N4[:-1, 3])
    edges = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(spans_N4)]
    return [spans_N4[start:stop] for start, stop in pairwise(edges) if start < stop]


class Documents(NamedTuple):
    """The documents of a pack, whose attention is causal and aligned at the bottom right."""

    cu_q_D: Tensor
    """The cumulative query counts, [D + 1] int32."""
    cu_k_D: Tensor
    """The cumulative key counts, [D + 1] int32."""
    max_q: int
    max_k: int
    window: int | None
    scale: float


def _tokens(x_BSHK: Tensor, row: int) -> Tensor:
    return x_BSHK.view(-1, *x_BSHK.shape[2:]) if row == ALL_ROWS else x_BSHK[row]


def _calls(work: Work, *tensors: Tensor) -> list[tuple[Pack, Documents]]:
    """Return the kernel calls: the packs over all rows, or the packs of each row alone.

    The packs of each row alone are used if the rows of a tensor are not contiguous in memory. To join such
    rows, the tensor would have to be copied.
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
    """Return True if one call has all queries and all keys, so that no results must be combined."""
    whole = (ALL_ROWS, 0, q_BQHK.shape[:2].numel(), 0, k_BSGK.shape[:2].numel())
    return len(calls) == 1 and calls[0][0][:5] == whole


class PackEvaluator:
    """An evaluator that calls `kernel` once for each pack: documents that follow each other in memory.

    The kernel's q and output are [T, H, K], its k and v [U, G, K], its log-sum-exp [H, T].
    """

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
            # The sum is in the dtype of the keys: under context parallel at most two packs share a key.
            pack.k(dk).add_(dk_part)
            pack.k(dv).add_(dv_part)
        return dq, dk, dv


def _left(window: int | None) -> int:
    """Return FlashAttention's window size: the keys that a query sees before its own key. -1 means all."""
    return -1 if window is None else window - 1


class TorchFlash:
    """torch's FlashAttention-2, or version 3 or 4 if `activate_flash_attention_impl` has activated it.

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
    """The kernels of the flash-attn package, version 2.7 or later."""

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
