"""Evaluate a plan of tiles, forward and backward, with whatever plain kernel the device has.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, R = H / G, K head dim;
b, n, m: a tile's rows, queries and keys.

A registered operator, so that torch.compile sees one node however many tiles there are. Autograd keeps
q, k, v, the output and its log-sum-exp. Tiles of the same queries are merged by log-sum-exp; the backward
of each tile with the merged output and log-sum-exp is then exact (FlashAttention's own argument:
https://arxiv.org/abs/2205.14135, section 3.1 and appendix B.4).
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torchtitan_lite.attention import native
from torchtitan_lite.attention.mask import check_inputs
from torchtitan_lite.attention.strides import laid_out_like, unit_stride
from torchtitan_lite.attention.tiles import CAUSAL, FULL, ROWS, Tile, Tiles

aten = torch.ops.aten
_cpu_flash = aten._scaled_dot_product_flash_attention_for_cpu
_cpu_flash_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
HALF = (torch.bfloat16, torch.float16)

BLOCK = 256
"""Queries of a call to torch's kernel for CPUs, where causal attention is computed in blocks."""
MANY = 768
"""So many queries it takes in larger blocks itself (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp)."""


class Kernel(Protocol):
    """Attention of one rectangle, [b, H, n, K] and [b, G, m, K], and its gradient; lse is [b, H, n]."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        causal: bool, mask: Tensor | None, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


class CpuKernel:
    """torch's FlashAttention for CPUs: any float type, grouped heads, an additive mask.

    It computes keys in blocks of 512, and of those leaves out what is hidden from a whole block of queries:
    nothing, for up to 512 tokens. So causal attention of medium length goes to it a few queries at a time,
    each with no more keys than they see (`WholeCpuKernel` is the reference).
    """

    def forward(self, q, k, v, causal, mask, scale):
        if not causal or not _is_medium(q):
            return _cpu_flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        out_bnHK, lses = torch.empty_like(q.transpose(1, 2)), []
        for rows, keys, diagonal in _causal_blocks(q):
            part = q[:, :, rows], k[:, :, keys], v[:, :, keys]
            out, lse = _cpu_flash(*part, 0.0, diagonal is None, attn_mask=diagonal, scale=scale)
            out_bnHK[:, rows] = out.transpose(1, 2)
            lses.append(lse)
        return out_bnHK.transpose(1, 2), torch.cat(lses, 2)

    def backward(self, dout, q, k, v, out, lse, causal, mask, scale):
        dtype = q.dtype
        if dtype in HALF and q.shape[2] < MANY and not native.has_amx():
            # Its products of halves are slow for so few queries: with 64 of them three times.
            dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
            mask = None if mask is None else mask.float()
        if not causal or not _is_medium(q):
            whole = dout, q, k, v, out, lse
            dq, dk, dv = _cpu_flash_backward(*whole, 0.0, causal, attn_mask=mask, scale=scale)
            return dq.to(dtype), dk.to(dtype), dv.to(dtype)
        dq_bnHK = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
        dk_bmGK, dv_bmGK = (native.zeros_for(x.transpose(1, 2), sum_dtype(x.dtype)) for x in (k, v))
        for rows, keys, diagonal in _causal_blocks(q):
            part = dout[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys]
            kept = out[:, :, rows], lse[:, :, rows]
            dq, dk, dv = _cpu_flash_backward(
                *part, *kept, 0.0, diagonal is None, attn_mask=diagonal, scale=scale
            )
            dq_bnHK[:, rows] = dq.transpose(1, 2)
            dk_bmGK[:, keys] += dk.transpose(1, 2)
            dv_bmGK[:, keys] += dv.transpose(1, 2)
        dq, dk, dv = (x.to(dtype).transpose(1, 2) for x in (dq_bnHK, dk_bmGK, dv_bmGK))
        return dq, dk, dv


class WholeCpuKernel:
    """torch's FlashAttention for CPUs, called once: the reference of `CpuKernel`."""

    def forward(self, q, k, v, causal, mask, scale):
        return _cpu_flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)

    def backward(self, dout, q, k, v, out, lse, causal, mask, scale):
        return _cpu_flash_backward(dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)


def _is_medium(q: Tensor) -> bool:
    """Whether causal attention of these queries is faster in blocks."""
    return BLOCK < q.shape[2] < MANY


def _causal_blocks(q: Tensor):
    """Slices of the queries and of the keys that those see, and the mask of all but the first of them."""
    n = q.shape[2]
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        hidden = torch.full((stop - start, stop), float("-inf"), dtype=q.dtype) if start else None
        yield slice(start, stop), slice(0, stop), None if hidden is None else hidden.triu_(start + 1)


