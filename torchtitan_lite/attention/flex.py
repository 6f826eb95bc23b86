"""Attention by torch's FlexAttention, which compiles a block mask into one kernel.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, K head dim;
M query blocks, N key blocks.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

from torchtitan_lite.attention import kernel_cache
from torchtitan_lite.attention.capabilities import FLOATS, HALVES, INSTALL_FA4, Capabilities, Refusal
from torchtitan_lite.attention.mask import Ranges, check_inputs, check_positions, intervals, to_device
from torchtitan_lite.attention.operator import Calls, attend
from torchtitan_lite.attention.portable.tiles import document_tiles

logger = logging.getLogger(__name__)

FLASH_BLOCKS = {9: (128, 128), 10: (256, 128)}
"""The (query, key) block size of the FLASH backend by major compute capability: 9 is Hopper, 10 Blackwell."""

TRITON_BLOCKS = (32, 128)
"""The smallest default tile of the Triton kernels (in the backward) and the largest, in tokens.

A tile must divide a block.
"""

AUTOTUNED_TILE = 64
"""The smallest tile that torch's autotuning tries in the forward (get_flex_attn_fwd_configs of inductor)."""


@dataclass(frozen=True, kw_only=True)
class Flex:
    """FlexAttention, which compiles a block mask into one kernel."""

    kind: Literal["flex"] = "flex"

    block_size: int | tuple[int, int] = 128
    """Size of a mask block in tokens: one number, or the number of queries and the number of keys."""

    kernel_options: dict[str, Any] = field(default_factory=dict)
    """Options of the CUDA kernel, from torch's FlexKernelOptions, such as {"BACKEND": "FLASH"}."""

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
            install=INSTALL_FA4,
            deterministic=False,
        ),
    )

    @property
    def blocks(self) -> tuple[int, int]:
        """The number of query tokens and the number of key tokens in a block."""
        size_q, size_k = (self.block_size,) * 2 if isinstance(self.block_size, int) else self.block_size
        return size_q, size_k

    @property
    def autotuned(self) -> bool:
        """True if torch must find smaller tiles: the Triton kernels' default tiles may exceed a block."""
        return not self.flash and min(self.blocks) < TRITON_BLOCKS[1]

    @property
    def flash(self) -> bool:
        """True if the kernel is FlashAttention-4."""
        return self.kernel_options.get("BACKEND") == "FLASH"

    def implementation(self, device: str) -> Capabilities:
        cpu, triton, flash = self.supports
        return flash if self.flash else cpu if device == "cpu" else triton

    def option_refusals(self, device: str) -> list[Refusal]:
        if self.kernel_options and (rule := self._kernel_lack(device)):
            # The kernel cannot run here, so its other options do not matter.
            options = {} if device == "cpu" else {**self.kernel_options}
            options.pop("BACKEND", None)
            remedy = "leave the options of the kernel out" if device == "cpu" else "use another BACKEND"
            refusal = Refusal("kernel_options", self.kernel_options, rule, remedy, (options,))
            return [refusal, *replace(self, kernel_options=options).option_refusals(device)]
        found = [*self._block_refusals(device), *self._kernel_refusals()]
        if device == "cuda" and torch.cuda.is_available() and (fault := kernel_cache.fault(device)):
            found.append(Refusal("kind", self.kind, *fault))
        return found

    def _kernel_lack(self, device: str) -> str | None:
        """Return the rule by which `device` cannot run the kernel that `kernel_options` are for, or None."""
        if device == "cpu":
            return "is for CUDA kernels, and the device is cpu"
        return self.implementation(device).unmet_here() if self.flash else None

    def _block_refusals(self, device: str) -> Iterator[Refusal]:
        allowed: list[tuple[int, int]] = []
        if self.flash:
            major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else None
            allowed = [FLASH_BLOCKS[major]] if major in FLASH_BLOCKS else list(FLASH_BLOCKS.values())
        remedy = f"use {' or '.join(str(list(size)) for size in allowed) or TRITON_BLOCKS[1]}"
        if any(size < 16 or size & (size - 1) for size in self.blocks):
            yield Refusal("block_size", self.block_size, "must be powers of two from 16 up", remedy)
        elif allowed and self.blocks not in allowed:
            yield Refusal("block_size", self.block_size, "does not fit the FLASH backend", remedy)
        elif device == "cuda" and min(self.blocks) < TRITON_BLOCKS[0]:
            rule = f"is less than {TRITON_BLOCKS[0]}, the smallest tile of the Triton kernels"
            yield Refusal("block_size", self.block_size, rule, remedy)

    def _kernel_refusals(self) -> Iterator[Refusal]:
        known = get_type_hints(FlexKernelOptions)
        for name, value in self.kernel_options.items():
            field, hint = f"kernel_options.{name}", known.get(name.removeprefix("fwd_").removeprefix("bwd_"))
            choices = get_args(hint)
            if hint is None:
                remedy = (
                    f"leave it out, or name one of {', '.join(known)}, or one of these after fwd_ or bwd_"
                )
                yield Refusal(field, value, "is no option of FlexAttention", remedy)
            elif choices and value not in choices:
                rule, remedy = "is no backend of FlexAttention", f"use one of {', '.join(choices)}"
                yield Refusal(field, value, rule, remedy, choices)
            elif not choices and type(value) is not hint:
                right = "true or false" if hint is bool else "a whole number"
                yield Refusal(field, value, f"is not {right}", f"write {right}, or leave it out")

    def build(self) -> nn.Module:
        tiles = {}
        if self.autotuned:
            # A forward tile must not exceed a block, and autotuning tries no tile below AUTOTUNED_TILE.
            size_q, size_k = (min(size, AUTOTUNED_TILE) for size in self.blocks)
            tiles = {"BLOCK_M": size_q, "BLOCK_N": size_k}
        return FlexAttention({**tiles, **self.kernel_options}, self.autotuned)

    def mask(
        self,
        positions_BS: Tensor,
        queries: Ranges | None = None,
        sliding_window: int | None = None,
        device: torch.device | str | None = None,
    ) -> "FlexMask | Calls":
        device = torch.device(positions_BS.device if device is None else device)
        if device.type == "cpu":
            _warn_once_of_the_cpu()
            return document_tiles(positions_BS, queries, sliding_window, device)
        if positions_BS.is_cpu:
            check_positions(positions_BS)
        block_mask = build_block_mask(positions_BS, queries, sliding_window, self.blocks, device)
        batch, seq_len = positions_BS.shape
        return FlexMask(block_mask, (batch, block_mask.seq_lengths[0], seq_len))


