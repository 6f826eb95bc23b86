"""Context parallel: each rank has a part of every sequence, and attention sees the whole sequence.

B batch, S tokens, s = S / n of them on each of n ranks, C chunks of c tokens; H query heads, G key/value
heads, h = H / n heads, K head dim.

    allgather   every rank gathers the keys and values of all ranks, and its own queries attend to them
    ulysses     each rank trades all heads of its part of the sequence for a part of the heads of the whole
                sequence, and trades back after attention (https://arxiv.org/abs/2309.14509)

With head-tail balance rank r has the chunks r and 2n - 1 - r, so causal attention costs every rank the same.
The attention inside is the attention of a single device. Its keys are in the order of the sequence, and its
mask is made from the positions of all tokens.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from torchtitan_lite.attention.mask import SEQ_DIM, Ranges, intervals
from torchtitan_lite.parallel.exchange import Exchange, all_gather, all_to_all, reduce_scatter


@dataclass(frozen=True)
class Chunks:
    """A sequence split into equal chunks. Each of `n_ranks` ranks has one chunk, or two if `balanced`."""

    n_ranks: int
    balanced: bool

    @property
    def owners(self) -> tuple[int, ...]:
        """The rank of each chunk, in the order of the sequence."""
        ranks = range(self.n_ranks)
        return (*ranks, *reversed(ranks)) if self.balanced else tuple(ranks)

    def of_rank(self, rank: int) -> tuple[int, ...]:
        """Return the numbers of the chunks of `rank`, in the order of the sequence."""
        return tuple(chunk for chunk, owner in enumerate(self.owners) if owner == rank)

    def ranges(self, rank: int, seq_len: int) -> Ranges:
        """Return the ranges of the tokens of `rank` in a sequence of `seq_len` tokens."""
        assert seq_len % len(self.owners) == 0, f"{seq_len} tokens in {len(self.owners)} chunks"
        size = seq_len // len(self.owners)
        return tuple((chunk * size, (chunk + 1) * size) for chunk in self.of_rank(rank))

    def join(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Join the parts [B, s, ...] of the ranks into the whole sequence [B, S, ...]."""
        pieces: dict[int, Tensor] = {}
        for rank, part in enumerate(parts):
            chunks = self.of_rank(rank)
            pieces.update(zip(chunks, part.chunk(len(chunks), dim=SEQ_DIM), strict=True))
        return torch.cat([pieces[chunk] for chunk in range(len(self.owners))], dim=SEQ_DIM)

    def by_rank(self, whole: Tensor) -> Tensor:
        """Split the whole sequence [B, S, ...] into chunks, sorted by their rank: [C, B, c, ...]."""
        chunks = whole.chunk(len(self.owners), dim=SEQ_DIM)
        return torch.stack([chunks[i] for rank in range(self.n_ranks) for i in self.of_rank(rank)])


@dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """The part of one rank in context parallel. The defaults are for a single rank, which has all tokens."""

    method: Literal["allgather", "ulysses"] = "allgather"
    chunks: Chunks = Chunks(1, balanced=False)
    rank: int = 0
    group: ProcessGroup | None = None

    def queries(self, seq_len: int) -> Ranges | None:
        """Return the ranges of the tokens whose queries this rank's attention computes. None: all tokens."""
        if self.chunks.n_ranks == 1 or self.method == "ulysses":
            return None
        return self.chunks.ranges(self.rank, seq_len)

    def shard(self, x_BS: Tensor) -> Tensor:
        """Return this rank's tokens of `x_BS`, [B, s]."""
        if self.chunks.n_ranks == 1:
            return x_BS
        ranges = self.chunks.ranges(self.rank, x_BS.shape[SEQ_DIM])
        return torch.cat([x_BS[:, start:stop] for start, stop in ranges], dim=SEQ_DIM)

    def wrap(self, inner: nn.Module) -> nn.Module:
        """Wrap `inner` in an attention that takes q, k and v of this rank's tokens, and exchanges tensors."""
        assert self.group is not None
        wrapper = GatheredAttention if self.method == "allgather" else UlyssesAttention
        return wrapper(inner, self.chunks, self.group)

    def work(self, positions_BS: Tensor, sliding_window: int | None) -> float:
        """Return the number of visible pairs of a query and a key that this rank computes, per query head."""
        first_BQ, last_Q = intervals(positions_BS, self.queries(positions_BS.shape[SEQ_DIM]), sliding_window)
        pairs = int((last_Q - first_BQ + 1).clamp(min=0).sum())
        return pairs / self.chunks.n_ranks if self.method == "ulysses" else pairs


