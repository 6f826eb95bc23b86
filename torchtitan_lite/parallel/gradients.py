"""Compute the global norm of sharded gradients, and scale the gradients."""

from collections.abc import Iterable, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def sum_partial(parameters: Iterable[nn.Parameter]) -> None:
    """Sum, in one all-reduce, the gradients of the weights that tensor parallel leaves whole.

    Each rank has a term of such a gradient. Under FSDP, FSDP has already summed the terms.
    """
    pairs = [
        (p, p.grad)
        for p in parameters
        if isinstance(p, DTensor) and isinstance(p.grad, DTensor) and p.grad.placements != p.placements
    ]
    if not pairs:
        return
    mesh = pairs[0][0].device_mesh
    assert mesh.ndim == 1 and all(p.placements[0].is_replicate() for p, _ in pairs), "norms, without FSDP"
    terms = [gradient.to_local() for _, gradient in pairs]
    flat = torch.cat([term.flatten() for term in terms])
    dist.all_reduce(flat, group=mesh.get_group())
    for (p, _), total in zip(pairs, flat.split([term.numel() for term in terms]), strict=True):
        p.grad = DTensor.from_local(total.view(p.shape), mesh, p.placements, run_check=False)


@torch.no_grad()
def squared_norm(parameters: Iterable[nn.Parameter], world_size: int) -> Tensor:
    """Return this rank's term of the squared global norm. The terms of all `world_size` ranks sum to it.

    The sum needs one all-reduce of one number. The norm of a DTensor needs one all-reduce per mesh axis.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    local = _local(gradients)
    # On a CPU torch adds up float32 squares one after the other: for 10M elements only four digits are right.
    dtype = torch.float64 if local[0].device.type == "cpu" else None
    norms = torch._foreach_norm(local, dtype=dtype)  # pyright: ignore[reportPrivateImportUsage]
    # Each of n shards is on world_size / n ranks, so each rank counts n / world_size of its shard.
    shares = [(_n_shards(gradient) / world_size) ** 0.5 for gradient in gradients]
    torch._foreach_mul_(norms, shares)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).square().sum()


@torch.no_grad()
def scale(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply every gradient by `factor`, in place."""
    gradients = _local([p.grad for p in parameters if p.grad is not None])
    torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]


def _local(gradients: Sequence[Tensor]) -> list[Tensor]:
    # With gradients enabled, each `to_local` would run an autograd function in Python.
    assert not torch.is_grad_enabled()
    return [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]


def _n_shards(gradient: Tensor) -> int:
    """Return the number of distinct shards of the gradient. Ranks beyond that number hold copies."""
    if not isinstance(gradient, DTensor):
        return 1
    mesh = gradient.device_mesh
    return prod(mesh.size(axis) for axis in range(mesh.ndim) if not gradient.placements[axis].is_replicate())
