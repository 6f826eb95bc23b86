"""The mask cut into tiles, rectangles of queries and keys to compute, so that no tensor has size S x S.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, K head dim;
b, n, m: rows, queries and keys of a tile.

A plain kernel computes a tile in one call. The call computes the whole tile, the causal half of a square
tile, or the part that a small explicit mask allows. Tiles of the same queries are merged by their
log-sum-exp. The backward of each tile uses the merged output and log-sum-exp, and is exact (FlashAttention,
https://arxiv.org/abs/2205.14135, section 3.1 and appendix B.4).
"""

from collections.abc import Iterator
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_lite.attention.mask import Ranges, check_window, count_queries, segments
from torchtitan_lite.attention.operator import EVALUATORS, Calls, Work, make_calls, sum_dtype
from torchtitan_lite.attention.portable import native
from torchtitan_lite.attention.portable.kernels import OneTile, finite, kernel_for

FULL, CAUSAL, BAND, ROWS = range(4)
"""The values of Tile.kind. FULL: every query sees every key. CAUSAL: query i sees the tile's keys [0, i + 1).
BAND: query i sees the tile's keys [i, i + Calls.window). ROWS: each row has one query, and Calls.data starts
with a mask [rows, keys], True where the row's query sees the key."""

WINDOW_STEP = 128
"""The queries in a tile of a sliding window. A smaller number means more calls, a larger one larger masks."""


class Tile(NamedTuple):
    """The queries [q0, q1) and the keys [k0, k1) of batch rows [row0, row1), for one kernel call."""

    row0: int
    row1: int
    q0: int
    q1: int
    k0: int
    k1: int
    kind: int
    fresh_queries: bool = True
    """True if this is the first tile with these queries, so that there are no results to merge with."""
    fresh_keys: bool = True

    def q(self, x_BQHK: Tensor) -> Tensor:
        """Return the tile's part [b, H, n, K] of q, the output or their gradients, or [b, H, n] of lse."""
        return x_BQHK[self.row0 : self.row1, self.q0 : self.q1].transpose(1, 2)

    def k(self, x_BSGK: Tensor) -> Tensor:
        """Return the tile's part [b, G, m, K] of k, of v, or of a gradient of k or v."""
        return x_BSGK[self.row0 : self.row1, self.k0 : self.k1].transpose(1, 2)


def document_tiles(
    positions_BS: Tensor,
    queries: Ranges | None = None,
    sliding_window: int | None = None,
    device: torch.device | str = "cpu",
) -> Calls:
    """Return the tiles of a micro-batch as kernel calls.

    Each document has a causal tile, and a full tile before it if the document has keys before its queries. A
    sliding window adds tiles of the kind BAND.
    """
    check_window(sliding_window)
    segments_N5 = segments(positions_BS.cpu(), queries)
    batch, seq_len = positions_BS.shape
    shape = batch, count_queries(queries, seq_len), seq_len
    by_row: dict[int, list[tuple[int, int, int, int]]] = {row: [] for row in range(batch)}
    for row, q0, q1, k0, k1 in segments_N5.tolist():
        by_row[row].append((q0, q1, k0, k1))
    rows_differ = any(spans != by_row[0] for spans in by_row.values())
    # This is only for a CPU: the fast kernel of a GPU takes no mask.
    if shape[1] == 1 and rows_differ and torch.device(device).type == "cpu":
        seen_BS = torch.zeros(batch, seq_len, dtype=torch.bool)
        for row, spans in by_row.items():
            for _, _, k0, k1 in spans:
                seen_BS[row, k0 if sliding_window is None else max(k0, k1 - sliding_window) : k1] = True
        # One call with a mask [B, S] computes all rows. A call for each row, of one query, would cost more.
        return make_calls("tiles", [Tile(0, batch, 0, 1, 0, seq_len, ROWS)], seen_BS.flatten(), shape, device)
    tiles = []
    # Adjacent rows with the same documents share their tiles, so that one call computes all of these rows.
    for spans, same in groupby(by_row, key=lambda row: by_row[row]):
        rows, q_end, k_end = list(same), 0, 0
        for q0, q1, k0, k1, kind in chain(*(_tiles_of(*span, sliding_window) for span in spans)):
            tiles.append(Tile(rows[0], rows[-1] + 1, q0, q1, k0, k1, kind, q0 >= q_end, k0 >= k_end))
            q_end, k_end = max(q_end, q1), max(k_end, k1)
    no_data = torch.zeros(0, dtype=torch.bool)
    return make_calls(
        "tiles", tiles or [Tile(0, 0, 0, 0, 0, 0, FULL)], no_data, shape, device, sliding_window
    )


def _tiles_of(q0: int, q1: int, k0: int, k1: int, sliding_window: int | None) -> Iterator[tuple[int, ...]]:
    """Yield the tiles (q0, q1, k0, k1, kind) of one segment. `mask.segments` explains the arguments."""
    window = sliding_window or k1 - k0
    first = k1 - (q1 - q0)  # the key index of the first query
    unbanded = min(k1, max(first, k0 + window))  # earlier queries see their document from its start
    if first < unbanded:
        yield from _causal_tiles(q0, q0 + unbanded - first, k0, unbanded)
    for start in range(unbanded, k1, WINDOW_STEP):
        stop = min(start + WINDOW_STEP, k1)
        for k_start, k_stop, kind in _band_tiles(start, stop, window):
            yield q0 + start - first, q0 + stop - first, k_start, k_stop, kind


