"""Attention by torch's FlexAttention: a block mask, compiled to one kernel.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, K head dim;
M query blocks, N key blocks.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

from torchtitan_lite.attention.capabilities import FLOATS, HALVES, Capabilities, Refusal
from torchtitan_lite.attention.mask import Ranges, check_positions, check_shapes, intervals
from torchtitan_lite.attention.tile_kernels import attend
from torchtitan_lite.attention.tiles import FULL, Tile, Tiles, build_tiles

logger = logging.getLogger(__name__)

FLASH_BLOCKS = {9: (128, 128), 10: (256, 128)}
"""The block size that the FLASH backend takes, by major compute capability: Hopper and Blackwell."""


@dataclass(frozen=True, kw_only=True)
class Flex:
    """FlexAttention: a mask of blocks, compiled to one kernel."""

    kind: Literal["flex"] = "flex"

    block_size: int | tuple[int, int] = 128
    """Tile of the block mask, in tokens: one number, or query and key tokens."""

    kernel_options: dict[str, Any] = field(default_factory=dict)
    """Options of the CUDA kernel, as torch's FlexKernelOptions has them, such as {"BACKEND": "FLASH"}."""

    supports: ClassVar[tuple[Capabilities, ...]] = (
        Capabilities(name="flex (cpu)", devices=("cpu",), dtypes=FLOATS),
        Capabilities(
            name="flex (triton)",
            devices=("cuda",),
            dtypes=("float32", *HALVES),
            head_dim_multiple=16,
            head_dim_max=256,
        ),
        Capabilities(
            name="flex (flash)",
            devices=("cuda",),
            dtypes=HALVES,
            head_dim_multiple=8,
            head_dim_max=128,
            packages=("flash_attn.cute",),
            gpu_majors=tuple(FLASH_BLOCKS),
            install="pip install flash-attn-4",
        ),
    )

    @property
    def blocks(self) -> tuple[int, int]:
        """(query, key) tokens of a block."""
        size_q, size_k = (self.block_size,) * 2 if isinstance(self.block_size, int) else self.block_size
        return size_q, size_k

    @property
    def flash(self) -> bool:
        """Whether the kernel is FlashAttention-4."""
        return self.kernel_options.get("BACKEND") == "FLASH"

    def implementation(self, device: str) -> Capabilities:
        """What runs on "cpu" or "cuda"."""
        cpu, triton, flash = self.supports
        return flash if self.flash else cpu if device == "cpu" else triton

    def option_refusals(self, device: str) -> list[Refusal]:
        """What is wrong with the options themselves, on "cpu" or "cuda"."""
        found = list(self._block_refusals())
        known = FlexKernelOptions.__annotations__
        for key, value in self.kernel_options.items():
            if key not in known:
                found.append(
                    Refusal(
                        f"kernel_options.{key}",
                        value,
                        "is no option of FlexAttention",
                        f"use one of {sorted(known)}",
                    )
                )
        backends = ("AUTO", "TRITON", "FLASH", "TRITON_DECODE")
        backend = self.kernel_options.get("BACKEND", "AUTO")
        if backend not in backends:
            found.append(
                Refusal(
                    "kernel_options.BACKEND", backend, f"is none of {list(backends)}", "choose one of them"
                )
            )
        if device == "cpu" and self.kernel_options:
            rule = "is for CUDA kernels, and the device is cpu"
            found.append(
                Refusal(
                    "kernel_options",
                    self.kernel_options,
                    rule,
                    "use job.device = cuda, or leave the kernel options empty",
                )
            )
        if (
            device == "cuda"
            and self.flash
            and torch.cuda.is_available()
            and (lack := self.supports[2].missing())
        ):
            found.append(
                Refusal(
                    "kernel_options",
                    self.kernel_options,
                    f"needs {self.supports[2].needs}, and {lack}",
                    "use another BACKEND",
                )
            )
        return found

    def _block_refusals(self) -> Iterator[Refusal]:
        if any(size < 16 or size & (size - 1) for size in self.blocks):
            yield Refusal("block_size", self.block_size, "must be powers of two from 16 up", "use 128")
        elif self.flash:
            major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None
            allowed = [FLASH_BLOCKS[major]] if major in FLASH_BLOCKS else list(FLASH_BLOCKS.values())
            if self.blocks not in allowed:
                choices = " or ".join(str(list(size)) for size in allowed)
                yield Refusal(
                    "block_size", self.block_size, "does not fit the FLASH backend", f"use {choices}"
                )

    def build(self) -> nn.Module:
        """The inner attention."""
        return FlexAttention(self.kernel_options)

    def mask(
        self,
        positions_BS: Tensor,
        queries: Ranges | None = None,
        sliding_window: int | None = None,
        device: torch.device | str | None = None,
    ) -> "FlexMask":
        """What may attend to what, for one micro-batch and all layers; see docs/attention.md."""
        if positions_BS.device.type == "cpu":
            check_positions(positions_BS)
        device = torch.device(device) if device is not None else positions_BS.device
        batch, seq_len = positions_BS.shape
        if device.type == "cpu" and bool((positions_BS == positions_BS[:1]).all()):
            positions_BS = positions_BS[:1]  # equal rows: one batch for every kernel call
        block_mask = build_block_mask(positions_BS.to(device), queries, sliding_window, self.blocks)
        shape = batch, block_mask.seq_lengths[0], seq_len
        if device.type != "cpu":
            return FlexMask(block_mask, None, shape)
        _say_once_that_the_cpu_goes_block_row_by_block_row()
        return FlexMask(block_mask, block_row_tiles(block_mask, shape), shape)


