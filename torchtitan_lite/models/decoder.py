"""The decoder of every family: pre-norm blocks of attention and SwiGLU, as a single-device program.

B batch, S sequence, D model dim, H query heads, G key/value heads, K head dim, V vocab.

The embedding casts its output to the compute dtype once; every layer after it computes in the dtype of its
input (`layers`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from torchtitan_lite import registry
from torchtitan_lite.attention import AttentionConfig, Sdpa
from torchtitan_lite.attention.transfer import to_device
from torchtitan_lite.config.load import Problem
from torchtitan_lite.config.problem import either
from torchtitan_lite.models.init import init_weights
from torchtitan_lite.models.layers import Embedding, Linear, Logits, RMSNorm
from torchtitan_lite.models.loss import LinearCrossEntropy
from torchtitan_lite.models.parameters import Parameter, Table
from torchtitan_lite.models.rope import RopeScaling, Rotation, rotate, rotation
from torchtitan_lite.models.share import WHOLE, Share

_Count = Annotated[int, Field(ge=1)]
_Positive = Annotated[float, Field(gt=0)]


def _in_block(ours: str, theirs: str, **facts: Any) -> Parameter:
    return Parameter(pattern=f"blocks.*.{ours}.weight", hub=f"model.layers.{{}}.{theirs}.weight", **facts)


PARAMETERS = Table(
    [
        _in_block("attention_norm", "input_layernorm", init="ones", group="vector"),
        _in_block("attention.wq", "self_attn.q_proj", shard_dim=0, split_by="n_heads"),
        _in_block("attention.wk", "self_attn.k_proj", shard_dim=0, split_by="n_kv_heads"),
        _in_block("attention.wv", "self_attn.v_proj", shard_dim=0, split_by="n_kv_heads"),
        _in_block("attention.q_norm", "self_attn.q_norm", init="ones", group="vector"),
        _in_block("attention.k_norm", "self_attn.k_norm", init="ones", group="vector"),
        _in_block("attention.wo", "self_attn.o_proj", shard_dim=1, split_by="n_heads", init="residual"),
        _in_block("ffn_norm", "post_attention_layernorm", init="ones", group="vector"),
        _in_block("ffn.w1", "mlp.gate_proj", shard_dim=0, split_by="ffn_dim"),
        _in_block("ffn.w3", "mlp.up_proj", shard_dim=0, split_by="ffn_dim"),
        _in_block("ffn.w2", "mlp.down_proj", shard_dim=1, split_by="ffn_dim", init="residual"),
        Parameter(pattern="norm.weight", hub="model.norm.weight", init="ones", group="vector"),
        Parameter(
            pattern="embedding.weight",
            hub="model.embed_tokens.weight",
            shard_dim=0,
            split_by="vocab_size",
            group="embedding",
        ),
        Parameter(
            pattern="head.weight", hub="lm_head.weight", shard_dim=0, split_by="vocab_size", group="head"
        ),
    ]
)
"""The parameters of every decoder here; the families' weights have the same names on the Hub."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything that tells one decoder from another."""

    vocab_size: _Count
    """Rows of the embedding; a tokenizer may use fewer."""
    dim: _Count
    """Width of the residual stream."""
    n_layers: _Count
    """Number of blocks."""
    n_heads: _Count
    """Query heads, a multiple of n_kv_heads."""
    n_kv_heads: _Count
    """Key and value heads."""
    head_dim: _Count
    """Features of a head, an even number."""
    ffn_dim: _Count
    """Hidden width of the feed-forward."""
    max_seq_len: _Count
    """Longest sequence the model is meant for, in tokens."""
    norm_eps: _Positive
    """Added to the mean square by every RMSNorm."""
    rope_theta: _Positive
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None
    """How the rotary frequencies are slowed for long context; none: not at all."""
    qk_norm: bool
    """Whether queries and keys pass an RMSNorm over the head before they are rotated."""
    tie_embeddings: bool
    """Whether the embedding and the output head are one parameter."""
    sliding_window: _Count | None = None
    """How many tokens of its document each token sees, itself included; none: all up to itself."""
    attention: Annotated[AttentionConfig, registry.attentions] = field(default_factory=Sdpa)
    """The attention backend: how the mask is evaluated, never what it allows."""

    architecture: ClassVar[str] = "decoder"
    """What a checkpoint knows the model by. A family with another forward has a subclass of another name."""
    parameters: ClassVar[Table] = PARAMETERS
    """A row for every parameter. A family with others has a subclass with a table of its own."""
    dealt_by_ulysses: ClassVar[str] = "n_kv_heads"
    """The field that counts the heads which Ulysses deals out among the ranks that share a sequence."""
    extensible: ClassVar[str] = "vocab_size"
    """The field that may be larger than the data needs: a row that no token uses does no harm."""

    def __init_subclass__(cls) -> None:
        """A checkpoint of another model must not be read as one of this: raises TypeError without a name."""
        super().__init_subclass__()
        if "architecture" not in vars(cls):
            raise TypeError(f"{cls.__name__} has no architecture of its own: give it one, by its name")

    def problems(self, key: str) -> list[Problem]:
        """Heads that cannot be rotated or grouped, and a scaling that is wrong."""
        found = []
        if self.head_dim % 2:
            rule, remedy = "is odd, and rotary embedding turns pairs", f"use {self.head_dim + 1}"
            found.append(Problem(f"{key}.head_dim", self.head_dim, rule, remedy))
        if self.n_heads % self.n_kv_heads:
            rule = f"does not divide n_heads = {self.n_heads}"
            divisors = [n for n in range(1, min(self.n_heads, 1024) + 1) if self.n_heads % n == 0]
            remedy, reads = f"use {either(divisors)}", (f"{key}.n_heads",)
            found.append(Problem(f"{key}.n_kv_heads", self.n_kv_heads, rule, remedy, reads))
        return found + (self.rope_scaling.problems(f"{key}.rope_scaling") if self.rope_scaling else [])

    def build(self, compute_dtype: torch.dtype = torch.float32) -> "Decoder":
        """A decoder on the ambient device, with the weights of seed 0 (none on the meta device).

        From meta: `model.to_empty(device=...)`, then `init_weights(model, seed)`.
        """
        model = Decoder(self, compute_dtype)
        self.parameters.rows_of((name for name, _ in model.named_parameters()), type(self).__name__)
        if model.device.type != "meta":
            init_weights(model, seed=0)
        return model

    def build_block(self) -> "Block":
        """One of the model's blocks; a family with another block has a subclass that builds it."""
        return Block(self)

    @cached_property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shape of every parameter; a tied embedding is one parameter."""
        with torch.device("meta"):
            return {name: weight.shape for name, weight in self.build().named_parameters()}

    @cached_property
    def rows(self) -> Mapping[str, Parameter]:
        """The row of every parameter in the table."""
        return self.parameters.rows_of(self.shapes, type(self).__name__)

    @property
    def shard_dims(self) -> Mapping[str, int | None]:
        """For every parameter the dim that tensor parallel splits; None: every rank has it whole."""
        return {name: row.shard_dim for name, row in self.rows.items()}

    @property
    def splits(self) -> dict[str, int]:
        """The sizes that tensor parallel must divide, by the field that sets them."""
        return {name: getattr(self, name) for name in self.parameters.splits}

    @property
    def n_params(self) -> int:
        """Number of parameters; a tied embedding counts once."""
        return sum(shape.numel() for shape in self.shapes.values())

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of a training step per token of one causal document of `seq_len` tokens.

        Six per matrix parameter, with the head and without the embedding's look-up, and twelve per query
        feature and visible key (https://arxiv.org/abs/2204.02311, appendix B; the mask leaves about half).
        """
        window = min(seq_len, self.sliding_window or seq_len)
        mean_visible_keys = window * (1 - window / (2 * seq_len))
        attention = 12 * self.n_layers * self.n_heads * self.head_dim * mean_visible_keys
        return 6 * self._n_multiplied + attention

    @property
    def _n_multiplied(self) -> int:
        """Parameters that every token is multiplied with; a tied embedding is the head as well."""
        looked_up = () if self.tie_embeddings else ("embedding",)
        groups = {name: row.group for name, row in self.rows.items()}
        return sum(
            shape.numel() for name, shape in self.shapes.items() if groups[name] not in ("vector", *looked_up)
        )


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

    def wrap_attention(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Put `wrap(inner)` in the place of the inner attention."""
        self.attention.inner = wrap(self.attention.inner)

    @property
    def sums(self) -> tuple[nn.Module, ...]:
        """The modules whose output, of a share of their weights, is a term of the whole output."""
        return self.attention, self.ffn


class Decoder(nn.Module):
    """Embedding, blocks, norm and output head."""

    def __init__(self, config: DecoderConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim, compute_dtype)
        self.blocks = nn.ModuleList(config.build_block() for _ in range(config.n_layers))
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
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    # What parallelism, recompute and generation change about a finished model they reach by these.

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return cast("list[Block]", list(self.blocks))

    @property
    def token_vectors(self) -> Embedding:
        """What gives each token its vector."""
        return self.embedding

    @property
    def sums(self) -> list[nn.Module]:
        """The modules whose output, of a share of their weights, is a term of the whole output."""
        return [part for block in self.layers for part in block.sums]

    def wrap_attention(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Put `wrap(inner)` in the place of every inner attention."""
        for block in self.layers:
            block.wrap_attention(wrap)

    def wrap_loss(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Put `wrap(loss)` in the place of the loss: (x_BSD, weight_VD, labels_BS) to (sum, count)."""
        self.loss = wrap(self.loss)

    def wrap_logits(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Put `wrap(logits)` in the place of the output projection: (x_BD, weight_VD) to logits_BV."""
        self.logits = wrap(self.logits)

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
