"""Context parallel: each rank has a part of every sequence, and attention sees all of it.

B batch, S tokens, s = S / n of them on each of n ranks, C chunks of c tokens; H query heads, G key/value
heads, K head dim.

    allgather   every rank gathers the keys and values of all, G heads and no more; its queries attend to them
    ulysses     the ranks trade all heads of a part of the sequence for a part of the heads of all of it, and
                back (https://arxiv.org/abs/2309.14509)

With head-tail balance rank r has the chunks r and 2n - 1 - r, so that causal attention costs every rank the
same. Either way the attention inside is the single-device one: it sees keys in the order of the sequence, and
a mask made from the positions of all tokens.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives

from torchtitan_lite.attention.mask import SEQ_DIM, Ranges, intervals

# torch.compile sees these as operators, unlike those of torch.distributed. Renamed after torch 2.11.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_reduce_scatter = getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor
_all_to_all = collectives.all_to_all_single


@dataclass(frozen=True)
class Split:
    """Which chunks of a sequence each of `n_ranks` has, each rank as many."""

    n_ranks: int
    balanced: bool

    @property
    def owners(self) -> tuple[int, ...]:
        """The rank of each chunk, in the order of the sequence."""
        ranks = range(self.n_ranks)
        return (*ranks, *reversed(ranks)) if self.balanced else tuple(ranks)

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """The chunks of `rank`, in the order of the sequence."""
        return tuple(chunk for chunk, owner in enumerate(self.owners) if owner == rank)

    def ranges(self, rank: int, seq_len: int) -> Ranges:
        """The tokens of `rank`."""
        assert seq_len % len(self.owners) == 0, f"{seq_len} tokens in {len(self.owners)} chunks"
        size = seq_len // len(self.owners)
        return tuple((chunk * size, (chunk + 1) * size) for chunk in self.chunks_of(rank))

    def join(self, parts: tuple[Tensor, ...]) -> Tensor:
        """The whole sequence, from the part [B, s, ...] of each rank."""
        pieces: list[Tensor | None] = [None] * len(self.owners)
        for rank, part in enumerate(parts):
            chunks = self.chunks_of(rank)
            for chunk, piece in zip(chunks, part.chunk(len(chunks), dim=SEQ_DIM), strict=True):
                pieces[chunk] = piece
        return torch.cat([piece for piece in pieces if piece is not None], dim=SEQ_DIM)

    def by_rank(self, whole: Tensor) -> Tensor:
        """The chunks of a whole sequence, [C, B, c, ...], those of rank 0 first."""
        chunks = whole.chunk(len(self.owners), dim=SEQ_DIM)
        return torch.stack([chunks[i] for rank in range(self.n_ranks) for i in self.chunks_of(rank)])


@dataclass(frozen=True, kw_only=True)
class ContextParallel:
    """What one rank does with a sequence; with one rank, nothing."""

    method: Literal["allgather", "ulysses"] = "allgather"
    split: Split = Split(1, balanced=False)
    rank: int = 0
    group: dist.ProcessGroup | None = None

    def queries(self, seq_len: int) -> Ranges | None:
        """Which tokens the mask is for: this rank's, or all of them where attention sees all as queries."""
        if self.split.n_ranks == 1 or self.method == "ulysses":
            return None
        return self.split.ranges(self.rank, seq_len)

    def shard(self, x_BS: Tensor) -> Tensor:
        """This rank's tokens."""
        if self.split.n_ranks == 1:
            return x_BS
        ranges = self.split.ranges(self.rank, x_BS.shape[SEQ_DIM])
        return torch.cat([x_BS[:, start:stop] for start, stop in ranges], dim=SEQ_DIM)

    def wrap(self, inner: nn.Module) -> nn.Module:
        """`inner` for q, k and v of this rank's tokens."""
        if self.split.n_ranks == 1:
            return inner
        assert self.group is not None
        wrapper = GatheredAttention if self.method == "allgather" else UlyssesAttention
        return wrapper(inner, self.split, self.group)

    def work(self, positions_BS: Tensor, sliding_window: int | None) -> float:
        """How many pairs of a query and a key that it sees this rank computes, per head of the model."""
        first_BQ, last_Q = intervals(positions_BS, self.queries(positions_BS.shape[SEQ_DIM]), sliding_window)
        pairs = int((last_Q - first_BQ + 1).clamp(min=0).sum())
        return pairs / self.split.n_ranks if self.method == "ulysses" else pairs