class CudaKernel:
    """torch's FlashAttention-2 for CUDA: fp16 and bf16, grouped heads, no mask."""

    def forward(self, q, k, v, causal, mask, scale):
        if mask is not None:
            return PlainKernel().forward(q, k, v, causal, mask, scale)
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return out, lse

    def backward(self, dout, q, k, v, out, lse, causal, mask, scale):
        if mask is not None:
            return PlainKernel().backward(dout, q, k, v, out, lse, causal, mask, scale)
        # The random state serves dropout alone, of which there is none.
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)
        return aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2],
            0.0, causal, seed, unused, scale=scale,
        )  # fmt: skip


class PlainKernel:
    """Matrix products in float32 or float64, some queries at a time: slow, the other kernels' reference."""

    def __init__(self, block: int = 256) -> None:
        self.block = block

    def forward(self, q, k, v, causal, mask, scale):
        outs, lses = [], []
        for rows, n_keys in self._blocks(q, k, causal):
            scores_bGRnm = self._scores(q[:, :, rows], k[:, :, :n_keys], rows, causal, mask, scale)
            lse_bGRn = scores_bGRnm.logsumexp(-1)
            p_bGRnm = (scores_bGRnm - _finite(lse_bGRn)[..., None]).exp()
            out_bGRnK = (p_bGRnm.flatten(2, 3) @ v[:, :, :n_keys].to(p_bGRnm.dtype)).unflatten(
                2, p_bGRnm.shape[2:4]
            )
            outs.append(out_bGRnK.flatten(1, 2))
            lses.append(lse_bGRn.flatten(1, 2))
        return torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2)

    def backward(self, dout, q, k, v, out, lse, causal, mask, scale):
        wide = sum_dtype(q.dtype)
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
        groups = k.shape[1]
        for rows, n_keys in self._blocks(q, k, causal):
            keys, values = k[:, :, :n_keys].to(wide), v[:, :, :n_keys].to(wide)
            scores = self._scores(q[:, :, rows], keys, rows, causal, mask, scale)
            lse_bGRn, delta_bGRn, q_bGRnK, dout_bGRnK = (
                x.to(wide).unflatten(1, (groups, -1))
                for x in (
                    lse[:, :, rows],
                    (dout[:, :, rows].to(wide) * out[:, :, rows].to(wide)).sum(-1),
                    q[:, :, rows],
                    dout[:, :, rows],
                )
            )
            p = (scores - _finite(lse_bGRn)[..., None]).exp().flatten(2, 3)
            dout_bGMK = dout_bGRnK.flatten(2, 3)
            dv[:, :, :n_keys] += p.mT @ dout_bGMK
            ds = p * (dout_bGMK @ values.mT - delta_bGRn.flatten(2, 3)[..., None]) * scale
            dq[:, :, rows] += (ds @ keys).unflatten(2, q_bGRnK.shape[2:4]).flatten(1, 2)
            dk[:, :, :n_keys] += ds.mT @ q_bGRnK.flatten(2, 3)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _blocks(self, q: Tensor, k: Tensor, causal: bool):
        """Slices of the queries, and how many keys each of them needs."""
        n = q.shape[2]
        for start in range(0, n, self.block):
            stop = min(start + self.block, n)
            yield slice(start, stop), stop if causal else k.shape[2]

    def _scores(self, q, k, rows: slice, causal: bool, mask: Tensor | None, scale: float) -> Tensor:
        """Scaled, masked scores [b, G, R, n, m] of a slice of the queries."""
        wide = sum_dtype(q.dtype)
        q_bGRnK = q.to(wide).unflatten(1, (k.shape[1], -1))
        scores = (q_bGRnK.flatten(2, 3) @ k.to(wide).mT).unflatten(2, q_bGRnK.shape[2:4]) * scale
        if causal:
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(rows.start)
            scores = scores.masked_fill(~seen, float("-inf"))
        return scores if mask is None else scores + mask[..., rows, : k.shape[2]].unsqueeze(-3)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tokens are made: float32 for the halves, else the dtype itself."""
    return torch.float32 if dtype in HALF else dtype


def _finite(lse: Tensor) -> Tensor:
    """A log-sum-exp to subtract: a query that sees nothing gets weights of 0, not NaN."""
    return lse.clamp(min=torch.finfo(lse.dtype).min)


def kernel_for(q_BQHK: Tensor) -> Kernel:
    """The kernel that computes a tile on this tensor's device in its dtype."""
    if q_BQHK.device.type == "cpu":
        return CpuKernel()
    return CudaKernel() if has_cuda_flash(q_BQHK) else PlainKernel()


