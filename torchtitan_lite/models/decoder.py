"""The decoder of all model families: pre-norm blocks of attention and SwiGLU, written for one device.

B batch, S sequence, T keys, D model dim, H query heads, G key/value heads, K head dim, V vocab.

The embedding casts its output to the compute dtype. Every layer after it computes in the dtype of its input.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Protocol, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from torchtitan_lite import registry
from torchtitan_lite.attention import AttentionConfig, Sdpa
from torchtitan_lite.attention.mask import Ranges, to_device
from torchtitan_lite.config.load import Problem
from torchtitan_lite.config.problem import either
from torchtitan_lite.models.init import init_weights
from torchtitan_lite.models.layers import Embedding, Linear, RMSNorm, logits
from torchtitan_lite.models.loss import linear_cross_entropy
from torchtitan_lite.models.parameters import Parameter, Table
from torchtitan_lite.models.rope import RopeScaling, Rotation, rotate, rotation

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
"""The parameters of a decoder. All families here use the same names on the Hugging Face Hub."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The config of a decoder: its sizes, its options and its attention backend."""

    vocab_size: _Count
    """Rows of the embedding. A tokenizer may have fewer tokens."""
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
    """Number that every RMSNorm adds to the mean square."""
    rope_theta: _Positive
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None
    """Scaling of the rotary frequencies for long context. none: no scaling."""
    qk_norm: bool
    """Whether an RMSNorm over each head is applied to queries and keys before the rotation."""
    tie_embeddings: bool
    """Whether the embedding and the output head are one parameter."""
    sliding_window: _Count | None = None
    """Tokens that a token sees: itself and those before it in its document. none: all of them."""
    attention: Annotated[AttentionConfig, registry.attentions] = field(default_factory=Sdpa)
    """The attention backend. All backends evaluate the same mask, each in its own way."""

    architecture: ClassVar[str] = "decoder"
    """The name of the architecture in a checkpoint. A subclass with another `forward` needs another name."""
    parameters: ClassVar[Table] = PARAMETERS
    """The table that describes every parameter. A subclass with other parameters has its own table."""
    set_elsewhere: ClassVar[tuple[str, ...]] = ("attention",)
    """The fields that overrides refuse, because another table sets them. A near miss does not name them."""
    dealt_by_ulysses: ClassVar[str] = "n_kv_heads"
    """The name of the field with the number of heads that Ulysses divides among the ranks of a sequence."""
    extensible: ClassVar[str] = "vocab_size"
    """The name of the field that may be larger than the data needs: unused embedding rows do no harm."""

    def __init_subclass__(cls) -> None:
        """Raise TypeError if the subclass has no `architecture` of its own.

        Without a name of its own, its checkpoints could be read as checkpoints of this class.
        """
        super().__init_subclass__()
        if "architecture" not in vars(cls):
            raise TypeError(f"{cls.__name__} has no architecture of its own: give it one, by its name")

    def problems(self, key: str) -> list[Problem]:
        """Return problems if head_dim is odd, n_kv_heads does not divide n_heads, or the scaling is wrong."""
        found = []
        if self.head_dim % 2:
            # Every attention takes multiples of 16 up to 128.
            better = min(-(-self.head_dim // 16) * 16, 128) if self.head_dim < 256 else self.head_dim - 1
            rule, remedy = "is odd, and rotary embedding turns pairs", f"use {better}"
            found.append(Problem(f"{key}.head_dim", self.head_dim, rule, remedy))
        if self.n_heads % self.n_kv_heads:
            rule = f"does not divide n_heads = {self.n_heads}"
            divisors = [n for n in range(1, min(self.n_heads, 1024) + 1) if self.n_heads % n == 0]
            remedy, reads = f"use {either(divisors)}", (f"{key}.n_heads",)
            found.append(Problem(f"{key}.n_kv_heads", self.n_kv_heads, rule, remedy, reads))
        return found + (self.rope_scaling.problems(f"{key}.rope_scaling") if self.rope_scaling else [])

    def build(self, compute_dtype: torch.dtype = torch.float32) -> "Decoder":
        """Return a decoder on the current default device, with the weights of seed 0.

        On the meta device the weights have no values. Call `model.to_empty(device=...)`, then `init_weights`.
        """
        model = Decoder(self, compute_dtype)
        self.parameters.rows_of((name for name, _ in model.named_parameters()), type(self).__name__)
        if model.device.type != "meta":
            init_weights(model, seed=0)
        return model

    def build_block(self) -> "Block":
        """Return a new block. A subclass overrides this method to use another class of blocks."""
        return Block(self)

    @cached_property
    def shapes(self) -> Mapping[str, torch.Size]:
        """The shape of every parameter, by name. A tied embedding is one parameter."""
        with torch.device("meta"):
            return {name: weight.shape for name, weight in self.build().named_parameters()}

    @cached_property
    def rows(self) -> Mapping[str, Parameter]:
        """The row of the table `parameters` that describes each parameter, by parameter name."""
        return self.parameters.rows_of(self.shapes, type(self).__name__)

    @property
    def splits(self) -> dict[str, int]:
        """The sizes that the tensor-parallel degree must divide, by the config field of each size."""
        return {name: getattr(self, name) for name in self.parameters.splits}

    @property
    def n_params(self) -> int:
        """The number of parameters. A tied embedding counts once."""
        return sum(shape.numel() for shape in self.shapes.values())

    def flops_per_token(self, seq_len: int) -> float:
        """Return the operations of a training step, per token of a causal document of `seq_len` tokens.

        These are floating-point operations: six per parameter of a matrix, and twelve per query feature and
        visible key (https://arxiv.org/abs/2204.02311, appendix B). A causal mask leaves about half the keys.
        """
        # An embedding is looked up, not multiplied. But a tied embedding is also the output head.
        others = {"vector"} if self.tie_embeddings else {"vector", "embedding"}
        n_multiplied = sum(
            shape.numel() for name, shape in self.shapes.items() if self.rows[name].group not in others
        )
        window = min(seq_len, self.sliding_window or seq_len)
        mean_visible_keys = window * (1 - window / (2 * seq_len))
        return 6 * n_multiplied + 12 * self.n_layers * self.n_heads * self.head_dim * mean_visible_keys


class Attention(nn.Module):
    """Grouped-query attention: projections around the inner attention of a backend."""

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
        # -1: tensor parallel may have split the weights, so the number of heads follows from their size.
        q_BSHK = self.wq(x_BSD).unflatten(-1, (-1, self.head_dim))
        k_BSGK = self.wk(x_BSD).unflatten(-1, (-1, self.head_dim))
        v_BSGK = self.wv(x_BSD).unflatten(-1, (-1, self.head_dim))
        q_BSHK = rotate(self.q_norm(q_BSHK), rotation)
        k_BSGK = rotate(self.k_norm(k_BSGK), rotation)
        out_BSHK = self.inner(q_BSHK, k_BSGK, v_BSGK, mask)
        return self.wo(out_BSHK.flatten(2))


class FeedForward(nn.Module):
    """The SwiGLU feed-forward (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.dim, config.ffn_dim)
        self.w2 = Linear(config.ffn_dim, config.dim)
        self.w3 = Linear(config.dim, config.ffn_dim)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD))


class Block(nn.Module):
    """A block: attention, then feed-forward. Each has a norm before it, and adds to the residual stream."""

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
        """Replace the inner attention by `wrap(inner)`."""
        self.attention.inner = wrap(self.attention.inner)

    @property
    def sums(self) -> tuple[nn.Module, ...]:
        """The modules whose outputs are summed under tensor parallel: each rank computes one term."""
        return self.attention, self.ffn


class Share(Protocol):
    """The part of a sequence that this process computes. Attention sees the keys of the whole sequence."""

    def queries(self, seq_len: int) -> Ranges | None:
        """Return the ranges of the tokens of this part in a sequence of `seq_len` tokens, or None for all."""
        ...

    def shard(self, x_BS: Tensor) -> Tensor:
        """Return the columns of `x_BS` that belong to the tokens of this part."""
        ...


class Decoder(nn.Module):
    """The decoder: embedding, blocks, norm and output head.

    `forward` ends with a call of the attribute `loss` or `logits`. Tensor parallel replaces these functions.
    """

    def __init__(self, config: DecoderConfig, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.dim, compute_dtype)
        self.blocks = nn.ModuleList(config.build_block() for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        # A tied head has no parameter of its own: `to_empty` would make two parameters of a shared one.
        self.head = None if config.tie_embeddings else Linear(config.dim, config.vocab_size)
        self.loss: Callable[..., tuple[Tensor, Tensor]] = linear_cross_entropy
        self.logits: Callable[..., Tensor] = logits

    def prepare(
        self,
        tokens_BS: Tensor,
        positions_BT: Tensor,
        labels_BS: Tensor | None = None,
        *,
        share: Share | None = None,
        device: torch.device,
    ) -> tuple[Tensor, Tensor, object, Tensor | None]:
        """Return the arguments of `forward`, on `device`, for the tokens of `share` (None: all tokens).

        The mask is made once for all blocks. It is made on the CPU, so that nothing is read from the device.

        Args:
            tokens_BS: whole sequences. With a KV cache, only the tokens of the share.
            positions_BT: positions of all keys, on the CPU: 0 at the start of every document, -1 on padding.
        """
        mask = self.config.attention.mask(
            positions_BT,
            queries=share.queries(positions_BT.shape[1]) if share else None,
            sliding_window=self.config.sliding_window,
            device=device,
        )

        def own(x_BS: Tensor) -> Tensor:
            return to_device(share.shard(x_BS) if share else x_BS, device)

        tokens_BS, positions_BS = own(tokens_BS), own(positions_BT)
        labels_BS = None if labels_BS is None else own(labels_BS)
        return tokens_BS, positions_BS, mask, labels_BS

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    # Parallelism, recompute and generation change a model through `loss`, `logits` and the members below.

    @property
    def layers(self) -> list[Block]:
        """The blocks of the decoder, in order."""
        return cast("list[Block]", list(self.blocks))

    @property
    def token_vectors(self) -> Embedding:
        """The module that returns the embedding vector of each token."""
        return self.embedding

    @property
    def sums(self) -> list[nn.Module]:
        """The modules of all blocks whose outputs are summed under tensor parallel (`Block.sums`)."""
        return [part for block in self.layers for part in block.sums]

    def wrap_attention(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        """Replace the inner attention of every block by `wrap(inner)`."""
        for block in self.layers:
            block.wrap_attention(wrap)

    @property
    def head_weight_VD(self) -> Tensor:
        """The weight of the output projection, which is the embedding's weight if the two are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self, tokens_BS: Tensor, positions_BS: Tensor, mask: object, labels_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Return the loss of `labels_BS` or, without labels, the logits after the last token of each row.

        Args:
            positions_BS: int64, 0 at the start of every document, -1 on padding.
            mask: made from the positions by `config.attention.mask`. Every block gets the same object.
            labels_BS: int64, -100 for a token with nothing to predict.

        Returns:
            With labels: the float32 sum of the losses in nats, and the int64 count of valid labels.
            Without labels: float32 logits [B, V].
        """
        x_BSD = self.embedding(tokens_BS)
        turns = rotation(positions_BS, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        for block in self.blocks:
            x_BSD = block(x_BSD, turns, mask)
        if labels_BS is not None:
            return self.loss(self.norm(x_BSD), self.head_weight_VD, labels_BS)
        row_B, index_S = (torch.arange(n, device=x_BSD.device) for n in positions_BS.shape)
        last_B = torch.where(positions_BS >= 0, index_S, 0).amax(dim=1)  # the last token that is not padding
        last_BD = x_BSD[row_B, last_B]
        return self.logits(self.norm(last_BD), self.head_weight_VD)