class GatheredAttention(nn.Module):
    """The inner attention of this rank's queries to the keys and values of all ranks."""

    def __init__(self, inner: nn.Module, split: Split, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.inner, self.split, self.group = inner, split, group

    def forward(
        self, q_BsHK: Tensor, k_BsGK: Tensor, v_BsGK: Tensor, mask: object, scale: float | None = None
    ) -> Tensor:
        """Attend; [B, s, H, K]. The mask is for this rank's queries and all keys."""
        k_BSGK, v_BSGK = _Gather.apply(k_BsGK, v_BsGK, self.split, self.group)
        return self.inner(q_BsHK, k_BSGK, v_BSGK, mask, scale=scale)


class UlyssesAttention(nn.Module):
    """The inner attention of all tokens, for this rank's share of the heads."""

    def __init__(self, inner: nn.Module, split: Split, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.inner, self.split, self.group = inner, split, group

    def forward(
        self, q_BsHK: Tensor, k_BsGK: Tensor, v_BsGK: Tensor, mask: object, scale: float | None = None
    ) -> Tensor:
        """Attend; [B, s, H, K]. The mask is for all queries and all keys."""
        q, k, v = (_ToHeads.apply(x, self.split, self.group) for x in (q_BsHK, k_BsGK, v_BsGK))
        return _ToSequence.apply(self.inner(q, k, v, mask, scale=scale), self.split, self.group)


class _Gather(torch.autograd.Function):
    """Keys and values of all ranks, in one exchange; backward, each rank gets the sum for its own."""

    @staticmethod
    def forward(ctx: Any, k_BsGK: Tensor, v_BsGK: Tensor, split: Split, group: Any) -> tuple[Tensor, Tensor]:
        ctx.split, ctx.group = split, group
        both = _waited(_all_gather(torch.stack([k_BsGK, v_BsGK]), 0, group)).unflatten(0, (-1, 2))
        return split.join(both[:, 0].unbind()), split.join(both[:, 1].unbind())

    @staticmethod
    def backward(ctx: Any, dk_BSGK: Tensor, dv_BSGK: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        both_C2BcGK = torch.stack([ctx.split.by_rank(dk_BSGK), ctx.split.by_rank(dv_BSGK)], dim=1)
        own_C2BcGK = _waited(_reduce_scatter(both_C2BcGK, "sum", 0, ctx.group))
        dk_BsGK, dv_BsGK = own_C2BcGK.movedim(0, 2).flatten(2, 3).unbind()
        return dk_BsGK, dv_BsGK, None, None


def _waited(x: Tensor) -> Tensor:
    # What still waits is a tensor of a class of its own, which others would have to know.
    return x.wait() if isinstance(x, collectives.AsyncCollectiveTensor) else x


def _to_heads(x_BsHK: Tensor, split: Split, group: Any) -> Tensor:
    """All tokens of a share of the heads, [B, S, H / n, K], from all heads of this rank's tokens."""
    shares = torch.stack(x_BsHK.chunk(split.n_ranks, dim=2))
    received = _waited(_all_to_all(shares, None, None, group))
    return split.join(received.unbind())


def _to_sequence(x_BShK: Tensor, split: Split, group: Any) -> Tensor:
    """All heads of this rank's tokens, [B, s, H, K], from all tokens of a share of the heads."""
    received = _waited(_all_to_all(split.by_rank(x_BShK), None, None, group))
    shares_nCBchK = received.unflatten(0, (split.n_ranks, -1))
    return shares_nCBchK.permute(2, 1, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BsHK: Tensor, split: Split, group: Any) -> Tensor:
        ctx.split, ctx.group = split, group
        return _to_heads(x_BsHK, split, group)

    @staticmethod
    def backward(ctx: Any, dx_BShK: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _to_sequence(dx_BShK, ctx.split, ctx.group), None, None


class _ToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BShK: Tensor, split: Split, group: Any) -> Tensor:
        ctx.split, ctx.group = split, group
        return _to_sequence(x_BShK, split, group)

    @staticmethod
    def backward(ctx: Any, dx_BsHK: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _to_heads(dx_BsHK, ctx.split, ctx.group), None, None
