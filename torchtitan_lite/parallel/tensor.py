"""Tensor parallel with sequence parallel: each rank has a share of every matrix, and of the tokens between.

B batch, S tokens of this rank's context share, s = S / n on each of n ranks, D model dim, V vocab.

The residual stream is split along the sequence; attention and feed-forward gather it before their column-wise
projections and scatter the sum of their row-wise ones (https://arxiv.org/abs/2205.05198). Every parameter
becomes a DTensor, the norms too, since one optimizer serves them all; activations are this rank's plain
tensors, which costs less than DTensors do and leaves torch.compile nothing but tensors to see.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from torchtitan_lite.config.load import MISSING, ConfigError, Problem

_MOST_PROBLEMS = 5
# torch.compile sees these as operators, unlike those of torch.distributed. Renamed after torch 2.11.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_reduce_scatter = getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor


class Splittable(Protocol):
    """What tensor parallel changes about a model."""

    @property
    def token_vectors(self) -> Any:
        """The embedding, whose `look_up(tokens, weight)` reads the vectors."""
        ...

    @property
    def sums(self) -> list[nn.Module]:
        """The modules whose output, of a share of their weights, is a term of the whole output."""
        ...

    def wrap_loss(self, wrap: Callable[[nn.Module], nn.Module]) -> None: ...

    def wrap_logits(self, wrap: Callable[[nn.Module], nn.Module]) -> None: ...


def apply_tensor_parallel(
    model: Splittable, mesh: DeviceMesh, shard_dims: Mapping[str, int | None], *, loss_parallel: bool
) -> None:
    """Split `model`, in place, over the one axis of `mesh`.

    Args:
        shard_dims: for the name of every parameter the dim that is split; None: every rank has it whole.
        loss_parallel: each rank projects all tokens onto its share of the vocabulary, else its own tokens
            onto all of it.
    """
    _split_weights(model, mesh, shard_dims)
    for part in (model.token_vectors, *model.sums):
        # The embedding takes the tokens themselves, which every rank has.
        scatter = _scattered if part is model.token_vectors else _on_all_tokens
        part.forward = scatter(part.forward, mesh)
    loss = OwnShareOfVocabulary if loss_parallel else OwnShareOfTokens
    model.wrap_loss(lambda inner: loss(inner, mesh))


def apply_tensor_parallel_to_predict(
    model: Splittable, mesh: DeviceMesh, shard_dims: Mapping[str, int | None]
) -> None:
    """Split `model`, in place, to give logits: every rank has all tokens, of which there may be one alone."""
    _split_weights(model, mesh, shard_dims)
    for part in (model.token_vectors, *model.sums):
        part.forward = _summed(part.forward, mesh.get_group())
    model.wrap_logits(lambda inner: LogitsOfAll(inner, mesh))


def _split_weights(model: Any, mesh: DeviceMesh, shard_dims: Mapping[str, int | None]) -> None:
    check_readers(model)
    for name, parameter in list(model.named_parameters()):
        owner, _, own_name = name.rpartition(".")
        module, dim = model.get_submodule(owner), shard_dims[name]
        placement = Replicate() if dim is None else Shard(dim)
        setattr(module, own_name, nn.Parameter(distribute_tensor(parameter, mesh, [placement])))
        module.weight_for = _whole if dim is None else _own_share
    model.token_vectors.look_up = _share_of_rows(mesh)


def check_readers(model: Any) -> None:
    """Raise ConfigError where a module would not read its rank's share: it does so by one `weight_for`."""
    found = []
    for path, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        has_reader = hasattr(module, "weight_for") or module is model.token_vectors
        if len(names) > 1 or (names and not has_reader):
            rule = "has several parameters" if len(names) > 1 else "has a parameter and no weight_for"
            rule += ", so tensor parallel cannot give each rank its share"
            remedy = "keep one weight in a module, which reads it by weight_for (docs/extending.md)"
            found.append(Problem(f"module {path}", MISSING, rule, remedy))
    if found:
        raise ConfigError(found[:_MOST_PROBLEMS])


def _own_share(weight: Any, x: Tensor) -> Tensor:
    return weight.to_local().to(x.dtype)


def _whole(weight: Any, x: Tensor) -> Tensor:
    # The gradient is the term of this rank's tokens or heads.
    return weight.to_local(grad_placements=[Partial()]).to(x.dtype)


def _on_all_tokens(forward: Callable[..., Tensor], mesh: DeviceMesh) -> Callable[..., Tensor]:
    """`forward`, which sums over its rank's share, from this rank's tokens of all ranks' sum to the same."""
    group = mesh.get_group().group_name

    def gathered_and_scattered(x_BsD: Tensor, *rest: Any) -> Tensor:
        return _ScatterSum.apply(forward(_Gather.apply(x_BsD, group), *rest), group)

    return gathered_and_scattered


def _scattered(forward: Callable[..., Tensor], mesh: DeviceMesh) -> Callable[..., Tensor]:
    """`forward`, which sums over its rank's share of all tokens, to all ranks' sum of this rank's tokens."""
    group = mesh.get_group().group_name
    return lambda *args: _ScatterSum.apply(forward(*args), group)


