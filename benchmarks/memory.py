"""Measures the memory of a rank: parameters, gradients, optimizer state and activations.

    torchrun --nproc_per_node 4 benchmarks/memory.py --config configs/debugmodel.toml [options of the trainer]

Prints a line of JSON with bytes on rank 0 after a step: parameters, gradients and optimizer state (1/n of the
whole for n ranks under FSDP), and the activations of one micro-batch that are kept for the backward. Also
prints the peak memory.
"""

import gc
import json
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchtitan_lite.config.job import load_job
from torchtitan_lite.launch.world import join, leave, world_size
from torchtitan_lite.training.metrics import peak_memory_gib
from torchtitan_lite.training.trainer import Trainer


def main() -> None:
    job = load_job(sys.argv[1:], world_size=world_size()).config
    world = join(job.device, offload=job.training.enable_cpu_offload)
    trainer = Trainer(job, world)
    keep_gradients(trainer)
    trainer.stepper.train_step()
    record = {
        "ranks": world.size,
        "blocks": len(trainer.state.model.blocks),
        "recompute": job.activation_checkpoint.mode,
        **bytes_by_kind(trainer),
        "peak_gib": round(peak_memory_gib(trainer.stepper.device), 3),
    }
    if world.is_first:
        print(json.dumps(record))
    leave()


def keep_gradients(trainer: Trainer) -> None:
    """Let steps keep their gradients, so that `bytes_by_kind` can measure them."""
    trainer.state.optimizer.zero_grad = lambda *_, **__: None


def bytes_by_kind(trainer: Trainer) -> dict[str, int]:
    """This rank's bytes of parameters, gradients, optimizer state and activations, after a step."""
    parameters = list(trainer.state.model.parameters())
    states = trainer.state.optimizer.state.values()
    return {
        "parameters": n_bytes(parameters),
        "gradients": n_bytes(p.grad for p in parameters if p.grad is not None),
        "optimizer_state": n_bytes(x for state in states for x in state.values() if isinstance(x, Tensor)),
        "kept_for_backward": kept_bytes(trainer),
    }


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's part of the tensors."""
    storages = [x.untyped_storage() for x in local_tensors(tensors)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Made(TorchDispatchMode):
    """Keeps weak references to the memory of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor) and not isinstance(x, DTensor)]
        self.made += [StorageWeakRef(x.untyped_storage()) for x in tensors]
        return out


def kept_bytes(trainer: Trainer) -> int:
    """Bytes that the forward of one micro-batch keeps for its backward, without parameters.

    Counts all memory that the forward allocated and has not freed, because selective recompute keeps some
    tensors that autograd does not see.
    """
    batch = next(trainer.state.batches)
    parameters = local_tensors(trainer.state.model.parameters())
    before = {StorageWeakRef(x.untyped_storage()).cdata for x in parameters}
    with Made() as forward:
        loss, _ = trainer.stepper.loss_of(batch)
    gc.collect()
    references = {reference.cdata for reference in forward.made} - before
    storages = [torch.UntypedStorage._new_with_weak_ptr(cdata) for cdata in references]
    kept = sum(storage.nbytes() for storage in storages if storage is not None)
    loss.backward()
    return kept


def local_tensors(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of the tensors."""
    return [x.to_local() if isinstance(x, DTensor) else x for x in tensors]


if __name__ == "__main__":
    main()
