"""The kernels that compute one tile, a rectangle of queries and keys, forward and backward.

H query heads, G key/value heads, K head dim; b, n, m: rows, queries and keys of a tile;
M = H / G * n: the queries of all heads that share a key head.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_lite.attention.operator import HALF, Kernel, contiguous_like, sum_dtype
from torchtitan_lite.attention.portable import native

aten = torch.ops.aten
_cpu_flash = aten._scaled_dot_product_flash_attention_for_cpu
_cpu_flash_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward

BLOCK = 256
"""The number of queries in each call of torch's CPU kernel if `CpuKernel` computes attention in blocks."""
MANY = 768
"""The number of queries at which torch's kernel itself begins to use larger blocks and to skip hidden blocks
(aten/src/ATen/native/cpu/FlashAttentionKernel.cpp)."""


class OneTile(NamedTuple):
    """The options of a kernel call for one tile.

    The kernel's q and output are [b, H, n, K], its k and v [b, G, m, K], its log-sum-exp [b, H, n].
    """

    causal: bool
    mask: Tensor | None
    """The tensor that is added to the scores. A causal tile has no mask."""
    scale: float


class CpuKernel:
    """torch's FlashAttention for CPUs, which takes any float type, grouped heads and an additive mask.

    torch computes keys in blocks of 512, and skips a block of keys only if it is hidden from a whole block of
    queries. With up to 512 tokens torch skips no block. So causal attention of medium length is given to
    torch in blocks of queries, each with the keys that the block sees.
    """

    def forward(self, q, k, v, how):
        causal, mask, scale = how
        if not causal or not _is_medium(q):
            return _cpu_flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        out_bnHK, lses = torch.empty_like(q.transpose(1, 2)), []
        for rows, keys, hidden in _causal_blocks(q):
            part = q[:, :, rows], k[:, :, keys], v[:, :, keys]
            out, lse = _cpu_flash(*part, 0.0, hidden is None, attn_mask=hidden, scale=scale)
            out_bnHK[:, rows] = out.transpose(1, 2)
            lses.append(lse)
        return out_bnHK.transpose(1, 2), torch.cat(lses, 2)

    def backward(self, dout, q, k, v, out, lse, how):
        (causal, mask, scale), dtype = how, q.dtype
        if dtype in HALF and q.shape[2] < MANY and not native.has_amx():
            # torch multiplies half-precision matrices slowly for so few queries: three times slower with 64.
            dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
            mask = None if mask is None else mask.float()
        if not causal or not _is_medium(q):
            found = _cpu_flash_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
            return tuple(x.to(dtype) for x in found)
        dq_bnHK = contiguous_like(q.transpose(1, 2))
        dk_bmGK, dv_bmGK = (native.zeros_for(x.transpose(1, 2), sum_dtype(x.dtype)) for x in (k, v))
        for rows, keys, hidden in _causal_blocks(q):
            part = dout[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys]
            kept = out[:, :, rows], lse[:, :, rows]
            dq, dk, dv = _cpu_flash_backward(*part, *kept, 0.0, hidden is None, attn_mask=hidden, scale=scale)
            dq_bnHK[:, rows] = dq.transpose(1, 2)
            dk_bmGK[:, keys] += dk.transpose(1, 2)
            dv_bmGK[:, keys] += dv.transpose(1, 2)
        return tuple(x.to(dtype).transpose(1, 2) for x in (dq_bnHK, dk_bmGK, dv_bmGK))


def _is_medium(q: Tensor) -> bool:
    """Return True if causal attention of these queries is faster in blocks."""
    return BLOCK < q.shape[2] < MANY


def _causal_blocks(q: Tensor):
    """Yield the queries, the keys and the additive mask of each block. The first block is causal: no mask."""
    n = q.shape[2]
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        hidden = torch.full((stop - start, stop), float("-inf"), dtype=q.dtype) if start else None
        yield slice(start, stop), slice(0, stop), None if hidden is None else hidden.triu_(start + 1)


class CudaKernel:
    """torch's FlashAttention-2 for CUDA: fp16, bf16, grouped heads. Tiles with a mask go to PlainKernel."""

    def forward(self, q, k, v, how):
        if how.mask is not None:
            return PlainKernel().forward(q, k, v, how)
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, how.causal, scale=how.scale)
        return out, lse

    def backward(self, dout, q, k, v, out, lse, how):
        if how.mask is not None:
            return PlainKernel().backward(dout, q, k, v, out, lse, how)
        # There is no dropout, so the random state is never read.
        seed, unused = (torch.empty(n, dtype=torch.uint64, device=q.device) for n in (2, 0))
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2],
            0.0, how.causal, seed, unused, scale=how.scale,
        )  # fmt: skip