def _band_tiles(start: int, stop: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Yield tiles (k0, k1, kind) of the queries [start, stop), whose whole window is in their document."""
    n, edge = stop - start, start - window + 1
    if window <= n:
        yield edge, stop, BAND
        return
    if n > 1:
        yield edge, stop - window, BAND
    yield stop - window, start, FULL
    yield start, stop, CAUSAL


def _causal_tiles(q0: int, q1: int, k0: int, k1: int) -> Iterator[tuple[int, ...]]:
    """Split causal attention, aligned at the bottom right, into a full tile and a square causal tile."""
    diagonal = k1 - (q1 - q0)
    if q1 - q0 == 1:
        yield q0, q1, k0, k1, FULL
        return
    if k0 < diagonal:
        yield q0, q1, k0, diagonal, FULL
    yield q0, q1, diagonal, k1, CAUSAL


def is_native(q_BQHK: Tensor, table: Tensor) -> bool:
    """Return True if the compiled kernel computes these tiles. The kernel takes only whole documents."""
    if not native.takes(q_BQHK):
        return False
    table = table[table[:, 0] < table[:, 1]]
    q0, q1, k0, k1, kind = table[:, 2:7].unbind(1)
    # The tile of a document of one token is FULL.
    is_document = (kind == CAUSAL) | ((q1 - q0 == 1) & (k1 - k0 == 1) & (kind == FULL))
    return bool(is_document.all() and table[:, 7:].all() and torch.equal(q0, k0))


def _calls(work: Work, q_BQHK: Tensor) -> list[tuple[Tile, OneTile]]:
    """Return the tiles, each with the options of its kernel call."""
    calls, masks = [], {}
    for tile in (Tile(*fields) for fields in work.table.tolist() if fields[0] < fields[1]):
        shape = tile.q1 - tile.q0, tile.k1 - tile.k0, tile.kind
        if shape not in masks:
            masks[shape] = _additive_mask(tile, work, q_BQHK)
        calls.append((tile, OneTile(tile.kind == CAUSAL, masks[shape], work.scale)))
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
    # The mask has q's dtype: with float64 queries, torch's CPU kernel accepts a float32 mask and misreads it.
    return torch.where(seen, 0.0, float("-inf")).to(q_BQHK.dtype)


def _is_whole(calls: list[tuple[Tile, OneTile]], q_BQHK: Tensor, k_BSGK: Tensor) -> bool:
    """Return True if one call on a CPU computes everything, so that no results must be combined.

    For a query that sees no key, the CPU kernel returns an output of 0 and a log-sum-exp of 0.
    """
    (batch, n_queries), n_keys = q_BQHK.shape[:2], k_BSGK.shape[1]
    return q_BQHK.is_cpu and len(calls) == 1 and calls[0][0][:6] == (0, batch, 0, n_queries, 0, n_keys)


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys into attention over all of them."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((x - finite(lse)).exp()[..., None] for x in (lse_a, lse_b))
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


class TileEvaluator:
    """An evaluator that computes attention tile by tile. The log-sum-exp is [B, Q, H]."""

    def lse_shape(self, q_BQHK):
        return q_BQHK.shape[:3]

    def forward(self, q, k, v, how):
        if is_native(q, how.table):
            return native.forward(q, k, v, how)
        kernel, calls = kernel_for(q), _calls(how, q)
        found = (kernel.forward(tile.q(q), tile.k(k), tile.k(v), one) for tile, one in calls)
        if _is_whole(calls, q, k):
            out, lse = next(found)
            return out.transpose(1, 2), lse.transpose(1, 2).contiguous()
        out_BQHK = torch.zeros_like(q)
        lse_BQH = torch.zeros(q.shape[:3], dtype=sum_dtype(q.dtype), device=q.device)
        for (tile, one), (out, lse) in zip(calls, found, strict=True):
            if one.mask is not None:  # the CPU kernel returns 0 for a query that sees no key of this tile
                lse = lse.masked_fill(one.mask.isneginf().all(-1), float("-inf"))
            out_bHnK, lse_bHn = tile.q(out_BQHK), tile.q(lse_BQH)
            if not tile.fresh_queries:
                out, lse = _merge(out_bHnK, lse_bHn, out, lse)
            out_bHnK.copy_(out)
            lse_bHn.copy_(lse)
        # For a query that sees no key at all, any finite log-sum-exp gives weights of 0 in the backward.
        return out_BQHK, lse_BQH.masked_fill_(lse_BQH.isneginf(), 0)

    def backward(self, dout, q, k, v, out, lse, how):
        if is_native(q, how.table):
            return native.backward(dout, q, k, v, out, lse, how)
        kernel, calls = kernel_for(q), _calls(how, q)

        def gradients(tile: Tile, one: OneTile) -> tuple[Tensor, ...]:
            given = tile.q(dout), tile.q(q), tile.k(k), tile.k(v), tile.q(out), tile.q(lse)
            return kernel.backward(*given, one)

        if _is_whole(calls, q, k):
            return tuple(grad.transpose(1, 2) for grad in gradients(*calls[0]))
        # Gradients of tiles that share keys or queries are summed in full precision.
        once = all(tile.fresh_queries and tile.fresh_keys for tile, _ in calls)
        dq, dk, dv = (native.zeros_for(x, x.dtype if once else sum_dtype(x.dtype)) for x in (q, k, v))
        for tile, one in calls:
            places = tile.q(dq), tile.k(dk), tile.k(dv)
            fresh = tile.fresh_queries, tile.fresh_keys, tile.fresh_keys
            for place, part, is_first in zip(places, gradients(tile, one), fresh, strict=True):
                if is_first:
                    place.copy_(part)
                else:
                    place += part
        return tuple(grad.to(q.dtype) for grad in (dq, dk, dv))


EVALUATORS["tiles"] = TileEvaluator()
