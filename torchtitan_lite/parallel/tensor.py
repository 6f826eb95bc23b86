"""Tensor parallel with sequence parallel: each rank has a share of every matrix and of the residual stream.

B batch, S tokens of this rank's context-parallel part, s = S / n on each of n ranks, D model dim, V vocab.

The residual stream is split along the sequence. Attention and feed-forward gather the stream before their
column-wise projections, and scatter the sum of the row-wise ones (https://arxiv.org/abs/2205.05198). Every
parameter becomes a DTensor, the norms too, since one optimizer updates all parameters. Activations are this
rank's plain tensors: they cost less than DTensors, and torch.compile sees nothing but tensors.

A model to split has `config.rows`, `token_vectors`, `sums`, `loss` and `logits`: see `models.decoder`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from torchtitan_lite.config.load import MISSING, ConfigError, Problem
from torchtitan_lite.parallel.exchange import Exchange, all_gather, reduce_scatter

_Forward = Callable[..., Tensor]
_Loss = Callable[..., tuple[Tensor, Tensor]]
_MOST_PROBLEMS = 5


def apply_tensor_parallel(model: Any, mesh: DeviceMesh, *, loss_parallel: bool) -> None:
    """Split `model`, in place, over the one axis of `mesh`.

    Args:
        loss_parallel: each rank projects all tokens onto its share of the vocabulary. Otherwise each rank
            projects its own tokens onto the whole vocabulary.
    """
    _split_weights(model, mesh)
    group = mesh.get_group()
    # The embedding needs no gather, because every rank already has all token ids.
    model.token_vectors.forward = _scatter_sum_of(model.token_vectors.forward, group)
    for part in model.sums:
        part.forward = _gather_and_scatter_sum_of(part.forward, group)
    loss = loss_by_vocabulary if loss_parallel else loss_by_tokens
    model.loss = partial(loss, model.loss, mesh)


def apply_tensor_parallel_to_predict(model: Any, mesh: DeviceMesh) -> None:
    """Split `model`, in place, to compute logits without gradients. Every rank has all tokens."""
    _split_weights(model, mesh)
    for part in (model.token_vectors, *model.sums):
        part.forward = _sum_of(part.forward, mesh.get_group())
    model.logits = partial(_logits_of_all, model.logits, mesh)


def _split_weights(model: Any, mesh: DeviceMesh) -> None:
    check_readers(model)
    rows = model.config.rows
    for name, parameter in list(model.named_parameters()):
        owner, _, own_name = name.rpartition(".")
        module, dim = model.get_submodule(owner), rows[name].shard_dim
        placement = Replicate() if dim is None else Shard(dim)
        setattr(module, own_name, nn.Parameter(distribute_tensor(parameter, mesh, [placement])))
        module.weight_for = _read_whole if dim is None else _read_share
    model.token_vectors.look_up = partial(_look_up, mesh)


def check_readers(model: Any) -> None:
    """Raise ConfigError if a module has several parameters, or a parameter that no `weight_for` reads."""
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


def _read_share(weight: Any, x: Tensor) -> Tensor:
    return weight.to_local().to(x.dtype)


def _read_whole(weight: Any, x: Tensor) -> Tensor:
    # Each rank has the gradient from its own tokens or heads, so the ranks' gradients must be summed.
    return weight.to_local(grad_placements=[Partial()]).to(x.dtype)


def _look_up(mesh: DeviceMesh, tokens_BS: Tensor, weight_VD: DTensor) -> Tensor:
    """Return the vectors of the tokens whose rows this rank has, and zeros for other tokens."""
    share_VD = weight_VD.to_local()
    row_BS, here_BS = VocabularyShare(mesh, len(share_VD)).rows(tokens_BS)
    return F.embedding(row_BS, share_VD) * here_BS[..., None]


# The wrappers below are functions, because torch.compile cannot trace a forward that is a partial.


def _gather_and_scatter_sum_of(forward: _Forward, group: ProcessGroup) -> _Forward:
    """Wrap `forward`: all-gather the tokens before, and reduce-scatter the results of the ranks after."""

    def summed(x_BsD: Tensor, *rest: Any) -> Tensor:
        x_BSD = Exchange.apply(x_BsD, _gather, _scatter_sum, group)
        return Exchange.apply(forward(x_BSD, *rest), _scatter_sum, _gather, group)

    return summed


def _scatter_sum_of(forward: _Forward, group: ProcessGroup) -> _Forward:
    """Wrap `forward`: reduce-scatter the results of the ranks, so that each rank has its own tokens."""
    return lambda *args: Exchange.apply(forward(*args), _scatter_sum, _gather, group)


def _sum_of(forward: _Forward, group: ProcessGroup) -> _Forward:
    """Wrap `forward`: all-reduce the results of the ranks, without a gradient."""

    def summed(*args: Any) -> Tensor:
        x = forward(*args)
        dist.all_reduce(x, group=group)
        return x

    return summed


def _gather(x_BsD: Tensor, group: ProcessGroup) -> Tensor:
    """Return the tokens of all ranks, [B, S, D]."""
    x_nBsD = all_gather(x_BsD, group).unflatten(0, (-1, len(x_BsD)))
    return x_nBsD.movedim(0, 1).flatten(1, 2)


def _scatter_sum(x_BSD: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum over all ranks, only of this rank's tokens: [B, s, D]."""
    return reduce_scatter(x_BSD, 1, group)