def has_cuda_flash(q_BQHK: Tensor) -> bool:
    """Whether torch's FlashAttention for CUDA takes these queries."""
    head_dim = q_BQHK.shape[-1]
    fits = q_BQHK.is_cuda and q_BQHK.dtype in HALF and head_dim % 8 == 0 and head_dim <= 256
    return fits and torch.cuda.get_device_capability(q_BQHK.device) >= (8, 0)


class _Call(NamedTuple):
    """One tile of a plan, ready to run."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool
    mask: Tensor | None
    fresh_queries: bool
    fresh_keys: bool

    def q(self, x_BQHK: Tensor) -> Tensor:
        return x_BQHK[self.rows, self.queries].transpose(1, 2)

    def k(self, x_BSGK: Tensor) -> Tensor:
        return x_BSGK[self.rows, self.keys].transpose(1, 2)


def _calls(table: Tensor, masks: Tensor, dtype: torch.dtype) -> list[_Call]:
    calls = []
    for *fields, fresh_queries, fresh_keys in table.tolist():
        tile = Tile(*fields)
        if tile.row0 == tile.row1:
            continue
        mask, n, m = None, tile.q1 - tile.q0, tile.k1 - tile.k0
        if tile.kind not in (FULL, CAUSAL):
            seen = (
                masks.view(-1, 1, n, m)
                if tile.kind == ROWS
                else masks[tile.kind : tile.kind + n * m].view(n, m)
            )
            # In q's dtype: torch's CPU kernel takes a float32 mask beside float64 queries and misreads it.
            mask = torch.where(seen, 0.0, float("-inf")).to(dtype)
        where = slice(tile.row0, tile.row1), slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
        calls.append(_Call(*where, tile.kind == CAUSAL, mask, bool(fresh_queries), bool(fresh_keys)))
    return calls


def _attend_tiles(
    q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, table: Tensor, masks: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention by a plan: the output [B, Q, H, K] and its log-sum-exp [B, Q, H]; padding rows are zeros.

    The output has the layout of the queries.
    """
    out_BQHK, lse_BQH = _evaluate(q_BQHK, k_BSGK, v_BSGK, table, masks, scale)
    return laid_out_like(q_BQHK, out_BQHK), lse_BQH


