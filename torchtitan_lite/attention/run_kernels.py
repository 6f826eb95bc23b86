"""The kernels for one run of packed documents, forward and backward: causal, aligned at the bottom right.

T queries and U keys of a run, H query heads, G key/value heads, K head dim, D documents.
"""

from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from torchtitan_lite.attention.tile_kernels import PlainKernel

aten = torch.ops.aten


class Documents(NamedTuple):
    """Which queries and keys of a run belong to the same document."""

    cu_q_D: Tensor
    """Cumulative query counts, [D + 1] int32."""
    cu_k_D: Tensor
    """Cumulative key counts, [D + 1] int32."""
    max_q: int
    """No document has more queries."""
    max_k: int
    """No document has more keys."""


class RunKernel(Protocol):
    """Attention of one run, q and out [T, H, K], k and v [U, G, K], lse [H, T]; see Runs.window."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        documents: Documents, scale: float, window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


def _left(window: int | None) -> int:
    """How many keys before its own a query sees, as FlashAttention counts them; -1: all."""
    return -1 if window is None else window - 1


class TorchFlash:
    """torch's FlashAttention-2, or FlashAttention-3 or -4 once `activate_flash_attention_impl` has chosen it.

    These operators are what torch's `varlen_attn` calls (torch/nn/attention/varlen.py).
    """

    def forward(self, q, k, v, documents, scale, window):
        out, lse, *_ = aten._flash_attention_forward(
            q, k, v, *documents, 0.0, window is None, False,
            scale=scale, window_size_left=_left(window), window_size_right=0,
        )  # fmt: skip
        return out, lse

    def backward(self, dout, q, k, v, out, lse, documents, scale, window):
        # There is no dropout, so the random state is never read.
        seed, unused = (torch.empty(n, dtype=torch.uint64, device=q.device) for n in (2, 0))
        return aten._flash_attention_backward(
            dout, q, k, v, out, lse, *documents, 0.0, window is None, seed, unused,
            scale=scale, window_size_left=_left(window), window_size_right=0,
        )  # fmt: skip


class FlashAttnPackage:
    """The flash-attn package, version 2.7 or later."""

    def forward(self, q, k, v, documents, scale, window):
        from flash_attn import flash_attn_interface  # pyright: ignore[reportMissingImports]

        out, lse, *_ = flash_attn_interface._flash_attn_varlen_forward(
            q, k, v, *documents, dropout_p=0.0, softmax_scale=scale, causal=True,
            window_size_left=_left(window), window_size_right=0,
        )  # fmt: skip
        return out, lse

    def backward(self, dout, q, k, v, out, lse, documents, scale, window):
        from flash_attn import flash_attn_interface  # pyright: ignore[reportMissingImports]

        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        flash_attn_interface._flash_attn_varlen_backward(
            dout, q, k, v, out, lse, dq, dk, dv, *documents,
            dropout_p=0.0, softmax_scale=scale, causal=True,
            window_size_left=_left(window), window_size_right=0, softcap=0.0, alibi_slopes=None,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq, dk, dv


class DocumentByDocument:
    """`PlainKernel` under an explicit mask, one document at a time: slow, the reference for the others."""

    def forward(self, q, k, v, documents, scale, window):
        found = [
            PlainKernel().forward(q_, k_, v_, False, mask, scale)
            for q_, k_, v_, mask in _parted(documents, window, q, k, v)
        ]
        outs, lses = zip(*found, strict=True)
        return torch.cat(outs, 2)[0].transpose(0, 1), torch.cat(lses, 2)[0]

    def backward(self, dout, q, k, v, out, lse, documents, scale, window):
        edges = pairwise(documents.cu_q_D.tolist())
        parts = []
        for (q_, k_, v_, mask), (q0, q1) in zip(_parted(documents, window, q, k, v), edges, strict=True):
            dout_, out_ = (_heads_first(x[q0:q1]) for x in (dout, out))
            lse_ = lse[None, :, q0:q1]
            parts.append(PlainKernel().backward(dout_, q_, k_, v_, out_, lse_, False, mask, scale))
        dq, dk, dv = (torch.cat(part, 2)[0].transpose(0, 1) for part in zip(*parts, strict=True))
        return dq, dk, dv


def _parted(documents: Documents, window: int | None, q_THK: Tensor, k_UGK: Tensor, v_UGK: Tensor):
    """The queries, keys and values of each document, and its additive mask."""
    edges = zip(*(pairwise(cu_D.tolist()) for cu_D in (documents.cu_q_D, documents.cu_k_D)), strict=True)
    for (q0, q1), (k0, k1) in edges:
        behind = (k1 - k0) - (q1 - q0)  # keys before the first query
        sees = q_THK.new_ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(behind)
        if window is not None:
            sees = sees.triu(behind - window + 1)
        mask = torch.zeros(sees.shape, device=sees.device).masked_fill(~sees, float("-inf"))
        yield _heads_first(q_THK[q0:q1]), _heads_first(k_UGK[k0:k1]), _heads_first(v_UGK[k0:k1]), mask


def _heads_first(x_THK: Tensor) -> Tensor:
    return x_THK.transpose(0, 1)[None]


KERNELS: dict[str, RunKernel] = {
    "torch": TorchFlash(),
    "flash_attn": FlashAttnPackage(),
    "reference": DocumentByDocument(),
}
"""Every kernel by name; FlashAttention-3 and -4 are "torch" once they are activated."""
