"""The block mask of FlexAttention: from positions, and on to the portable plan of tiles.

B batch rows, S key tokens, Q query tokens; M query blocks, N key blocks.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from torchtitan_lite.attention.mask import Ranges, intervals
from torchtitan_lite.attention.tiles import FULL, Tile, Tiles, build_tiles
from torchtitan_lite.attention.transfer import to_device


def build_block_mask(
    positions_BS: Tensor,
    queries: Ranges | None,
    sliding_window: int | None,
    blocks: tuple[int, int],
    device: torch.device,
) -> BlockMask:
    """The block mask of documents, straight from the interval of keys that each query sees.

    It is built where the positions are and then moved to `device`: on a GPU, sixty small kernels would build
    it. It needs no tensor of Q x S, as `create_block_mask` does uncompiled, and no wait for the device.
    A block is full when the latest start and the earliest end of its queries' intervals enclose its keys,
    and touched when the earliest start and the latest end meet them.
    """
    seq_len = positions_BS.shape[1]
    first_BQ, last_Q = intervals(positions_BS, queries, sliding_window)
    n_queries = last_Q.shape[0]
    first_BMq = _blocked(first_BQ, blocks[0], fill=seq_len)
    last_Mq = _blocked(last_Q, blocks[0], fill=-1)
    key_N = torch.arange(0, seq_len, blocks[1], device=positions_BS.device)
    end_N = (key_N + blocks[1]).clamp(max=seq_len)
    touched_BMN = (first_BMq.amin(-1)[..., None] < end_N) & (last_Mq.amax(-1)[:, None] >= key_N)
    full_BMN = (first_BMq.amax(-1)[..., None] <= key_N) & (last_Mq.amin(-1)[:, None] >= key_N + blocks[1] - 1)
    partial_BMN = touched_BMN & ~full_BMN

    first_BQ, last_Q = (to_device(x.int(), device) for x in (first_BQ, last_Q))

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv >= first_BQ[b, q]) & (kv <= last_Q[q])

    block_mask = BlockMask.from_kv_blocks(
        *_block_list(partial_BMN),
        *_block_list(full_BMN),
        BLOCK_SIZE=blocks,
        mask_mod=sees,
        seq_lengths=(n_queries, seq_len),
    )
    for name, value in list(vars(block_mask).items()):
        if isinstance(value, Tensor):
            setattr(block_mask, name, to_device(value, device))
    return block_mask


def _blocked(x_Q: Tensor, size: int, fill: int) -> Tensor:
    """The last axis in blocks, [..., M, size], filled up at its end."""
    return nn.functional.pad(x_Q, (0, -x_Q.shape[-1] % size), value=fill).unflatten(-1, (-1, size))


def _block_list(chosen_BMN: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row of blocks has, [B, 1, M], and which, those first, [B, 1, M, N]."""
    order_BMN = torch.argsort(chosen_BMN.int(), dim=-1, descending=True, stable=True)
    return chosen_BMN.sum(-1, dtype=torch.int32)[:, None], order_BMN.int()[:, None]


def block_row_tiles(block_mask: BlockMask, shape: tuple[int, int, int]) -> Tiles:
    """The same mask as tiles: for each row of blocks, its runs of full and of partial blocks."""
    batch, n_queries, seq_len = shape
    size_q, size_k = block_mask.BLOCK_SIZE
    mask_rows = block_mask.kv_num_blocks.shape[0]
    assert block_mask.kv_num_blocks.shape[1] == 1, "one mask for all heads"
    assert block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None
    partial = _lists(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = _lists(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)

    tiles: list[Tile] = []
    masks: dict[bytes, tuple[int, Tensor]] = {}  # most blocks have the mask of another: the diagonal's, say
    n_masked = 0
    for row in range(mask_rows):
        rows = (0, batch) if mask_rows == 1 else (row, row + 1)
        for block in range(len(partial[row])):
            q0, q1 = block * size_q, min((block + 1) * size_q, n_queries)
            for is_full, start, stop in _runs(full[row][block], partial[row][block]):
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
    return build_tiles(tiles, [seen for _, seen in masks.values()], shape, torch.device("cpu"))


def _lists(count_B1M: Tensor, index_B1MN: Tensor) -> list[list[list[int]]]:
    """The key blocks of each row of blocks of each batch row."""
    pairs = zip(count_B1M[:, 0].tolist(), index_B1MN[:, 0].tolist(), strict=True)
    return [[index[:n] for n, index in zip(*pair, strict=True)] for pair in pairs]


def _runs(full: list[int], partial: list[int]) -> Iterator[tuple[bool, int, int]]:
    """Neighbouring blocks of the same kind, as (full, first, past the last), in order."""
    blocks = sorted([(n, True) for n in full] + [(n, False) for n in partial])
    for (is_full, _), run in groupby(enumerate(blocks), key=lambda item: (item[1][1], item[1][0] - item[0])):
        numbers = [n for _, (n, _) in run]
        yield is_full, numbers[0], numbers[-1] + 1