def _evaluate(
    q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, table: Tensor, masks: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    kernel = kernel_for(q_BQHK)
    q_BQHK, k_BSGK, v_BSGK = (unit_stride(x) for x in (q_BQHK, k_BSGK, v_BSGK))
    if native.takes(q_BQHK, table):
        return native.forward(q_BQHK, k_BSGK, v_BSGK, table, scale)
    calls = _calls(table, masks, q_BQHK.dtype)
    if _one_for_all(calls, q_BQHK, k_BSGK):
        q, k, v = (x.transpose(1, 2) for x in (q_BQHK, k_BSGK, v_BSGK))
        found = kernel.forward(q, k, v, calls[0].causal, calls[0].mask, scale)
        out_BQHK, lse_BQH = (x.transpose(1, 2) for x in found)
        return out_BQHK, lse_BQH.contiguous()
    out_BQHK = torch.zeros_like(q_BQHK)
    lse_BQH = torch.zeros(q_BQHK.shape[:3], dtype=sum_dtype(q_BQHK.dtype), device=q_BQHK.device)
    for call in calls:
        out, lse = kernel.forward(
            call.q(q_BQHK), call.k(k_BSGK), call.k(v_BSGK), call.causal, call.mask, scale
        )
        if call.mask is not None:  # the CPU kernel reports 0 for a query that sees nothing in this tile
            lse = lse.masked_fill(call.mask.isneginf().all(-1), float("-inf"))
        out_bnHK, lse_bnH = out.transpose(1, 2), lse.transpose(1, 2)
        here = call.rows, call.queries
        if not call.fresh_queries:
            out_bnHK, lse_bnH = _merge(out_BQHK[here], lse_BQH[here], out_bnHK, lse_bnH)
        out_BQHK[here] = out_bnHK
        lse_BQH[here] = lse_bnH
    # A query that sees nothing at all: any finite value gives it weights of 0 in the backward.
    return out_BQHK, lse_BQH.masked_fill_(lse_BQH.isneginf(), 0)


def _one_for_all(calls: list[_Call], q_BQHK: Tensor, k_BSGK: Tensor) -> bool:
    """Whether one call computes everything on a CPU, so that nothing is left to be put together.

    The kernel gives 0 for a query that sees nothing, and 0 for its lse.
    """
    (batch, n_queries), n_keys = q_BQHK.shape[:2], k_BSGK.shape[1]
    whole = slice(0, batch), slice(0, n_queries), slice(0, n_keys)
    return q_BQHK.is_cpu and len(calls) == 1 and calls[0][:3] == whole


def _merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from the attention over each."""
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((x - _finite(lse)).exp()[..., None] for x in (lse_a, lse_b))
    return (out_a * weight_a + out_b * weight_b).to(out_a.dtype), lse


attend_tiles = torch.library.custom_op("torchtitan_lite::attend_tiles", _attend_tiles, mutates_args=())


@attend_tiles.register_fake
def _(q_BQHK, k_BSGK, v_BSGK, table, masks, scale):
    lse_BQH = torch.empty(q_BQHK.shape[:3], dtype=sum_dtype(q_BQHK.dtype), device=q_BQHK.device)
    return torch.empty_like(q_BQHK), lse_BQH


@torch.library.custom_op("torchtitan_lite::attend_tiles_backward", mutates_args=())
def attend_tiles_backward(
    dout_BQHK: Tensor, q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, out_BQHK: Tensor, lse_BQH: Tensor,
    table: Tensor, masks: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `attend_tiles`, contiguous whatever the layouts of q, k and v: torch's are, too."""
    q_BQHK, k_BSGK, v_BSGK = (unit_stride(x) for x in (q_BQHK, k_BSGK, v_BSGK))
    dout_BQHK, out_BQHK = unit_stride(dout_BQHK), unit_stride(out_BQHK)
    if native.takes(q_BQHK, table):
        return native.backward(dout_BQHK, q_BQHK, k_BSGK, v_BSGK, out_BQHK, lse_BQH, table, scale)
    kernel, calls = kernel_for(q_BQHK), _calls(table, masks, q_BQHK.dtype)
    if _one_for_all(calls, q_BQHK, k_BSGK):
        everything = dout_BQHK, q_BQHK, k_BSGK, v_BSGK, out_BQHK, lse_BQH
        dout, q, k, v, out, lse = (x.transpose(1, 2) for x in everything)
        found = kernel.backward(dout, q, k, v, out, lse, calls[0].causal, calls[0].mask, scale)
        dq, dk, dv = (x.transpose(1, 2) for x in found)
        return dq, dk, dv
    # Tiles that share keys or queries are summed in full precision.
    once = all(call.fresh_queries and call.fresh_keys for call in calls)
    grads = [native.zeros_for(x, x.dtype if once else sum_dtype(x.dtype)) for x in (q_BQHK, k_BSGK, v_BSGK)]
    for call in calls:
        found = kernel.backward(
            call.q(dout_BQHK), call.q(q_BQHK), call.k(k_BSGK), call.k(v_BSGK), call.q(out_BQHK),
            lse_BQH[call.rows, call.queries].transpose(1, 2), call.causal, call.mask, scale,
        )  # fmt: skip
        places = (call.queries, call.keys, call.keys)
        fresh = (call.fresh_queries, call.fresh_keys, call.fresh_keys)
        for grad, part, place, first in zip(grads, found, places, fresh, strict=True):
            if first:
                grad[call.rows, place] = part.transpose(1, 2)
            else:
                grad[call.rows, place] += part.transpose(1, 2)
    dq, dk, dv = (grad.to(q_BQHK.dtype) for grad in grads)
    return dq, dk, dv


@attend_tiles_backward.register_fake
def _(dout_BQHK, q_BQHK, k_BSGK, v_BSGK, out_BQHK, lse_BQH, table, masks, scale):
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BQHK, k_BSGK, v_BSGK)
    )
    return dq, dk, dv


def _save(ctx, inputs, output) -> None:
    q_BQHK, k_BSGK, v_BSGK, table, masks, ctx.scale = inputs
    ctx.save_for_backward(q_BQHK, k_BSGK, v_BSGK, *output)
    ctx.plan = table, masks  # shared by every layer of the micro-batch: not this layer's to count


def _backward(ctx, dout_BQHK, dlse_BQH):
    grads = attend_tiles_backward(dout_BQHK, *ctx.saved_tensors, *ctx.plan, ctx.scale)
    return *grads, None, None, None


attend_tiles.register_autograd(_backward, setup_context=_save)


def attend(q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, tiles: Tiles, scale: float | None) -> Tensor:
    """Attention by a plan, [B, Q, H, K]; the scale defaults to 1 / sqrt(K)."""
    scale = check_inputs(q_BQHK, k_BSGK, v_BSGK, tiles.shape, scale)
    # Autograd, torch.compile and recompute need the operator. Inference does without its overhead.
    is_plain = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    act = _attend_tiles if is_plain else attend_tiles
    return act(q_BQHK, k_BSGK, v_BSGK, tiles.table, tiles.masks, scale)[0]
