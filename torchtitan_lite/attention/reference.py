"""The slow reference for every backend, with explicit scores, an explicit mask and repeated key/value heads.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, K head dim.
"""

import torch
from torch import Tensor

from torchtitan_lite.attention.mask import Ranges, explicit_mask


def reference_attention(
    q_BQHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    positions_BS: Tensor,
    queries: Ranges | None = None,
    sliding_window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return attention [B, Q, H, K], 0 on padding, from Q x S scores in float32 (float64 if q is float64)."""
    wide = torch.float64 if q_BQHK.dtype == torch.float64 else torch.float32
    repeats = q_BQHK.shape[2] // k_BSGK.shape[2]
    k_BSHK, v_BSHK = (x.to(wide).repeat_interleave(repeats, dim=2) for x in (k_BSGK, v_BSGK))
    factor = q_BQHK.shape[-1] ** -0.5 if scale is None else scale
    scores_BHQS = torch.einsum("bqhk,bshk->bhqs", q_BQHK.to(wide), k_BSHK) * factor
    seen_B1QS = explicit_mask(positions_BS, queries, sliding_window)[:, None]
    # The fill is finite: with -inf, a query that sees no key would get NaN, here and in its gradient.
    p_BHQS = scores_BHQS.masked_fill(~seen_B1QS, torch.finfo(wide).min).softmax(-1) * seen_B1QS
    return torch.einsum("bhqs,bshk->bqhk", p_BHQS, v_BSHK).to(q_BQHK.dtype)
