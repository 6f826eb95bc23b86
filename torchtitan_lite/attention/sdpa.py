"""Attention by torch's scaled_dot_product_attention: runs everywhere.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, K head dim.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchtitan_lite.attention.capabilities import FLOATS, Capabilities, Refusal
from torchtitan_lite.attention.mask import Ranges, check_inputs
from torchtitan_lite.attention.tile_kernels import attend, has_cuda_flash
from torchtitan_lite.attention.tiles import Tiles, document_tiles


@dataclass(frozen=True, kw_only=True)
class Sdpa:
    """torch's scaled_dot_product_attention, a document at a time where they are packed: runs everywhere."""

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
    ) -> Tiles:
        """What may attend to what, for one micro-batch and all layers; see docs/attention.md."""
        return document_tiles(positions_BS, queries, sliding_window, device)


class SdpaAttention(nn.Module):
    """One kernel call for rows of one document each, else a loop over documents."""

    def forward(
        self, q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Tiles, scale: float | None = None
    ) -> Tensor:
        """Attend; [B, Q, H, K]."""
        # On a CPU the plan's one call is the same kernel, without the random state that torch.compile would
        # keep for it when it is computed again.
        if not q_BQHK.is_cuda or not mask.causal_rows or _only_quadratic(q_BQHK, k_BSGK, v_BSGK):
            return attend(q_BQHK, k_BSGK, v_BSGK, mask, scale)
        scale = check_inputs(q_BQHK, k_BSGK, v_BSGK, mask.shape, scale)
        return attend_whole_rows(q_BQHK, k_BSGK, v_BSGK, scale, fastest_first(q_BQHK.device))


def fastest_first(device: torch.device) -> list[SDPBackend] | None:
    """A GPU's kernels by their speed, the fastest first, where torch's own order is another; else None.

    On Hopper cuDNN's is up to 75 % faster than FlashAttention-2 (https://pytorch.org/blog/pytorch2-5/).
    """
    if torch.cuda.get_device_capability(device) == (9, 0):
        fused = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
        return [*fused, SDPBackend.MATH]
    return None


def attend_whole_rows(
    q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, scale: float, order: list[SDPBackend] | None = None
) -> Tensor:
    """Attend in one kernel call, where every row is one document; [B, S, H, K].

    Of torch's kernels the first of `order` that can do it; without one, the first of torch's own order.
    """
    q_BHSK, k_BGSK, v_BGSK = (x.transpose(1, 2) for x in (q_BSHK, k_BSGK, v_BSGK))
    with sdpa_kernel(order, set_priority=True) if order else nullcontext():
        out_BHSK = F.scaled_dot_product_attention(
            q_BHSK, k_BGSK, v_BGSK, is_causal=True, scale=scale, enable_gqa=q_BHSK.shape[1] != k_BGSK.shape[1]
        )
    return out_BHSK.transpose(1, 2)


def _only_quadratic(q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor) -> bool:
    """Whether torch would repeat the keys and make the scores of S x S.

    So where the features of a head are no neighbours, and where neither FlashAttention nor the
    memory-efficient kernel can be used: that one takes no grouped heads and no float64.
    """
    if q_BQHK.stride(-1) != 1 or k_BSGK.stride(-1) != 1 or v_BSGK.stride(-1) != 1:
        return True
    if has_cuda_flash(q_BQHK):
        return False
    return q_BQHK.shape[2] != k_BSGK.shape[2] or q_BQHK.dtype == torch.float64