class _SharedAttention(nn.Module):
    """A wrapper of the attention `inner`, for sequences that are split over the ranks of `group`."""

    def __init__(self, inner: nn.Module, chunks: Chunks, group: ProcessGroup) -> None:
        super().__init__()
        self.inner, self.chunks, self.group = inner, chunks, group


class GatheredAttention(_SharedAttention):
    """The attention of this rank's queries to the keys and values of all ranks, which are gathered."""

    def forward(
        self, q_BsHK: Tensor, k_BsGK: Tensor, v_BsGK: Tensor, mask: object, scale: float | None = None
    ) -> Tensor:
        """Return the attention output [B, s, H, K]. The mask is for this rank's queries and all keys."""
        # Keys and values are rows of one batch, so that one exchange is enough.
        both = torch.cat([k_BsGK, v_BsGK])
        k_BSGK, v_BSGK = Exchange.apply(both, _gather, _sum_and_scatter, self.chunks, self.group).chunk(2)
        return self.inner(q_BsHK, k_BSGK, v_BSGK, mask, scale=scale)


class UlyssesAttention(_SharedAttention):
    """The attention of all tokens, for this rank's share of the heads."""

    def forward(
        self, q_BsHK: Tensor, k_BsGK: Tensor, v_BsGK: Tensor, mask: object, scale: float | None = None
    ) -> Tensor:
        """Return the attention output [B, s, H, K]. The mask is for all queries and all keys."""
        given = q_BsHK, k_BsGK, v_BsGK
        q, k, v = (Exchange.apply(x, _to_heads, _to_tokens, self.chunks, self.group) for x in given)
        out_BShK = self.inner(q, k, v, mask, scale=scale)
        return Exchange.apply(out_BShK, _to_tokens, _to_heads, self.chunks, self.group)


def _gather(x_BsGK: Tensor, chunks: Chunks, group: ProcessGroup) -> Tensor:
    """Return the tokens of all ranks, [B, S, G, K]."""
    return chunks.join(all_gather(x_BsGK, group).unflatten(0, (chunks.n_ranks, -1)).unbind())


def _sum_and_scatter(x_BSGK: Tensor, chunks: Chunks, group: ProcessGroup) -> Tensor:
    """Sum over all ranks, and return the sum for this rank's tokens: [B, s, G, K]."""
    own_CBcGK = reduce_scatter(chunks.by_rank(x_BSGK), 0, group)
    return own_CBcGK.transpose(0, 1).flatten(1, 2)


def _to_heads(x_BsHK: Tensor, chunks: Chunks, group: ProcessGroup) -> Tensor:
    """Trade all heads of this rank's tokens for a share of the heads of all tokens: [B, S, h, K]."""
    shares_nBshK = torch.stack(x_BsHK.chunk(chunks.n_ranks, dim=2))
    return chunks.join(all_to_all(shares_nBshK, group).unbind())


def _to_tokens(x_BShK: Tensor, chunks: Chunks, group: ProcessGroup) -> Tensor:
    """Trade a share of the heads of all tokens for all heads of this rank's tokens: [B, s, H, K]."""
    received = all_to_all(chunks.by_rank(x_BShK), group)
    shares_nCBchK = received.unflatten(0, (chunks.n_ranks, -1))
    return shares_nCBchK.permute(2, 1, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)
