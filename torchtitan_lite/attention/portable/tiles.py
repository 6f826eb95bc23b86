"""The mask as tiles: rectangles of (queries, keys) to compute, so that no tensor is S x S.

B batch rows, S key tokens, Q query tokens.

A plain kernel computes a tile in one call: all of it, its causal half (as many queries as keys), or under a
small explicit mask. Tiles of the same queries are merged by their log-sum-exp. `evaluate.py` does all this.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_lite.attention.mask import Ranges, check_window, count_queries, segments
from torchtitan_lite.attention.operator import Calls, make_calls

FULL, CAUSAL, ROWS = -1, -2, -3
"""Values of Tile.kind. A value >= 0 is the index of the tile's mask in Calls.data. ROWS: Calls.data starts
with a mask for each row of the tile."""

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


def tile_calls(
    tiles: Sequence[Tile], masks: list[Tensor], shape: tuple[int, int, int], device: torch.device | str
) -> Calls:
    """A table of tiles. A row: a Tile, whether it is the first with its queries, and with its keys.

    Tiles of the same rows follow each other. `masks` are True where a query sees a key.
    """
    rows, q_end, k_end, row = [], 0, 0, None
    for tile in tiles:
        if tile.row0 != row:
            row, q_end, k_end = tile.row0, 0, 0
        rows.append((*tile, tile.q0 >= q_end, tile.k0 >= k_end))
        q_end, k_end = max(q_end, tile.q1), max(k_end, tile.k1)
    flat = [torch.zeros(0, dtype=torch.bool), *(mask.flatten() for mask in masks)]
    return make_calls("tiles", rows or [[0] * (len(Tile._fields) + 2)], flat, shape, device)


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
        return tile_calls([Tile(0, batch, 0, 1, 0, seq_len, ROWS)], [seen_BS], shape, device)
    masks = BandMasks(sliding_window)
    tiles = []
    # Rows with the same documents are one batch for the kernel.
    for spans, same in groupby(by_row, key=lambda row: by_row[row]):
        rows = list(same)
        for span in spans:
            tiles += [Tile(rows[0], rows[-1] + 1, *tile) for tile in _tiles_of(*span, masks)]
    return tile_calls(tiles, masks.found, shape, device)


class BandMasks:
    """The masks that a sliding window needs, one for each shape of tile."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.found: list[Tensor] = []
        self._starts: dict[tuple[int, int, int], int] = {}

    def start(self, n_queries: int, n_keys: int, behind: int) -> int:
        """The index of a tile's mask in Calls.data; `behind`: keys of the tile before its first query."""
        assert self.window is not None
        shape = n_queries, n_keys, behind
        if shape not in self._starts:
            self._starts[shape] = sum(mask.numel() for mask in self.found)
            ones = torch.ones(n_queries, n_keys, dtype=torch.bool)
            self.found.append(ones.tril(behind) & ones.triu(behind - self.window + 1))
        return self._starts[shape]


def _tiles_of(q0: int, q1: int, k0: int, k1: int, masks: BandMasks) -> Iterator[tuple[int, ...]]:
    """The tiles (q0, q1, k0, k1, kind) of one segment; see mask.segments."""
    window = k1 - k0 if masks.window is None else masks.window
    first = k1 - (q1 - q0)  # the first query, counted as a key
    unbanded = min(k1, max(first, k0 + window))  # queries before this one see their document from its start
    if first < unbanded:
        yield from _causal_tiles(q0, q0 + unbanded - first, k0, unbanded)
    for start in range(unbanded, k1, WINDOW_STEP):
        stop = min(start + WINDOW_STEP, k1)
        for k_start, k_stop, kind in _band_tiles(start, stop, window, masks):
            yield q0 + start - first, q0 + stop - first, k_start, k_stop, kind


def _band_tiles(start: int, stop: int, window: int, masks: BandMasks) -> Iterator[tuple[int, int, int]]:
    """The keys (k0, k1, kind) of queries [start, stop) whose whole window lies in their document."""
    n, edge = stop - start, start - window + 1
    if window <= n:
        yield edge, stop, masks.start(n, stop - edge, window - 1)
        return
    if n > 1:
        yield edge, stop - window, masks.start(n, n - 1, window - 1)
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
