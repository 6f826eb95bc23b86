"""The tiles of a FlexAttention block mask.

B batch rows, M query blocks, N key blocks.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from torchtitan_lite.attention.operator import Calls
from torchtitan_lite.attention.portable.tiles import FULL, Tile, tile_calls


def block_tiles(block_mask: BlockMask, shape: tuple[int, int, int]) -> Calls:
    """For each row of blocks, a tile for each stretch of full and of partial blocks. `shape` is (B, Q, S)."""
    batch, n_queries, seq_len = shape
    size_q, size_k = block_mask.BLOCK_SIZE
    mask_rows = block_mask.kv_num_blocks.shape[0]
    assert block_mask.kv_num_blocks.shape[1] == 1, "one mask for all heads"
    assert block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None
    partial = _lists(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = _lists(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)

    tiles: list[Tile] = []
    masks: dict[bytes, tuple[int, Tensor]] = {}  # many blocks have the same mask: the diagonal, for one
    n_masked = 0
    for row in range(mask_rows):
        rows = (0, batch) if mask_rows == 1 else (row, row + 1)
        for block in range(len(partial[row])):
            q0, q1 = block * size_q, min((block + 1) * size_q, n_queries)
            for is_full, start, stop in _stretches(full[row][block], partial[row][block]):
                k0, k1 = start * size_k, min(stop * size_k, seq_len)
                if is_full:
                    tiles.append(Tile(*rows, q0, q1, k0, k1, FULL))
                    continue
                b, h = torch.tensor(row), torch.tensor(0)
                seen = block_mask.mask_mod(b, h, torch.arange(q0, q1)[:, None], torch.arange(k0, k1))
                content = seen.numpy().tobytes()
                if content not in masks:
                    masks[content] = n_masked, seen
                    n_masked += seen.numel()
                tiles.append(Tile(*rows, q0, q1, k0, k1, masks[content][0]))
    return tile_calls(tiles, [seen for _, seen in masks.values()], shape, "cpu")


def _lists(count_B1M: Tensor, index_B1MN: Tensor) -> list[list[list[int]]]:
    """The key blocks of each row of blocks of each batch row."""
    pairs = zip(count_B1M[:, 0].tolist(), index_B1MN[:, 0].tolist(), strict=True)
    return [[index[:n] for n, index in zip(*pair, strict=True)] for pair in pairs]


def _stretches(full: list[int], partial: list[int]) -> Iterator[tuple[bool, int, int]]:
    """Neighbouring blocks of the same kind, as (full, first, past the last), in order."""
    blocks = sorted([(n, True) for n in full] + [(n, False) for n in partial])
    for (is_full, _), same in groupby(enumerate(blocks), key=lambda item: (item[1][1], item[1][0] - item[0])):
        numbers = [n for _, (n, _) in same]
        yield is_full, numbers[0], numbers[-1] + 1
