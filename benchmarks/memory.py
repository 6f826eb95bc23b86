"""Memory of a rank: its share of parameters, gradients and optimizer state, and the activations it keeps.

    torchrun --nproc_per_node 4 benchmarks/memory.py --config configs/debugmodel.toml [options of the trainer]

Prints a line of JSON: bytes of the tensors on rank 0 after a step, what is kept between forward and backward
of one micro-batch, and the peak. The first three fall as 1/n for n ranks under FSDP.
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
from torchtitan_lite.training.hardware import peak_memory_gib
from torchtitan_lite.training.trainer import Trainer


def main() -> None:
    job = load_job(sys.argv[1:], world_size=world_size()).config
    world = join(job.device, offload=job.training.enable_cpu_offload)
    trainer = Trainer(job, world)
    # The gradients stay, to be measured afterwards.
    trainer.state.optimizer.zero_grad = lambda *_, **__: None
    trainer.stepper.train_step()
    parameters = list(trainer.state.model.parameters())
    states = trainer.state.optimizer.state.values()
    record = {
        "ranks": world.size,
        "blocks": len(trainer.state.model.blocks),
        "recompute": job.activation_checkpoint.mode,
        "parameters": n_bytes(parameters),
        "gradients": n_bytes(p.grad for p in parameters if p.grad is not None),
        "optimizer_state": n_bytes(x for state in states for x in state.values() if isinstance(x, Tensor)),
        "kept_for_backward": kept_bytes(trainer),
        "peak_gib": round(peak_memory_gib(trainer.stepper.device), 3),
    }
    if world.is_first:
        print(json.dumps(record))
    leave()


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of this rank's part of the tensors."""
    storages = [x.untyped_storage() for x in local_tensors(tensors)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Made(TorchDispatchMode):
    """Holds weakly to the memory of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[StorageWeakRef] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor) and not isinstance(x, DTensor)]
        self.made += [StorageWeakRef(x.untyped_storage()) for x in tensors]
        return out


def kept_bytes(trainer: Trainer) -> int:
    """Bytes that the forward of one micro-batch leaves for its backward, parameters apart.

    What is still there of all that it made: selective recompute keeps some out of autograd's sight.
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
