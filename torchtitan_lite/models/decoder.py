"""The decoder of every family: pre-norm blocks of attention and SwiGLU, as a single-device program.

B batch, S sequence, D model dim, H query heads, G key/value heads, K head dim, V vocab.

Mixed precision without autocast: parameters stay as they were made (float32 master weights), the embedding
casts its output to the compute dtype once, and every layer after it casts its own weight to the dtype of its
input. Gradients arrive in the float32 parameters.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchtitan_lite.attention import AttentionConfig, Sdpa
from torchtitan_lite.attention.mask import Ranges
from torchtitan_lite.attention.transfer import to_device
from torchtitan_lite.config.load import Problem
from torchtitan_lite.models.init import init_weights
from torchtitan_lite.models.loss import LinearCrossEntropy
from torchtitan_lite.models.rope import RopeScaling, Rotation, rotate, rotation

_POSITIVE = (
    "vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_seq_len",
    "norm_eps", "rope_theta", "sliding_window",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything that tells one decoder from another."""

    vocab_size: int
    """Rows of the embedding; a tokenizer may use fewer."""
    dim: int
    """Width of the residual stream."""
    n_layers: int
    """Number of blocks."""
    n_heads: int
    """Query heads, a multiple of n_kv_heads."""
    n_kv_heads: int
    """Key and value heads."""
    head_dim: int
    """Features of a head, an even number."""
    ffn_dim: int
    """Hidden width of the feed-forward."""
    max_seq_len: int
    """Longest sequence the model is meant for, in tokens."""
    norm_eps: float
    """Added to the mean square by every RMSNorm."""
    rope_theta: float
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None
    """How the rotary frequencies are slowed for long context; none: not at all."""
    qk_norm: bool
    """Whether queries and keys pass an RMSNorm over the head before they are rotated."""
    tie_embeddings: bool
    """Whether the embedding and the output head are one parameter."""
    sliding_window: int | None = None
    """How many tokens of its document each token sees, itself included; none: all up to itself."""
    attention: AttentionConfig = field(default_factory=Sdpa)
    """The attention backend: how the mask is evaluated, never what it allows."""

    def problems(self, key: str) -> list[Problem]:
        """Values out of range, and heads that do not divide."""
        found = [
            Problem(f"{key}.{name}", value, "must be greater than 0", "use a positive number")
            for name in _POSITIVE
            if (value := getattr(self, name)) is not None and value <= 0
        ]
        if self.head_dim % 2:
            rule, remedy = "is odd, and rotary embedding turns pairs", f"use {self.head_dim + 1}"
            found.append(Problem(f"{key}.head_dim", self.head_dim, rule, remedy))
        if min(self.n_heads, self.n_kv_heads) > 0 and self.n_heads % self.n_kv_heads:
            rule = f"does not divide n_heads = {self.n_heads}"
            divisors = [str(n) for n in range(1, min(self.n_heads, 1024) + 1) if self.n_heads % n == 0]
            remedy = f"use {' or '.join(filter(None, (', '.join(divisors[:-1]), divisors[-1])))}"
            found.append(Problem(f"{key}.n_kv_heads", self.n_kv_heads, rule, remedy))
        return found + (self.rope_scaling.problems(f"{key}.rope_scaling") if self.rope_scaling else [])

    def build(self, compute_dtype: torch.dtype = torch.float32) -> "Decoder":
        """A decoder on the ambient device, with the weights of seed 0 (none on the meta device).

        From meta: `model.to_empty(device=...)`, then `init_weights(model, seed)`.
        """
        model = Decoder(self, compute_dtype)
        if not model.embedding.weight.is_meta:
            init_weights(model, seed=0)
        return model

    @property
    def n_params(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        norms_per_block = 2 * self.dim + (2 * self.head_dim if self.qk_norm else 0)
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.dim
        return self._n_matmul_params + embedding + self.n_layers * norms_per_block + self.dim

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of a training step per token of one causal document of `seq_len` tokens.

        Six per matrix parameter, with the head and without the embedding's look-up, and twelve per query
        feature and visible key (https://arxiv.org/abs/2204.02311, appendix B; the mask leaves about half).
        """
        window = min(seq_len, self.sliding_window or seq_len)
        mean_visible_keys = window * (1 - window / (2 * seq_len))
        attention = 12 * self.n_layers * self.n_heads * self.head_dim * mean_visible_keys
        return 6 * self._n_matmul_params + attention

    @property
    def _n_matmul_params(self) -> int:
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        return self.n_layers * (attention + 3 * self.dim * self.ffn_dim) + self.vocab_size * self.dim


def _cast_weight(self: nn.Linear | nn.RMSNorm, x: Tensor) -> Tensor:
    """The weight for the input `x`; tensor parallel puts its own in the place of this, for a rank's share."""
    weight = self.weight
    return weight if weight.dtype == x.dtype else weight.to(x.dtype)


class Linear(nn.Linear):
    """A projection without bias, computed in the dtype of its input."""

    weight_for = _cast_weight
    multiply = staticmethod(F.linear)
    """Selective recompute replaces this function to keep a product."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: `init_weights` draws every parameter."""

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input, self.weight_for(input))


class RMSNorm(nn.RMSNorm):
    """Root mean square norm over the last dim, computed in the dtype of its input."""

    weight_for = _cast_weight

    def reset_parameters(self) -> None:
        """Nothing: `init_weights` draws every parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight_for(x), self.eps)


class Embedding(nn.Embedding):
    """A table of token vectors, handed out in the compute dtype."""

    def __init__(self, vocab_size: int, dim: int, compute_dtype: torch.dtype) -> None:
        super().__init__(vocab_size, dim)
        self.compute_dtype = compute_dtype

    def reset_parameters(self) -> None:
        """Nothing: `init_weights` draws every parameter."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.compute_dtype)


class Attention(nn.Module):
    """Grouped-query attention around the inner attention of a backend."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = Linear(config.dim, config.n_heads * config.head_dim)
        self.wk = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wv = Linear(config.dim, config.n_kv_heads * config.head_dim)
        self.wo = Linear(config.n_heads * config.head_dim, config.dim)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.inner = config.attention.build()

    def forward(self, x_BSD: Tensor, rotation: Rotation, mask: object) -> Tensor:
        # -1: the number of heads is read from the weights, which tensor parallel may have split.
        q_BSHK = self.wq(x_BSD).unflatten(-1, (-1, self.head_dim))
        k_BSGK = self.wk(x_BSD).unflatten(-1, (-1, self.head_dim))
        v_BSGK = self.wv(x_BSD).unflatten(-1, (-1, self.head_dim))
        q_BSHK = rotate(self.q_norm(q_BSHK), rotation)
        k_BSGK = rotate(self.k_norm(k_BSGK), rotation)
        out_BSHK = self.inner(q_BSHK, k_BSGK, v_BSGK, mask)
        return self.wo(out_BSHK.flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim)
        self.w3 = Linear(config.dim, config.ffn_dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD))


class Block(nn.Module):
    """Attention, then feed-forward, each normed before and added to the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = FeedForward(config)

    def forward(self, x_BSD: Tensor, rotation: Rotation, mask: object) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rotation, mask)
        return x_BSD + self.ffn(self.ffn_norm(x_BSD))


