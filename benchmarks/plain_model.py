"""A decoder of Qwen3's shape and its training step in plain torch, to compare our launches with.

T packed tokens, D model dim, H query heads, G key/value heads, K head dim, V vocab.

The model is what an engineer who knows torch would write: `varlen_attn`, fused AdamW, pinned copies, float32
weights that are cast where they are used, all logits at once, one read from the device per step. Only the
shape and the batches come from our package.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchtitan_lite.data import IGNORE, Batch
from torchtitan_lite.models.decoder import DecoderConfig

Recompute = Literal["none", "selective", "full"]


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class Norm(nn.RMSNorm):
    """An RMSNorm that computes in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    """Attention and SwiGLU, each with a norm before and a residual connection."""

    def __init__(self, shape: DecoderConfig, recompute: Recompute) -> None:
        super().__init__()
        self.recompute = recompute
        dim, heads, groups, head_dim = shape.dim, shape.n_heads, shape.n_kv_heads, shape.head_dim
        self.head_dim = head_dim
        self.window = (-1 if shape.sliding_window is None else shape.sliding_window - 1, 0)
        self.wq = Linear(dim, heads * head_dim, bias=False)
        self.wk, self.wv = (Linear(dim, groups * head_dim, bias=False) for _ in range(2))
        self.wo = Linear(heads * head_dim, dim, bias=False)
        self.w1, self.w3 = (Linear(dim, shape.ffn_dim, bias=False) for _ in range(2))
        self.w2 = Linear(shape.ffn_dim, dim, bias=False)
        self.norms = nn.ModuleList(Norm(dim, shape.norm_eps) for _ in range(2))
        self.q_norm, self.k_norm = (
            Norm(head_dim, shape.norm_eps) if shape.qk_norm else nn.Identity() for _ in range(2)
        )
        self.attend, self.more = varlen(heads != groups)

    def forward(self, *inputs: Any) -> Tensor:
        if self.recompute == "none":
            return self.all(*inputs)
        more: dict[str, Any] = {"context_fn": keep_some} if self.recompute == "selective" else {}
        return checkpoint(self.all, *inputs, use_reentrant=False, preserve_rng_state=False, **more)

    def all(self, x_TD: Tensor, turns: tuple[Tensor, Tensor], cu: Tensor, longest: Tensor) -> Tensor:
        """The block without recompute."""
        normed = self.norms[0](x_TD)
        q, k, v = (w(normed).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q_THK, k_TGK = turned(self.q_norm(q), *turns), turned(self.k_norm(k), *turns)
        n = longest.shape[0]
        out_THK = self.attend(q_THK, k_TGK, v, cu, cu, n, n, window_size=self.window, **self.more)
        x_TD = x_TD + self.wo(out_THK.flatten(1))
        normed = self.norms[1](x_TD)
        return x_TD + self.w2(F.silu(self.w1(normed)) * self.w3(normed))


def varlen(is_grouped: bool) -> tuple[Callable[..., Any], dict[str, bool]]:
    """torch's kernel for packed documents, and its option for grouped heads (torch 2.11 has none)."""
    from torch.nn.attention.varlen import varlen_attn

    asks = is_grouped and "enable_gqa" in signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if asks else {}


def turned(x_THK: Tensor, cos_T1F: Tensor, sin_T1F: Tensor) -> Tensor:
    """Rotary embedding, computed in float32."""
    a, b = x_THK.chunk(2, dim=-1)
    return torch.cat((a * cos_T1F - b * sin_T1F, b * cos_T1F + a * sin_T1F), dim=-1).to(x_THK.dtype)


class Model(nn.Module):
    """Embedding, blocks, norm, logits and loss."""

    def __init__(self, shape: DecoderConfig, dtype: torch.dtype, recompute: Recompute) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.embedding = nn.Embedding(shape.vocab_size, shape.dim)
        self.blocks = nn.ModuleList(Block(shape, recompute) for _ in range(shape.n_layers))
        self.norm = Norm(shape.dim, shape.norm_eps)
        self.head = Linear(shape.dim, shape.vocab_size, bias=False)
        if shape.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self, tokens_T: Tensor, positions_T: Tensor, labels_T: Tensor, cu: Tensor, longest: Tensor
    ) -> Tensor:
        """The mean loss of the valid labels."""
        x_TD = self.embedding(tokens_T).to(self.dtype)
        half = torch.arange(0, self.shape.head_dim, 2, device=x_TD.device, dtype=torch.float32)
        angle_T1F = positions_T.float()[:, None, None] * self.shape.rope_theta ** (
            -half / self.shape.head_dim
        )
        turns = angle_T1F.cos(), angle_T1F.sin()
        for block in self.blocks:
            x_TD = block(x_TD, turns, cu, longest)
        return F.cross_entropy(self.head(self.norm(x_TD)).float(), labels_T, ignore_index=IGNORE)


def keep_some() -> Any:
    """Contexts for checkpoint that keep attention and every second product, like our selective recompute."""
    counts = {False: 0, True: 0}

    def policy(context: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        if op is torch.ops.aten.mm.default:
            counts[context.is_recompute] += 1
            keep = counts[context.is_recompute] % 2 == 1
        else:
            keep = "_varlen_attn" in str(op)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Training:
    """The model, its optimizer and a step."""

    def __init__(
        self,
        shape: DecoderConfig,
        dtype: torch.dtype,
        device: torch.device,
        recompute: Recompute,
        compile: bool,
    ) -> None:
        with torch.device(device):
            self.model = Model(shape, dtype, recompute)
        if compile:
            for block in self.model.blocks:
                block.compile()
        self.device = device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4, fused=True)

    def step(self, batch: Batch) -> float:
        """Forward, backward, clip and update. Returns the loss."""
        positions_T = batch.positions_BS.flatten()
        starts = (positions_T == 0).nonzero().flatten()
        cu = torch.cat([starts, starts.new_tensor([len(positions_T)])])
        # A number would become a constant of the compiled graph, but a tensor's size stays dynamic.
        longest = torch.empty(int(cu.diff().max()), 0)
        tensors = batch.tokens_BS.flatten(), positions_T, batch.labels_BS.flatten(), cu.int()
        tokens_T, positions_T, labels_T, cu = (
            x.pin_memory().to(self.device, non_blocking=True) for x in tensors
        )
        for tensor in (cu, longest):
            torch._dynamo.mark_dynamic(tensor, 0)
        loss = self.model(tokens_T, positions_T, labels_T, cu, longest)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()