class VocabularyShare:
    """This rank's `n_rows` rows of a `models.loss.Vocabulary`. The methods `max` and `sum` overwrite `x`."""

    def __init__(self, mesh: DeviceMesh, n_rows: int) -> None:
        self.group, self.n_parts, self.n_rows = mesh.get_group(), mesh.size(), n_rows
        self.start = mesh.get_local_rank() * n_rows

    def rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        row = labels - self.start
        here = (row >= 0) & (row < self.n_rows)
        return torch.where(here, row, 0), here

    def max(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, self.group)
        return x

    def sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.SUM, self.group)
        return x


def loss_by_vocabulary(
    loss: _Loss, mesh: DeviceMesh, x_BsD: Tensor, weight_VD: DTensor, labels_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss and count of all tokens. Each rank has the logits of its part of the vocabulary."""
    # Each rank's gradient is the term of its share of the vocabulary; the gather's backward sums the terms.
    x_BSD = Exchange.apply(x_BsD, _gather, _scatter_sum, mesh.get_group())
    share_VD = weight_VD.to_local()
    return loss(x_BSD, share_VD, labels_BS, VocabularyShare(mesh, len(share_VD)))


def loss_by_tokens(
    loss: _Loss, mesh: DeviceMesh, x_BsD: Tensor, weight_VD: DTensor, labels_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `loss` of all tokens. Each rank gathers the weight, and computes the logits of its tokens."""
    whole_VD = weight_VD.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    labels_Bs = labels_BS.chunk(mesh.size(), dim=1)[mesh.get_local_rank()]
    own, n_valid = loss(x_BsD, whole_VD, labels_Bs)
    total = own.detach().clone()
    for sum_ in (total, n_valid):
        dist.all_reduce(sum_, group=mesh.get_group())
    # The value is the loss of all tokens. The gradient comes from this rank's tokens only.
    return own + (total - own.detach()), n_valid


def _logits_of_all(logits: _Forward, mesh: DeviceMesh, x_BD: Tensor, weight_VD: DTensor) -> Tensor:
    """Return the logits of the whole vocabulary on every rank, gathered from the ranks' shares."""
    share_BV = logits(x_BD, weight_VD.to_local())
    shares = [torch.empty_like(share_BV) for _ in range(mesh.size())]
    dist.all_gather(shares, share_BV.contiguous(), group=mesh.get_group())
    return torch.cat(shares, dim=1)