class Logits(nn.Module):
    """The output projection as a part of the model, so that tensor parallel can exchange it from outside."""

    def forward(self, x_BD: Tensor, weight_VD: Tensor) -> Tensor:
        return F.linear(x_BD, weight_VD.to(x_BD.dtype)).float()


class Share(Protocol):
    """Which tokens of a sequence are computed here; attention sees the keys of all."""

    def queries(self, seq_len: int) -> Ranges | None:
        """The tokens, as ranges of a sequence's; None: all."""
        ...

    def shard(self, x_BS: Tensor) -> Tensor:
        """What `x_BS` holds of those tokens."""
        ...


class _Whole:
    def queries(self, seq_len: int) -> None:
        return None

    def shard(self, x_BS: Tensor) -> Tensor:
        return x_BS


WHOLE: Share = _Whole()
"""All tokens of a sequence."""


class Decoder(nn.Module):
    """Embedding, blocks, norm and output head."""

    def __init__(self, config: DecoderConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim, compute_dtype)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        # A tied head owns no parameter: `to_empty` would make two of one that is registered twice.
        self.head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)
        self.loss, self.logits = LinearCrossEntropy(), Logits()

    def prepare(
        self,
        tokens_BS: Tensor,
        positions_BT: Tensor,
        labels_BS: Tensor | None = None,
        *,
        share: Share = WHOLE,
        device: torch.device,
    ) -> tuple[Tensor, Tensor, object, Tensor | None]:
        """What `forward` takes, on `device`, for the `share` of the sequences that is computed here.

        The mask is made once for all blocks, and on the CPU: nothing is read from the device.

        Args:
            tokens_BS: of whole sequences, or the last ones alone where the share has no others.
            positions_BT: of all keys, on the CPU: 0 at the start of every document, -1 on padding.
        """
        mask = self.config.attention.mask(
            positions_BT,
            queries=share.queries(positions_BT.shape[1]),
            sliding_window=self.config.sliding_window,
            device=device,
        )
        tokens_BS, positions_BS = (to_device(share.shard(x), device) for x in (tokens_BS, positions_BT))
        labels_BS = None if labels_BS is None else to_device(share.shard(labels_BS), device)
        return tokens_BS, positions_BS, mask, labels_BS

    @property
    def head_weight_VD(self) -> Tensor:
        """The output projection, which is the embedding's own weight where they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self, tokens_BS: Tensor, positions_BS: Tensor, mask: object, labels_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        """The loss of `labels_BS`, or the logits after each row's last token.

        Args:
            positions_BS: int64, 0 at the start of every document, -1 on padding.
            mask: made from the positions by `config.attention.mask`; the same object serves every block.
            labels_BS: int64, -100 where there is nothing to predict.

        Returns:
            With labels: the float32 sum of the losses in nats, and the int64 count of valid labels.
            Without: float32 logits [B, V].
        """
        x_BSD = self.embedding(tokens_BS)
        turns = rotation(positions_BS, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        for block in self.blocks:
            x_BSD = block(x_BSD, turns, mask)
        if labels_BS is not None:
            return self.loss(self.norm(x_BSD), self.head_weight_VD, labels_BS)
        last_BD = x_BSD[torch.arange(len(x_BSD), device=x_BSD.device), _last_token(positions_BS)]
        return self.logits(self.norm(last_BD), self.head_weight_VD)


def _last_token(positions_BS: Tensor) -> Tensor:
    """Index of the last token of each row that is not padding."""
    index_S = torch.arange(positions_BS.shape[1], device=positions_BS.device)
    return torch.where(positions_BS >= 0, index_S, 0).amax(dim=1)
