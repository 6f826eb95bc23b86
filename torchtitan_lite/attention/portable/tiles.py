"""The mask as tiles: rectangles of (queries, keys) to compute, so that no tensor is S x S.

B batch rows, S key tokens, Q query tokens.

A plain kernel computes a tile in one call: all of it, its causal half (as many queries as keys), or under a
small explicit mask. Tiles of the same queries are merged by their log-sum-exp. `evaluate.py` does all this.
"""

from collections.abc import Iterator
from itertools import chain, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_lite.attention.mask import Ranges, check_window, count_queries, segments
from torchtitan_lite.attention.operator import Calls, make_calls

FULL, CAUSAL, BAND, ROWS = range(4)
"""Values of Tile.kind. BAND: query i sees the tile's keys [i, i + Calls.window). ROWS: each row has one
query, and Calls.data starts with a mask [rows, keys], True where the row's query sees the key."""

WINDOW_STEP = 128
"""Queries of a tile in a sliding window: fewer means more calls, more means larger masks."""


class Tile(NamedTuple):
    """Queries [q0, q1) against keys [k0, k1), in the rows [row0, row1)."""

    row0: int
    row1: int
    q0: int
    q1: int
    k0: int
    k1: int
    kind: int
    fresh_queries: bool = True
    """Whether this is the first tile with these queries: there is nothing to merge its results with."""
    fresh_keys: bool = True


def document_tiles(
    positions_BS: Tensor,
    queries: Ranges | None = None,
    sliding_window: int | None = None,
    device: torch.device | str = "cpu",
) -> Calls:
    """A causal tile for each document, after a full tile if the document has keys before its queries."""
    check_window(sliding_window)
    segments_N5 = segments(positions_BS.cpu(), queries)
    batch, seq_len = positions_BS.shape
    shape = batch, count_queries(queries, seq_len), seq_len
    by_row: dict[int, list[tuple[int, int, int, int]]] = {row: [] for row in range(batch)}
    for row, q0, q1, k0, k1 in segments_N5.tolist():
        by_row[row].append((q0, q1, k0, k1))
    rows_differ = any(spans != by_row[0] for spans in by_row.values())
    # Only on a CPU: a GPU's fast kernel takes no mask.
    if shape[1] == 1 and rows_differ and torch.device(device).type == "cpu":
        seen_BS = torch.zeros(batch, seq_len, dtype=torch.bool)
        for row, spans in by_row.items():
            for _, _, k0, k1 in spans:
                seen_BS[row, k0 if sliding_window is None else max(k0, k1 - sliding_window) : k1] = True
        # One call under a mask of B x S. With one query for each row, a call for each row would cost more.
        return make_calls("tiles", [Tile(0, batch, 0, 1, 0, seq_len, ROWS)], seen_BS.flatten(), shape, device)
    tiles = []
    # Rows with the same documents are one batch for the kernel.
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
    """The tiles (q0, q1, k0, k1, kind) of one segment; see mask.segments."""
    window = sliding_window or k1 - k0
    first = k1 - (q1 - q0)  # the first query, counted as a key
    unbanded = min(k1, max(first, k0 + window))  # queries before this one see their document from its start
    if first < unbanded:
        yield from _causal_tiles(q0, q0 + unbanded - first, k0, unbanded)
    for start in range(unbanded, k1, WINDOW_STEP):
        stop = min(start + WINDOW_STEP, k1)
        for k_start, k_stop, kind in _band_tiles(start, stop, window):
            yield q0 + start - first, q0 + stop - first, k_start, k_stop, kind


def _band_tiles(start: int, stop: int, window: int) -> Iterator[tuple[int, int, int]]:
    """The keys (k0, k1, kind) of queries [start, stop) whose whole window lies in their document."""
    n, edge = stop - start, start - window + 1
    if window <= n:
        yield edge, stop, BAND
        return
    if n > 1:
        yield edge, stop - window, BAND
    yield stop - window, start, FULL
    yield start, stop, CAUSAL


def _causal_tiles(q0: int, q1: int, k0: int, k1: int) -> Iterator[tuple[int, ...]]:
    """Bottom-right causal attention out of full and square causal tiles."""
    diagonal = k1 - (q1 - q0)
    if q1 - q0 == 1:
        yield q0, q1, k0, k1, FULL
        return
    if k0 < diagonal:
        yield q0, q1, k0, diagonal, FULL
    yield q0, q1, diagonal, k1, CAUSAL
