"""FSDP2: weights, gradients and optimizer state in shards, each block's weights gathered when it runs."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def apply_fsdp(
    model: nn.Module,
    layers: Iterable[nn.Module],
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    reshard: bool,
    offload: bool,
) -> None:
    """Shard `model`, in place, layer by layer; the rest (embedding, norm, head) is one group of its own.

    That group is gathered in the weights' own dtype: the gradient of an embedding adds up thousands of rows
    for a token, in the dtype of the weight that they are read from.

    Args:
        layers: the blocks of the model, in the order in which they run.
        mesh: one axis, or two, of which the first holds copies of the shards (HSDP).
        compute_dtype: the blocks' weights are gathered in it where it is not the weights' own.
        reshard: drop a block's gathered weights after its forward and gather them again for its backward.
        offload: keep shards, gradients and optimizer state in the host's memory.
    """
    options: dict[str, Any] = {"mesh": mesh}
    precision = MixedPrecisionPolicy()
    if compute_dtype == torch.bfloat16:
        precision = MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    groups = [
        fully_shard(layer, reshard_after_forward=reshard, mp_policy=precision, **options) for layer in layers
    ]
    # The loss reads the head's weight outside of the head's own forward: these are never dropped in between.
    groups.insert(0, fully_shard(model, reshard_after_forward=False, **options))
    for module, following in pairwise(groups):
        # The gather of the next block starts before this block is computed. FSDP does so by itself in the
        # backward, but in the forward only while the host is ahead, and after the step's one wait it is not.
        module.set_modules_to_forward_prefetch([following])
    for module in groups:
        # The loss is divided by the global count of tokens, so the ranks have terms of a sum. The factor
        # alone would ask for a scaling reduction, which gloo does not have.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sync_gradients(model: nn.Module, *, last: bool) -> None:
    """Say whether the coming backward is a step's last: only then are gradients summed over ranks."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(last)


def own_shard(x: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """This rank's shard of `x`, in the same memory, and where it lies in the whole (`shard_box`)."""
    return local_shard(x), shard_box(x)


def shard_box(x: Tensor) -> list[tuple[int, int]]:
    """Where this rank's shard of `x` lies in the whole: its start and length in each dim."""
    box = [(0, n) for n in x.shape]
    if not isinstance(x, DTensor):
        return box
    # Tensor parallel, the last axis of the mesh, was applied first: the other axes split its shares further.
    mesh = x.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for axis in reversed(range(mesh.ndim)):
        placement = x.placements[axis]
        if placement.is_replicate():
            continue
        # By attribute: the placement of FSDP's shards of a tensor-parallel share is a class of its own.
        dim = getattr(placement, "dim")  # noqa: B009
        start, n = box[dim]
        # As torch.chunk does it: all of one size, but for the last ones where that does not divide.
        size = -(-n // mesh.size(axis))
        first = min(coordinate[axis] * size, n)
        box[dim] = start + first, min(first + size, n) - first
    return box


def local_shard(x: Tensor) -> Tensor:
    """This rank's shard of `x`, in the same memory."""
    return x.to_local().detach() if isinstance(x, DTensor) else x.detach()
