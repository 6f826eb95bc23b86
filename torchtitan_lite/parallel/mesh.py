"""The mesh of all ranks of a run.

The mesh has four axes. Ranks along a later axis exchange more data, so their numbers are closer together:

    dp_replicate   each rank has a copy of the model (HSDP's outer axis)
    dp_shard       the ranks share one copy of the weights, and see different samples
    cp             the ranks share one copy of the weights, and split each sequence
    tp             the ranks split each matrix
"""

from dataclasses import dataclass
from math import prod
from typing import Annotated, Literal

from pydantic import Field
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan_lite.config.load import Problem
from torchtitan_lite.config.problem import Remedy

AXES = ("dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """The size of each axis of the mesh."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The sizes in the order of AXES."""
        return self.replicate, self.shard, self.context, self.tensor

    @property
    def data(self) -> int:
        """The number of groups of ranks that see different samples."""
        return self.replicate * self.shard

    @property
    def fsdp(self) -> int:
        """The number of ranks over which FSDP shards one copy of the weights."""
        return self.shard * self.context

    @property
    def world(self) -> int:
        """The number of all ranks."""
        return prod(self.sizes)

    def data_rank(self, rank: int) -> int:
        """Return the number of the group of `rank`, among the `data` groups that see different samples."""
        return rank // (self.context * self.tensor)


@dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    """The number of ranks along each axis of the mesh. The degrees multiply to the number of ranks."""

    data_parallel_replicate_degree: Annotated[int, Field(ge=1), Remedy("use 1 for none")] = 1
    """Groups of ranks that each hold the whole model and see different samples."""
    data_parallel_shard_degree: (
        Literal[-1] | Annotated[int, Field(ge=1), Remedy("use -1 for all ranks that are left")]
    ) = -1
    """Ranks that share one copy of the weights and see different samples. -1: all remaining ranks."""
    tensor_parallel_degree: Annotated[int, Field(ge=1), Remedy("use 1 for none")] = 1
    """Ranks that split each matrix. Between the matrices they split the sequence."""
    context_parallel_degree: Annotated[int, Field(ge=1), Remedy("use 1 for none")] = 1
    """Ranks that split each sequence."""
    context_parallel_method: Literal["allgather", "ulysses"] = "allgather"
    """allgather: each rank gathers all keys and values. ulysses: ranks trade parts of sequences for heads."""
    context_parallel_load_balancer: Literal["headtail", "none"] = "headtail"
    """headtail: each rank has a chunk of the first half and its mirror image. none: one chunk each."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """default, always: drop a block's weights after its forward. never: faster, but takes more memory."""
    disable_loss_parallel: bool = False
    """Each tensor-parallel rank projects its own tokens onto the whole vocabulary, instead of all tokens onto
    its share of the vocabulary.
    """

    def degrees(self, world_size: int) -> Degrees:
        """Return the size of each axis for `world_size` ranks. `problems` must accept this number."""
        replicate, context, tensor = self._fixed()
        shard = self.data_parallel_shard_degree
        if shard == -1:
            shard = max(1, world_size // (replicate * context * tensor))
        return Degrees(replicate=replicate, shard=shard, context=context, tensor=tensor)

    def problems(self, key: str, world_size: int = 1) -> list[Problem]:
        """Return a problem if the product of the degrees is not `world_size`."""
        fixed, shard = prod(self._fixed()), self.data_parallel_shard_degree
        words = " x ".join(
            f"{name} {degree}"
            for name, degree in zip(("replicate", "context", "tensor"), self._fixed(), strict=True)
            if degree > 1
        )
        if shard == -1 and world_size % fixed:
            rule = f"is no multiple of {words}"
            remedy = f"use {_started(fixed)} or a multiple, or change the degrees in [{key}]"
            return [Problem("WORLD_SIZE", world_size, rule, remedy, (key,))]
        if shard != -1 and fixed * shard != world_size:
            words = f"{words} x shard {shard} = {fixed * shard}" if words else f"shard {shard}"
            rule = f"is not {words}, the product of the degrees in [{key}]"
            remedy = f"use {_started(fixed * shard)}"
            if world_size % fixed == 0:
                remedy += f", or set {key}.data_parallel_shard_degree to -1"
            return [Problem("WORLD_SIZE", world_size, rule, remedy, (key,))]
        return []

    def _fixed(self) -> tuple[int, int, int]:
        return self.data_parallel_replicate_degree, self.context_parallel_degree, self.tensor_parallel_degree


def _started(n_ranks: int) -> str:
    return f"{n_ranks} ranks (torchrun --nproc_per_node {n_ranks})"


def build_mesh(degrees: Degrees, device_type: str) -> DeviceMesh:
    """Return the mesh over all ranks of the default process group, with the axes AXES."""
    return init_device_mesh(device_type, degrees.sizes, mesh_dim_names=AXES)


def weights_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return FSDP's mesh: an axis over the shards of a copy, after an axis over copies if there are any."""
    has_copies = mesh["dp_replicate"].size() > 1
    if mesh["cp"].size() == 1:
        return mesh["dp_replicate", "dp_shard"] if has_copies else mesh["dp_shard"]
    # FSDP sees dp_shard and cp as one axis, because gradients are summed over all ranks of these axes.
    shards = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    return DeviceMesh._concatenate([mesh["dp_replicate"], shards]) if has_copies else shards