class PlainKernel:
    """The slow reference kernel: matrix products in float32 or float64, `block` queries at a time."""

    def __init__(self, block: int = 256) -> None:
        self.block = block

    def forward(self, q, k, v, how):
        outs, lses = [], []
        for rows, keys in self._blocks(q, k, how.causal):
            scores_bGMm = self._scores(q, k, rows, keys, how)
            lse_bGM = scores_bGMm.logsumexp(-1)
            p_bGMm = (scores_bGMm - finite(lse_bGM)[..., None]).exp()
            n = rows.stop - rows.start
            outs.append(_by_head(p_bGMm @ v[:, :, keys].to(p_bGMm.dtype), n))
            lses.append(_by_head(lse_bGM, n))
        return torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2)

    def backward(self, dout, q, k, v, out, lse, how):
        wide, groups = sum_dtype(q.dtype), k.shape[1]
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
        for rows, keys in self._blocks(q, k, how.causal):
            q_bGMK, dout_bGMK, out_bGMK, lse_bGM = (
                _by_group(x[:, :, rows].to(wide), groups) for x in (q, dout, out, lse)
            )
            scores_bGMm = self._scores(q, k, rows, keys, how)
            p_bGMm = (scores_bGMm - finite(lse_bGM)[..., None]).exp()
            delta_bGM = (dout_bGMK * out_bGMK).sum(-1)
            ds_bGMm = p_bGMm * (dout_bGMK @ v[:, :, keys].to(wide).mT - delta_bGM[..., None]) * how.scale
            dq[:, :, rows] += _by_head(ds_bGMm @ k[:, :, keys].to(wide), rows.stop - rows.start)
            dk[:, :, keys] += ds_bGMm.mT @ q_bGMK
            dv[:, :, keys] += p_bGMm.mT @ dout_bGMK
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _blocks(self, q: Tensor, k: Tensor, causal: bool) -> Iterator[tuple[slice, slice]]:
        """Yield slices of the queries, each with the slice of the keys that these queries need."""
        n = q.shape[2]
        for start in range(0, n, self.block):
            stop = min(start + self.block, n)
            yield slice(start, stop), slice(0, stop if causal else k.shape[2])

    def _scores(self, q, k, rows: slice, keys: slice, how: OneTile) -> Tensor:
        """Return the scaled, masked scores of a block, [b, G, M, m]."""
        wide, n = sum_dtype(q.dtype), rows.stop - rows.start
        scores = _by_group(q[:, :, rows].to(wide), k.shape[1]) @ k[:, :, keys].to(wide).mT * how.scale
        if how.causal:
            hidden = torch.full((n, keys.stop), float("-inf"), device=q.device).triu(rows.start + 1)
        elif how.mask is not None:
            hidden = how.mask[..., rows, keys].unsqueeze(-3)
        else:
            return scores
        return (scores.unflatten(2, (-1, n)) + hidden).flatten(2, 3)


def _by_group(x_bHn: Tensor, groups: int) -> Tensor:
    """Reshape [b, H, n, ...] to [b, G, M, ...]."""
    return x_bHn.unflatten(1, (groups, -1)).flatten(2, 3)


def _by_head(x_bGM: Tensor, n: int) -> Tensor:
    """Reshape [b, G, M, ...] to [b, H, n, ...]."""
    return x_bGM.unflatten(2, (-1, n)).flatten(1, 2)


def finite(lse: Tensor) -> Tensor:
    """Replace -inf in a log-sum-exp, so that a query that sees no key gets weights of 0, not NaN."""
    return lse.clamp(min=torch.finfo(lse.dtype).min)


def kernel_for(q_BQHK: Tensor) -> Kernel:
    """Return the kernel that computes tiles on the device and in the dtype of `q_BQHK`."""
    if q_BQHK.device.type == "cpu":
        return CpuKernel()
    return CudaKernel() if has_cuda_flash(q_BQHK) else PlainKernel()


def has_cuda_flash(q_BQHK: Tensor) -> bool:
    """Return True if torch's FlashAttention for CUDA takes queries of this device, dtype and head dim."""
    head_dim = q_BQHK.shape[-1]
    fits = q_BQHK.is_cuda and q_BQHK.dtype in HALF and head_dim % 8 == 0 and head_dim <= 256
    return fits and torch.cuda.get_device_capability(q_BQHK.device) >= (8, 0)
