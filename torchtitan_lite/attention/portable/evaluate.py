"""Evaluate a table of tiles, forward and backward, with the kernel that the device has.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, K head dim.

Tiles of the same queries are merged by their log-sum-exp. The backward of each tile with the merged output
and log-sum-exp is exact (FlashAttention, https://arxiv.org/abs/2205.14135, section 3.1 and appendix B.4).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_lite.attention.operator import sum_dtype
from torchtitan_lite.attention.portable import native
from torchtitan_lite.attention.portable.kernels import finite, kernel_for
from torchtitan_lite.attention.portable.tiles import CAUSAL, FULL, ROWS, Tile


class _Call(NamedTuple):
    """One kernel call: the slices of a tile, its mask, and whether results are merged."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool
    mask: Tensor | None
    fresh_queries: bool
    """Whether this is the first tile with these queries; its results are then not merged."""
    fresh_keys: bool

    def q(self, x_BQHK: Tensor) -> Tensor:
        return x_BQHK[self.rows, self.queries].transpose(1, 2)

    def k(self, x_BSGK: Tensor) -> Tensor:
        return x_BSGK[self.rows, self.keys].transpose(1, 2)


def _calls(table: Tensor, masks: Tensor, dtype: torch.dtype) -> list[_Call]:
    calls = []
    for *fields, fresh_queries, fresh_keys in table.tolist():
        tile = Tile(*fields)
        n_rows, n, m = tile.row1 - tile.row0, tile.q1 - tile.q0, tile.k1 - tile.k0
        if n_rows == 0:
            continue
        mask = None
        if tile.kind not in (FULL, CAUSAL):
            if tile.kind == ROWS:
                seen = masks[: n_rows * n * m].view(n_rows, 1, n, m)
            else:
                seen = masks[tile.kind :][: n * m].view(n, m)
            # In q's dtype: torch's CPU kernel takes a float32 mask beside float64 queries and misreads it.
            mask = torch.where(seen, 0.0, float("-inf")).to(dtype)
        where = slice(tile.row0, tile.row1), slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
        calls.append(_Call(*where, tile.kind == CAUSAL, mask, bool(fresh_queries), bool(fresh_keys)))
    return calls


def _is_whole(calls: list[_Call], q_BQHK: Tensor, k_BSGK: Tensor) -> bool:
    """True if one call computes everything on a CPU, so that no results must be put together.

    The CPU kernel gives 0 for a query that sees nothing, and 0 for its log-sum-exp.
    """
    (batch, n_queries), n_keys = q_BQHK.shape[:2], k_BSGK.shape[1]
    whole = slice(0, batch), slice(0, n_queries), slice(0, n_keys)
    return q_BQHK.is_cpu and len(calls) == 1 and calls[0][:3] == whole


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from the attention over each."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((x - finite(lse)).exp()[..., None] for x in (lse_a, lse_b))
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


class TileEvaluator:
    """Attention by tiles. The log-sum-exp is [B, Q, H]."""

    def lse_shape(self, q_BQHK):
        return q_BQHK.shape[:3]

    def forward(self, q, k, v, table, data, scale, window):
        if native.takes(q, table):
            return native.forward(q, k, v, table, scale)
        kernel, calls = kernel_for(q), _calls(table, data, q.dtype)
        if _is_whole(calls, q, k):
            (call,) = calls
            out, lse = kernel.forward(call.q(q), call.k(k), call.k(v), call.causal, call.mask, scale)
            return out.transpose(1, 2), lse.transpose(1, 2).contiguous()
        out_BQHK = torch.zeros_like(q)
        lse_BQH = torch.zeros(q.shape[:3], dtype=sum_dtype(q.dtype), device=q.device)
        for call in calls:
            out, lse = kernel.forward(call.q(q), call.k(k), call.k(v), call.causal, call.mask, scale)
            if call.mask is not None:  # the CPU kernel reports 0 for a query that sees nothing in this tile
                lse = lse.masked_fill(call.mask.isneginf().all(-1), float("-inf"))
            out_bnHK, lse_bnH = out.transpose(1, 2), lse.transpose(1, 2)
            here = call.rows, call.queries
            if not call.fresh_queries:
                out_bnHK, lse_bnH = _merge(out_BQHK[here], lse_BQH[here], out_bnHK, lse_bnH)
            out_BQHK[here] = out_bnHK
            lse_BQH[here] = lse_bnH
        # A query that sees nothing at all: any finite value gives it weights of 0 in the backward.
        return out_BQHK, lse_BQH.masked_fill_(lse_BQH.isneginf(), 0)

    def backward(self, dout, q, k, v, out, lse, table, data, scale, window):
        if native.takes(q, table):
            return native.backward(dout, q, k, v, out, lse, table, scale)

        def gradients(call: _Call) -> tuple[Tensor, ...]:
            given = call.q(dout), call.q(q), call.k(k), call.k(v), call.q(out), call.q(lse)
            return kernel.backward(*given, call.causal, call.mask, scale)

        kernel, calls = kernel_for(q), _calls(table, data, q.dtype)
        if _is_whole(calls, q, k):
            return tuple(grad.transpose(1, 2) for grad in gradients(calls[0]))
        # Tiles that share keys or queries are summed in full precision.
        once = all(call.fresh_queries and call.fresh_keys for call in calls)
        grads = [native.zeros_for(x, x.dtype if once else sum_dtype(x.dtype)) for x in (q, k, v)]
        for call in calls:
            places = (call.queries, call.keys, call.keys)
            fresh = (call.fresh_queries, call.fresh_keys, call.fresh_keys)
            for grad, part, place, first in zip(grads, gradients(call), places, fresh, strict=True):
                if first:
                    grad[call.rows, place] = part.transpose(1, 2)
                else:
                    grad[call.rows, place] += part.transpose(1, 2)
        return tuple(grad.to(q.dtype) for grad in grads)