@dataclass(frozen=True)
class FlexMask:
    """A block mask for the kernel and, on a CPU, the same mask as a plan of tiles."""

    block_mask: BlockMask
    tiles: Tiles | None
    shape: tuple[int, int, int]
    """(B, Q, S) of the micro-batch."""


class FlexAttention(nn.Module):
    """FlexAttention on CUDA; on a CPU, where it has no backward, the same mask block row by block row."""

    def __init__(self, kernel_options: dict[str, Any]) -> None:
        super().__init__()
        self.kernel_options = dict(kernel_options) or None

    def forward(
        self, q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: FlexMask, scale: float | None = None
    ) -> Tensor:
        """Attend; [B, Q, H, K]."""
        if mask.tiles is not None:
            return attend(q_BQHK, k_BSGK, v_BSGK, mask.tiles, scale)
        check_shapes(q_BQHK, k_BSGK, v_BSGK, mask.shape)
        q_BHQK, k_BGSK, v_BGSK = (x.transpose(1, 2) for x in (q_BQHK, k_BSGK, v_BSGK))
        out_BHQK = _compiled()(
            q_BHQK,
            k_BGSK,
            v_BGSK,
            block_mask=mask.block_mask,
            scale=scale,
            enable_gqa=q_BHQK.shape[1] != k_BGSK.shape[1],
            kernel_options=self.kernel_options,
        )
        return out_BHQK.transpose(1, 2)


@cache
def _compiled() -> Callable[..., Any]:
    # One compiled function for all layers: uncompiled, FlexAttention builds the scores of S x S.
    return torch.compile(flex_attention)


@cache
def _say_once_that_the_cpu_goes_block_row_by_block_row() -> None:
    logger.warning(
        "FlexAttention has no backward on a CPU: "
        "the same block mask is evaluated block row by block row with SDPA"
    )


def build_block_mask(
    positions_BS: Tensor, queries: Ranges | None, sliding_window: int | None, blocks: tuple[int, int]
) -> BlockMask:
    """The block mask of documents, straight from the interval of keys that each query sees.

    Neither a tensor of Q x S (which `create_block_mask` makes when not compiled) nor a wait for the device.
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

    first_BQ, last_Q = first_BQ.int(), last_Q.int()

    def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return (kv >= first_BQ[b, q]) & (kv <= last_Q[q])

    return BlockMask.from_kv_blocks(
        *_block_list(partial_BMN),
        *_block_list(full_BMN),
        BLOCK_SIZE=blocks,
        mask_mod=sees,
        seq_lengths=(n_queries, seq_len),
    )


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
