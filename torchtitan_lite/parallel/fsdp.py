"""FSDP2: each rank has a shard of weights, gradients and optimizer state, and gathers a block to run it."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def apply_fsdp(
    model: Any, mesh: DeviceMesh, *, compute_dtype: torch.dtype, reshard: bool, offload: bool
) -> None:
    """Shard `model`, in place. Each block is a group. Embedding, last norm and head are one more group.

    The last group is gathered in the dtype of the weights: the gradient of an embedding adds up thousands of
    rows for a frequent token, in the dtype of the gathered weight.

    Args:
        mesh: one axis over the shards, or two axes of which the first is over copies of the shards (HSDP).
        compute_dtype: the dtype in which the weights of blocks are gathered.
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
        fully_shard(layer, reshard_after_forward=reshard, mp_policy=precision, **options)
        for layer in model.layers
    ]
    # This group stays gathered, because the loss reads the head's weight outside of the head's forward.
    groups.insert(0, fully_shard(model, reshard_after_forward=False, **options))
    for module, following in pairwise(groups):
        # Start the gather of the next block before this block is computed. In the backward, FSDP does so by
        # itself. In the forward, FSDP does so only while the host is ahead of the device: not after a wait.
        module.set_modules_to_forward_prefetch([following])
    for module in groups:
        # The loss is divided by the global count of tokens, so the ranks' gradients are terms of a sum.
        # The divide factor alone would make FSDP use a scaling reduction, which gloo does not have.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sync_gradients(model: nn.Module, *, last: bool) -> None:
    """Let the next backward sum gradients over ranks only if it is the `last` backward of the step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_is_last_backward(last)
        model.set_reshard_after_backward(last)


def own_shard(x: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return this rank's shard of `x`, not copied, and its box: a start and a length in each dim of `x`."""
    if not isinstance(x, DTensor):
        return x.detach(), [(0, n) for n in x.shape]
    shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return x.to_local().detach(), list(zip(offset, shape, strict=True))
