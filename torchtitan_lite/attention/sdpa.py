"""Attention by torch's scaled_dot_product_attention, which runs everywhere.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, K head dim.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_lite.attention.capabilities import FLOATS, Capabilities, Refusal
from torchtitan_lite.attention.mask import Ranges, check_inputs, query_ranges
from torchtitan_lite.attention.operator import Calls, attend
from torchtitan_lite.attention.packs import document_packs
from torchtitan_lite.attention.portable.kernels import has_cuda_flash
from torchtitan_lite.attention.portable.tiles import document_tiles


@dataclass(frozen=True, kw_only=True)
class Sdpa:
    """torch's scaled_dot_product_attention. Packed rows are one call (CUDA, half precision) or a loop."""

    kind: Literal["sdpa"] = "sdpa"

    supports: ClassVar[tuple[Capabilities, ...]] = (
        Capabilities(name="sdpa", devices=("cpu", "cuda"), dtypes=FLOATS),
    )

    def implementation(self, device: str) -> Capabilities:
        return self.supports[0]

    def option_refusals(self, device: str) -> list[Refusal]:
        return []

    def build(self) -> nn.Module:
        return SdpaAttention()

    def mask(
        self,
        positions_BS: Tensor,
        queries: Ranges | None = None,
        sliding_window: int | None = None,
        device: torch.device | str | None = None,
    ) -> "SdpaMask":
        device = torch.device(positions_BS.device if device is None else device)
        positions_BS = positions_BS.cpu()  # once, for the tiles and the packs
        tiles = document_tiles(positions_BS, queries, sliding_window, device)
        if device.type == "cpu":
            return SdpaMask(tiles)
        seq_len = positions_BS.shape[1]
        has_all = query_ranges(queries, seq_len) == ((0, seq_len),) and (sliding_window or seq_len) >= seq_len
        if has_all and bool((positions_BS == torch.arange(seq_len)).all()):
            return SdpaMask(tiles, one_document=True)
        # Make tiles and packs: the kernel for packs takes only half precision, and the dtype is unknown here.
        return SdpaMask(tiles, document_packs(positions_BS, queries, sliding_window, device))


@dataclass(frozen=True)
class SdpaMask:
    """The mask in each form that `SdpaAttention` may use."""

    tiles: Calls
    packs: Calls | None = None
    one_document: bool = False
    """True if every row is one document, in which every query sees all keys up to its own."""


class SdpaAttention(nn.Module):
    """Attention in one kernel call if every row is one document, otherwise in a loop over documents.

    On a GPU, torch's variable-length FlashAttention computes packed rows in one call too, if it takes the
    dtype and the head dim.
    """

    def forward(
        self, q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: SdpaMask, scale: float | None = None
    ) -> Tensor:
        # On a CPU the tiles make the same kernel call, without a random state. torch.compile would keep the
        # random state for the recomputation.
        if q_BQHK.is_cuda and mask.one_document and not _only_quadratic(q_BQHK, k_BSGK, v_BSGK):
            scale = check_inputs(q_BQHK, k_BSGK, v_BSGK, mask.tiles.shape, scale)
            return attend_whole_rows(q_BQHK, k_BSGK, v_BSGK, scale)
        if mask.packs is not None and has_cuda_flash(q_BQHK):
            return attend(q_BQHK, k_BSGK, v_BSGK, mask.packs, scale)
        return attend(q_BQHK, k_BSGK, v_BSGK, mask.tiles, scale)


def attend_whole_rows(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, scale: float) -> Tensor:
    """Return attention [B, S, H, K] from the kernel that torch chooses. Every row must be one document."""
    q_BHSK, k_BGSK, v_BGSK = (x.transpose(1, 2) for x in (q_BSHK, k_BSGK, v_BSGK))
    out_BHSK = F.scaled_dot_product_attention(
        q_BHSK, k_BGSK, v_BGSK, is_causal=True, scale=scale, enable_gqa=q_BHSK.shape[1] != k_BGSK.shape[1]
    )
    return out_BHSK.transpose(1, 2)


def _only_quadratic(q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> bool:
    """Return True if torch would fall back to its quadratic kernel.

    Torch falls back if the features of a head are not adjacent in memory, or if neither FlashAttention nor
    the memory-efficient kernel can run. The memory-efficient kernel takes no grouped heads and no float64.
    """
    if q_BQHK.stride(-1) != 1 or k_BSGK.stride(-1) != 1 or v_BSGK.stride(-1) != 1:
        return True
    if has_cuda_flash(q_BQHK):
        return False
    return q_BQHK.shape[2] != k_BSGK.shape[2] or q_BQHK.dtype == torch.float64