def _share_of_rows(mesh: DeviceMesh) -> Callable[[Tensor, Any], Tensor]:
    """The vectors of the tokens that this rank has a row for; zeros for the others."""

    def look_up(tokens_BS: Tensor, weight_VD: DTensor) -> Tensor:
        share_VD = weight_VD.to_local()
        row_BS, here_BS = VocabularyShare(mesh, len(share_VD)).rows(tokens_BS)
        return F.embedding(row_BS, share_VD) * here_BS[..., None]

    return look_up


def _summed(forward: Callable[..., Tensor], group: dist.ProcessGroup) -> Callable[..., Tensor]:
    """`forward`, summed over all ranks; without a gradient."""

    def summed(*words: Any) -> Tensor:
        x = forward(*words)
        dist.all_reduce(x, group=group)
        return x

    return summed


def _waited(x: Tensor) -> Tensor:
    # torch.compile loses the gradient of an input that still waits, as the embedding's output would.
    return x.wait() if isinstance(x, collectives.AsyncCollectiveTensor) else x


def _of_all_ranks(x_BsD: Tensor, group: Any) -> Tensor:
    """The tokens of all ranks, [B, S, D], from this rank's.

    Gathered along the first dim: to put them in order along another one, torch 2.11 breaks the graph.
    """
    gathered_nBsD = _waited(_all_gather(x_BsD.contiguous(), 0, group)).unflatten(0, (-1, len(x_BsD)))
    return gathered_nBsD.movedim(0, 1).flatten(1, 2)


class _Gather(torch.autograd.Function):
    """The tokens of all ranks; backward, each rank gets the sum for its own."""

    @staticmethod
    def forward(ctx: Any, x_BsD: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _of_all_ranks(x_BsD, group)

    @staticmethod
    def backward(ctx: Any, dx_BSD: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _waited(_reduce_scatter(dx_BSD, "sum", 1, ctx.group)), None


class _ScatterSum(torch.autograd.Function):
    """The sum over all ranks, of which each gets its own tokens; backward, each gets those of all."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _waited(_reduce_scatter(x_BSD, "sum", 1, group))

    @staticmethod
    def backward(ctx: Any, dx_BsD: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _of_all_ranks(dx_BsD, ctx.group), None


class OwnShareOfVocabulary(nn.Module):
    """The loss of all tokens on a share of the vocabulary: no rank ever has the logits of all of it."""

    def __init__(self, loss: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.loss, self.mesh = loss, mesh

    def forward(self, x_BsD: Tensor, weight_VD: DTensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
        # Each rank's gradient is the term of its share of the vocabulary, which the gather's backward sums.
        x_BSD = _Gather.apply(x_BsD, self.mesh.get_group().group_name)
        share_VD = weight_VD.to_local()
        return self.loss(x_BSD, share_VD, labels_BS, VocabularyShare(self.mesh, len(share_VD)))


class LogitsOfAll(nn.Module):
    """The logits of the whole vocabulary on every rank, each of which has a share of it."""

    def __init__(self, logits: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.logits, self.mesh = logits, mesh

    def forward(self, x_BD: Tensor, weight_VD: DTensor) -> Tensor:
        share_BV = self.logits(x_BD, weight_VD.to_local())
        shares = [torch.empty_like(share_BV) for _ in range(self.mesh.size())]
        dist.all_gather(shares, share_BV.contiguous(), group=self.mesh.get_group())
        return torch.cat(shares, dim=1)


class VocabularyShare:
    """What `models.loss.Vocabulary` is on one rank, for `n_rows` of the rows of the weight."""

    def __init__(self, mesh: DeviceMesh, n_rows: int) -> None:
        self.group, self.n_parts, self.n_rows = mesh.get_group(), mesh.size(), n_rows
        self.start = mesh.get_local_rank() * n_rows

    def rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The row of the weight for each label, and whether it is here; if not, the row is arbitrary."""
        row = labels - self.start
        here = (row >= 0) & (row < self.n_rows)
        return torch.where(here, row, 0), here

    def max(self, x: Tensor) -> Tensor:
        """The maximum over all ranks, in place."""
        dist.all_reduce(x, dist.ReduceOp.MAX, self.group)
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        dist.all_reduce(x, dist.ReduceOp.SUM, self.group)
        return x


class OwnShareOfTokens(nn.Module):
    """The loss of a rank's own tokens on the whole vocabulary, whose weight is gathered."""

    def __init__(self, loss: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.loss, self.mesh = loss, mesh

    def forward(self, x_BsD: Tensor, weight_VD: DTensor, labels_BS: Tensor) -> tuple[Tensor, Tensor]:
        whole_VD = weight_VD.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        labels_Bs = labels_BS.chunk(self.mesh.size(), dim=1)[self.mesh.get_local_rank()]
        own, n_valid = self.loss(x_BsD, whole_VD, labels_Bs)
        total = own.detach().clone()
        for sum_ in (total, n_valid):
            dist.all_reduce(sum_, group=self.mesh.get_group())
        # The value is that of all tokens, the gradient that of this rank's.
        return own + (total - own.detach()), n_valid
