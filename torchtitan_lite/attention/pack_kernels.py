"""The kernels for one pack of documents, forward and backward: causal, aligned at the bottom right.

T queries and U keys of a pack, H query heads, G key/value heads, K head dim, D documents.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

aten = torch.ops.aten


class Documents(NamedTuple):
    """Which queries and keys of a pack belong to the same document."""

    cu_q_D: Tensor
    """Cumulative query counts, [D + 1] int32."""
    cu_k_D: Tensor
    """Cumulative key counts, [D + 1] int32."""
    max_q: int
    """The largest number of queries of a document."""
    max_k: int
    """The largest number of keys of a document."""


class PackKernel(Protocol):
    """Attention of one pack, q and out [T, H, K], k and v [U, G, K], lse [H, T]; see Calls.window."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        documents: Documents, scale: float, window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


def _left(window: int | None) -> int:
    """The number of keys that a query sees before its own key, as FlashAttention counts them; -1: all."""
    return -1 if window is None else window - 1


class TorchFlash:
    """torch's FlashAttention-2, or FlashAttention-3 or -4 once `activate_flash_attention_impl` has chosen it.

    torch's `varlen_attn` calls the same operators (torch/nn/attention/varlen.py).
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
