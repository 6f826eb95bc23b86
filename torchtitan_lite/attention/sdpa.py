"""Attention by torch's scaled_dot_product_attention: runs everywhere.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, K head dim.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtitan_lite.attention.capabilities import FLOATS, Capabilities, Refusal
from torchtitan_lite.attention.mask import Ranges, check_inputs
from torchtitan_lite.attention.runs import PackedMask, attend_packed, build_runs
from torchtitan_lite.attention.tile_kernels import attend, has_cuda_flash
from torchtitan_lite.attention.tiles import document_tiles


@dataclass(frozen=True, kw_only=True)
class Sdpa:
    """torch's scaled_dot_product_attention; packed documents in one call (CUDA, half precision) or a loop."""

    kind: Literal["sdpa"] = "sdpa"

    supports: ClassVar[tuple[Capabilities, ...]] = (
        Capabilities(name="sdpa", devices=("cpu", "cuda"), dtypes=FLOATS),
    )

    def implementation(self, device: str) -> Capabilities:
        """What runs on "cpu" or "cuda"."""
        return self.supports[0]

    def option_refusals(self, device: str) -> list[Refusal]:
        """Nothing: there are no options."""
        return []

    def build(self) -> nn.Module:
        """The inner attention."""
        return SdpaAttention()

    def mask(
        self,
        positions_BS: Tensor,
        queries: Ranges | None = None,
        sliding_window: int | None = None,
        device: torch.device | str | None = None,
    ) -> PackedMask:
        """What may attend to what, for one micro-batch and all layers; see docs/attention.md."""
        device = torch.device(device) if device is not None else positions_BS.device
        positions_BS = positions_BS.cpu()  # once, for both plans
        tiles = document_tiles(positions_BS, queries, sliding_window, device)
        if device.type == "cpu" or tiles.causal_rows:
            return PackedMask(tiles, None)
        # Both plans: the dtype is not known here, and decides whether the GPU's kernel can be used.
        return PackedMask(tiles, build_runs(positions_BS, queries, sliding_window, device))


class SdpaAttention(nn.Module):
    """One kernel call for rows of one document each, else a loop over documents.

    On a GPU packed rows are one call too, of torch's variable-length FlashAttention, if it takes the dtype
    and the head_dim.
    """

    def forward(
        self, q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: PackedMask, scale: float | None = None
    ) -> Tensor:
        """Attend; [B, Q, H, K]."""
        tiles, runs = mask.tiles, mask.runs
        assert tiles is not None
        # On a CPU the plan makes the same kernel call, without a random state that torch.compile would keep
        # for the recompute.
        if q_BQHK.is_cuda and tiles.causal_rows and not _only_quadratic(q_BQHK, k_BSGK, v_BSGK):
            scale = check_inputs(q_BQHK, k_BSGK, v_BSGK, tiles.shape, scale)
            return attend_whole_rows(q_BQHK, k_BSGK, v_BSGK, scale)
        if runs is not None and has_cuda_flash(q_BQHK):
            return attend_packed(q_BQHK, k_BSGK, v_BSGK, runs, scale)
        return attend(q_BQHK, k_BSGK, v_BSGK, tiles, scale)


def attend_whole_rows(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, scale: float) -> Tensor:
    """Attend in one kernel call, where every row is one document; [B, S, H, K].

    torch chooses the kernel.
    """
    q_BHSK, k_BGSK, v_BGSK = (x.transpose(1, 2) for x in (q_BSHK, k_BSGK, v_BSGK))
    out_BHSK = F.scaled_dot_product_attention(
        q_BHSK, k_BGSK, v_BGSK, is_causal=True, scale=scale, enable_gqa=q_BHSK.shape[1] != k_BGSK.shape[1]
    )
    return out_BHSK.transpose(1, 2)


def _only_quadratic(q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> bool:
    """True if torch would fall back to its quadratic kernel.

    Torch does so if the features of a head are not adjacent in memory, or if neither FlashAttention nor the
    memory-efficient kernel can run: the latter takes no grouped heads and no float64.
    """
    if q_BQHK.stride(-1) != 1 or k_BSGK.stride(-1) != 1 or v_BSGK.stride(-1) != 1:
        return True
    if has_cuda_flash(q_BQHK):
        return False
    return q_BQHK.shape[2] != k_BSGK.shape[2] or q_BQHK.dtype == torch.float64
