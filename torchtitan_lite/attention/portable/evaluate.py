"""Evaluate a table of tiles, forward and backward, with the kernel that the device has.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, K head dim.

Tiles of the same queries are merged by their log-sum-exp. The backward of each tile with the merged output
and log-sum-exp is exact (FlashAttention, https://arxiv.org/abs/2205.14135, section 3.1 and appendix B.4).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_lite.attention.operator import Work, sum_dtype
from torchtitan_lite.attention.portable import native
from torchtitan_lite.attention.portable.kernels import OneTile, finite, kernel_for
from torchtitan_lite.attention.portable.tiles import BAND, CAUSAL, ROWS, Tile


class _Call(NamedTuple):
    """A tile, how to compute it, and the views of its tokens, heads first."""

    tile: Tile
    how: OneTile

    def q(self, x_BQHK: Tensor) -> Tensor:
        tile = self.tile
        return x_BQHK[tile.row0 : tile.row1, tile.q0 : tile.q1].transpose(1, 2)

    def k(self, x_BSGK: Tensor) -> Tensor:
        tile = self.tile
        return x_BSGK[tile.row0 : tile.row1, tile.k0 : tile.k1].transpose(1, 2)


def _calls(work: Work, q_BQHK: Tensor) -> list[_Call]:
    calls, masks = [], {}
    for tile in (Tile(*fields) for fields in work.table.tolist() if fields[0] < fields[1]):
        shape = tile.q1 - tile.q0, tile.k1 - tile.k0, tile.kind
        if shape not in masks:
            masks[shape] = _additive_mask(tile, work, q_BQHK)
        calls.append(_Call(tile, OneTile(tile.kind == CAUSAL, masks[shape], work.scale)))
    return calls


def _additive_mask(tile: Tile, work: Work, q_BQHK: Tensor) -> Tensor | None:
    n, m = tile.q1 - tile.q0, tile.k1 - tile.k0
    if tile.kind == BAND:
        assert work.window is not None
        seen = torch.ones(n, m, dtype=torch.bool, device=q_BQHK.device).triu().tril(work.window - 1)
    elif tile.kind == ROWS:
        n_rows = tile.row1 - tile.row0
        seen = work.data[: n_rows * m].view(n_rows, 1, n, m)
    else:
        return None
    # In q's dtype: torch's CPU kernel takes a float32 mask beside float64 queries and misreads it.
    return torch.where(seen, 0.0, float("-inf")).to(q_BQHK.dtype)


def _is_whole(calls: list[_Call], q_BQHK: Tensor, k_BSGK: Tensor) -> bool:
    """True if one call computes everything on a CPU, so that no results must be put together.

    The CPU kernel gives 0 for a query that sees nothing, and 0 for its log-sum-exp.
    """
    (batch, n_queries), n_keys = q_BQHK.shape[:2], k_BSGK.shape[1]
    return q_BQHK.is_cpu and len(calls) == 1 and calls[0].tile[:6] == (0, batch, 0, n_queries, 0, n_keys)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from the attention over each."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((x - finite(lse)).exp()[..., None] for x in (lse_a, lse_b))
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


class TileEvaluator:
    """Attention by tiles. The log-sum-exp is [B, Q, H]."""

    def lse_shape(self, q_BQHK):
        return q_BQHK.shape[:3]

    def forward(self, q, k, v, how):
        if native.takes(q, how.table):
            return native.forward(q, k, v, how)
        kernel, calls = kernel_for(q), _calls(how, q)
        if _is_whole(calls, q, k):
            (call,) = calls
            out, lse = kernel.forward(call.q(q), call.k(k), call.k(v), call.how)
            return out.transpose(1, 2), lse.transpose(1, 2).contiguous()
        out_BQHK = torch.zeros_like(q)
        lse_BQH = torch.zeros(q.shape[:3], dtype=sum_dtype(q.dtype), device=q.device)
        for call in calls:
            out, lse = kernel.forward(call.q(q), call.k(k), call.k(v), call.how)
            if (
                call.how.mask is not None
            ):  # the CPU kernel reports 0 for a query that sees nothing in this tile
                lse = lse.masked_fill(call.how.mask.isneginf().all(-1), float("-inf"))
            out_bHnK, lse_bHn = call.q(out_BQHK), call.q(lse_BQH)
            if not call.tile.fresh_queries:
                out, lse = _merge(out_bHnK, lse_bHn, out, lse)
            out_bHnK.copy_(out)
            lse_bHn.copy_(lse)
        # A query that sees nothing at all: any finite value gives it weights of 0 in the backward.
        return out_BQHK, lse_BQH.masked_fill_(lse_BQH.isneginf(), 0)

    def backward(self, dout, q, k, v, out, lse, how):
        if native.takes(q, how.table):
            return native.backward(dout, q, k, v, out, lse, how)

        def gradients(call: _Call) -> tuple[Tensor, ...]:
            given = call.q(dout), call.q(q), call.k(k), call.k(v), call.q(out), call.q(lse)
            return kernel.backward(*given, call.how)

        kernel, calls = kernel_for(q), _calls(how, q)
        if _is_whole(calls, q, k):
            return tuple(grad.transpose(1, 2) for grad in gradients(calls[0]))
        # Tiles that share keys or queries are summed in full precision.
        once = all(call.tile.fresh_queries and call.tile.fresh_keys for call in calls)
        dq, dk, dv = (native.zeros_for(x, x.dtype if once else sum_dtype(x.dtype)) for x in (q, k, v))
        for call in calls:
            places = call.q(dq), call.k(dk), call.k(dv)
            fresh = call.tile.fresh_queries, call.tile.fresh_keys, call.tile.fresh_keys
            for place, part, is_first in zip(places, gradients(call), fresh, strict=True):
                if is_first:
                    place.copy_(part)
                else:
                    place += part
        return tuple(grad.to(q.dtype) for grad in (dq, dk, dv))
