"""The portable plan of attention: which rectangles of (queries, keys) to compute, so that nothing is S x S.

B batch rows, S key tokens, Q query tokens, n tiles.

A tile is a rectangle of some rows' queries and keys that one plain kernel call computes: all of it, its
causal half (as many queries as keys), or under a small explicit mask. Tiles of the same queries are merged
by their log-sum-exp. `tile_kernels.py` evaluates the plan.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_lite.attention.mask import Ranges, check_window, of_any_length, query_ranges, segments
from torchtitan_lite.attention.transfer import to_device

FULL, CAUSAL, ROWS = -1, -2, -3
"""Values of Tile.kind; a value >= 0 is where the tile's mask starts in Tiles.masks. ROWS: there is one for
each row there, from the start on."""

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


_NOTHING = (*Tile(0, 0, 0, 0, 0, 0, CAUSAL), True, True)
"""A tile of no rows."""


@dataclass(frozen=True)
class Tiles:
    """A plan for one micro-batch: the same for every layer, and nothing in it waits for a device."""

    table: Tensor
    """[n, 9] int64 on the CPU: a Tile a row, then whether its queries and its keys are first seen."""
    masks: Tensor
    """The explicit masks of the tiles, flat: bool, True where a query sees a key."""
    shape: tuple[int, int, int]
    """(B, Q, S) of the micro-batch."""
    causal_rows: bool = False
    """Whether this is plain causal: every row one document, every token a query, no window."""


def build_tiles(
    tiles: Iterable[Tile], found: list[Tensor], shape: tuple[int, int, int], device: torch.device
) -> Tiles:
    """Put tiles, those of the same rows and queries next to each other, into a plan."""
    tiles = list(tiles)
    rows, q_end, k_end, group = [], 0, 0, None
    for tile in tiles:
        if tile.row0 != group:
            group, q_end, k_end = tile.row0, 0, 0
        rows.append((*tile, tile.q0 >= q_end, tile.k0 >= k_end))
        q_end, k_end = max(q_end, tile.q1), max(k_end, tile.k1)
    # torch.compile would make a constant of a length of 0 or 1.
    rows += [_NOTHING] * max(0, 2 - len(rows))
    flat = torch.cat([mask.flatten() for mask in found]) if found else torch.zeros(2, dtype=torch.bool)
    table = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), len(Tile._fields) + 2)
    batch, n_queries, seq_len = shape
    causal_rows = n_queries == seq_len and tiles == [Tile(0, batch, 0, seq_len, 0, seq_len, CAUSAL)]
    masks = of_any_length(to_device(flat, device))
    return Tiles(of_any_length(table), masks, shape, causal_rows)


def document_tiles(
    positions_BS: Tensor,
    queries: Ranges | None = None,
    sliding_window: int | None = None,
    device: torch.device | str | None = None,
) -> Tiles:
    """Plan a loop over documents: a causal tile each, after a full one where earlier keys are no queries."""
    check_window(sliding_window)
    device = torch.device(device) if device is not None else positions_BS.device
    found_N5 = segments(positions_BS.cpu(), queries)
    batch, seq_len = positions_BS.shape
    by_row: dict[int, list[tuple[int, int, int, int]]] = {row: [] for row in range(batch)}
    for row, q0, q1, k0, k1 in found_N5.tolist():
        by_row[row].append((q0, q1, k0, k1))

    n_queries = sum(stop - start for start, stop in query_ranges(queries, seq_len))
    # On a CPU: a GPU has a fast kernel for a call without a mask, and none for this one.
    if n_queries == 1 and device.type == "cpu" and any(pieces != by_row[0] for pieces in by_row.values()):
        return _one_query_each(by_row, seq_len, sliding_window, device)
    masks = BandMasks(sliding_window)
    tiles = []
    # Rows with the same documents are one batch for the kernel.
    for _, same in groupby(by_row.items(), key=lambda item: item[1]):
        group = list(same)
        rows, pieces = (group[0][0], group[-1][0] + 1), group[0][1]
        tiles += [Tile(*rows, *tile) for piece in pieces for tile in _segment_tiles(*piece, masks)]
    return build_tiles(tiles, masks.found, (batch, n_queries, seq_len), device)


def _one_query_each(
    by_row: dict[int, list[tuple[int, int, int, int]]], seq_len: int, window: int | None, device: torch.device
) -> Tiles:
    """Plan one call for all rows, under a mask of B x S: with one query each, a call a row costs more."""
    seen_BS = torch.zeros(len(by_row), seq_len, dtype=torch.bool)
    for row, pieces in by_row.items():
        for _, _, k0, k1 in pieces:
            seen_BS[row, k0 if window is None else max(k0, k1 - window) : k1] = True
    tile = Tile(0, len(by_row), 0, 1, 0, seq_len, ROWS)
    return build_tiles([tile], [seen_BS], (len(by_row), 1, seq_len), device)


class BandMasks:
    """The masks that a sliding window needs, one for each shape of tile."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.found: list[Tensor] = []
        self._starts: dict[tuple[int, int, int], int] = {}

    def start(self, n_queries: int, n_keys: int, behind: int) -> int:
        """Where in the flat masks a tile's mask starts; `behind`: keys of the tile before its first query."""
        assert self.window is not None
        shape = n_queries, n_keys, behind
        if shape not in self._starts:
            self._starts[shape] = sum(mask.numel() for mask in self.found)
            ones = torch.ones(n_queries, n_keys, dtype=torch.bool)
            self.found.append(ones.tril(behind) & ones.triu(behind - self.window + 1))
        return self._starts[shape]


def _segment_tiles(q0: int, q1: int, k0: int, k1: int, masks: BandMasks) -> Iterator[tuple[int, ...]]:
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