@dataclass(frozen=True)
class FlexMask:
    """The block mask of a micro-batch, for the CUDA kernel."""

    block_mask: BlockMask
    shape: tuple[int, int, int]
    """The sizes (B, Q, S) of the micro-batch."""


def build_block_mask(
    positions_BS: Tensor,
    queries: Ranges | None,
    sliding_window: int | None,
    blocks: tuple[int, int],
    device: torch.device,
) -> BlockMask:
    """Return the block mask of documents, built from the interval of keys that each query sees.

    The mask is built on the device of `positions_BS` and then moved to `device`: building a mask on a GPU
    takes sixty small kernels. The host does not wait for the device. No tensor has size Q x S, whereas
    `create_block_mask` without compilation makes such a tensor. A block is full if each of its queries sees
    all of its keys: the latest start and the earliest end of the intervals decide. A block is touched if at
    least one of its queries sees at least one of its keys: the earliest start and the latest end decide.
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
    """Cut the last axis into blocks, [..., M, size]. The last block is padded with `fill`."""
    return nn.functional.pad(x_Q, (0, -x_Q.shape[-1] % size), value=fill).unflatten(-1, (-1, size))


def _block_list(chosen_BMN: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each row of blocks, the number of chosen blocks and the indices of all blocks.

    The numbers are [B, 1, M], the indices [B, 1, M, N]. The indices of the chosen blocks come first.
    """
    order_BMN = torch.argsort(chosen_BMN.int(), dim=-1, descending=True, stable=True)
    return chosen_BMN.sum(-1, dtype=torch.int32)[:, None], order_BMN.int()[:, None]


class FlexAttention(nn.Module):
    """FlexAttention with a block mask on CUDA. On a CPU, a loop over documents replaces FlexAttention."""

    def __init__(self, kernel_options: dict[str, Any], autotuned: bool) -> None:
        super().__init__()
        self.kernel_options = dict(kernel_options)
        # For fewer than 128 queries torch uses its decoding kernel, which raises unless all queries of a key
        # head fit one block of the mask. So only a single query may use that kernel.
        is_chosen = {"BACKEND", "FORCE_USE_FLEX_ATTENTION"} & kernel_options.keys()
        self.options_of_several = {**({} if is_chosen else {"BACKEND": "TRITON"}), **kernel_options}
        # The function is looked up here: in the forward, torch.compile would trace the cache of `_compiled`.
        self.flex_attention = _compiled(autotuned)

    def forward(
        self,
        q_BQHK: Tensor,
        k_BSGK: Tensor,
        v_BSGK: Tensor,
        mask: FlexMask | Calls,
        scale: float | None = None,
    ) -> Tensor:
        if isinstance(mask, Calls):
            return attend(q_BQHK, k_BSGK, v_BSGK, mask, scale)
        scale = check_inputs(q_BQHK, k_BSGK, v_BSGK, mask.shape, scale)
        q_BHQK, k_BGSK, v_BGSK = (x.transpose(1, 2) for x in (q_BQHK, k_BSGK, v_BSGK))
        out_BHQK = self.flex_attention(
            q_BHQK,
            k_BGSK,
            v_BGSK,
            block_mask=mask.block_mask,
            scale=scale,
            enable_gqa=q_BHQK.shape[1] != k_BGSK.shape[1],
            kernel_options=self.kernel_options if q_BHQK.shape[2] == 1 else self.options_of_several,
        )
        return out_BHQK.transpose(1, 2)


@cache
def _compiled(autotuned: bool) -> Callable[..., Any]:
    # All layers share one compiled function. Without compilation, FlexAttention builds all S x S scores.
    return torch.compile(flex_attention, options={"max_autotune": True} if autotuned else None)


@cache
def _warn_once_of_the_cpu() -> None:
    logger.warning(
        "FlexAttention has no backward on a CPU: the mask is computed document by document, as sdpa does"
    )
