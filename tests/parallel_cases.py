"""Functions that the tests of parallelism run on ranks (see ranks.py)."""

import gc
import json
import math
import os
import random
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from hook_cases import run_info
from operators import Memory, Operators
from programs import words_of
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtitan_lite.config.job import load_job
from torchtitan_lite.launch.world import World
from torchtitan_lite.training.config import TrainingConfig
from torchtitan_lite.training.hooks import console
from torchtitan_lite.training.trainer import Trainer


def device_of_a_tensor_on_a_gpu() -> str:
    """The device of a tensor that this rank creates."""
    return str(torch.zeros(2, device="cuda").device)


def sum_over_ranks(value: int) -> tuple[int, int, float]:
    """This rank, the number of ranks, and the sum of value + rank over them."""
    total = torch.tensor(float(value + dist.get_rank()))
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def process_id() -> int:
    return os.getpid()


def n_threads() -> int:
    return torch.get_num_threads()


def raise_on(rank: int) -> None:
    """One rank raises, while the others wait for it."""
    if dist.get_rank() == rank:
        raise ValueError(f"no number on rank {rank}")
    dist.barrier()


def raise_after(first: int) -> None:
    """One rank raises, and the others raise 0.2 seconds later."""
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == first:
        store.set("first", "")
    else:
        store.wait(["first"])
        time.sleep(0.2)
    raise ValueError(f"rank {dist.get_rank()} raised")


def die_on(rank: int) -> None:
    """The process of one rank ends; the other ranks notice and raise."""
    if dist.get_rank() == rank:
        os.write(2, b"the last words\n")
        os._exit(7)
    dist.barrier()


def hang_on(folder: Path, *hanging: int) -> None:
    """Some ranks hang. Rank R writes its process id to the file R."""
    rank = dist.get_rank()
    (folder / f"{rank}.part").write_text(str(os.getpid()))
    (folder / f"{rank}.part").rename(folder / f"{rank}")
    if rank in hanging:
        time.sleep(600)


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def crash_at_the_end() -> None:
    """Finish successfully, and crash when the process ends."""
    sound = os._exit
    os._exit = lambda _: sound(9)  # pyright: ignore[reportAttributeAccessIssue]


def warn(category: type[Warning], message: str) -> None:
    warnings.warn(message, category, stacklevel=1)


def unpicklable() -> Any:
    return lambda: None


@dataclass(frozen=True, kw_only=True)
class Training:
    """The results of a few steps."""

    losses: list[float]
    norms: list[float]
    n_tokens: list[int]
    validation: float
    gradients: dict[str, Tensor]
    """The whole, clipped gradients of the last step."""
    parameters: dict[str, Tensor]
    """The whole parameters after the last step."""


@dataclass(frozen=True, kw_only=True)
class Distance:
    """The largest differences between two trainings; for tensors with the name of the tensor."""

    loss: float
    norm: float
    validation: float
    gradient: tuple[float, str]
    """The largest max |a - b| / max |b| of a tensor."""
    parameter: tuple[float, str]
    gradient_norm: tuple[float, str]
    """The largest norm(a - b) / norm(b) of a tensor."""
    parameter_norm: tuple[float, str]
    other_names: list[str]
    """The gradients and parameters that only one of the two has."""
    other_tokens: bool
    """Whether the trainings count different numbers of tokens."""


def write_documents(path: Path) -> None:
    """Write short documents, several of which fit a sample, and a few that are longer than a sample."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 6))) for _ in range(40)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(250):
            n_words = rng.randint(30, 45) if number % 20 == 3 else rng.randint(1, 9)
            file.write(json.dumps({"text": " ".join(rng.choices(words, k=n_words))}) + "\n")


def run_of(texts: Path, options: Mapping[str, object]) -> list[str]:
    """Options of a run of the debug model on the documents in the folder `texts`, in float32 on a CPU."""
    common = {
        "job.device": "cpu",
        "model.flavor": "debugmodel",
        "data.dataset": "jsonl",
        "data.path": texts / "short.jsonl",
        "data.cache-dir": texts / "cache",
        "training.steps": 10,
        "training.seq-len": 64,
        "training.mixed-precision-param": "float32",
    }
    return words_of({**common, **options})


@contextmanager
def precision(double: bool) -> Iterator[None]:
    """With `double`, models are built in float64 and compute in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    dtype = mock.PropertyMock(return_value=torch.float64)
    try:
        with mock.patch.object(TrainingConfig, "compute_dtype", dtype) if double else nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def here() -> World:
    """This process's place among the ranks of its process group; without a group, the only rank."""
    if not dist.is_initialized():
        return World()
    rank, size = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    return World(rank=rank, local_rank=rank, size=size, store=store)


def new_trainer(argv: Sequence[str]) -> Trainer:
    world = here()
    return Trainer(load_job(argv, world_size=world.size).config, world)


def keep_gradients(trainer: Trainer) -> None:
    """Make steps keep their gradients."""
    trainer.state.optimizer.zero_grad = lambda set_to_none=True: None


def train(argv: Sequence[str], n_steps: int, double: bool) -> Training:
    with precision(double):
        trainer = new_trainer(argv)
        steps = [trainer.stepper.train_step() for _ in range(n_steps - 1)]
        keep_gradients(trainer)
        steps.append(trainer.stepper.train_step())
        # Before the validation, which drops gradients if weights are kept after a forward.
        parameters = dict(trainer.state.model.named_parameters())
        gradients = {name: whole(p.grad) for name, p in parameters.items() if p.grad is not None}
        parameters = {name: whole(p) for name, p in parameters.items()}
        trainer.validate()
    return Training(
        losses=[step.loss for step in steps],
        norms=[step.grad_norm for step in steps],
        n_tokens=[step.n_tokens for step in steps],
        validation=trainer.validations[-1].loss,
        gradients=gradients,
        parameters=parameters,
    )


def whole(x: Tensor) -> Tensor:
    """The whole tensor, if this rank has a shard of it."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu()


def distance_to(saved: Path, argv: Sequence[str], n_steps: int, double: bool) -> Distance:
    """The distance of this rank's training from the saved one."""
    return distance(train(argv, n_steps, double), Training(**torch.load(saved, mmap=True)))


def distance(found: Training, wanted: Training) -> Distance:
    def relative(name: str) -> float:
        pairs = zip(getattr(found, name), getattr(wanted, name), strict=True)
        return max(abs(a - b) / abs(b) for a, b in pairs)

    def worst(name: str, order: float) -> tuple[float, str]:
        a, b = getattr(found, name), getattr(wanted, name)
        size = partial(torch.linalg.vector_norm, ord=order)
        ratios = {key: float(size(a[key] - b[key]) / size(b[key])) for key in b if key in a}
        return max((math.inf if math.isnan(far) else far, key) for key, far in (*ratios.items(), ("", 0.0)))

    return Distance(
        loss=relative("losses"),
        norm=relative("norms"),
        validation=abs(found.validation - wanted.validation) / wanted.validation,
        gradient=worst("gradients", math.inf),
        parameter=worst("parameters", math.inf),
        gradient_norm=worst("gradients", 2),
        parameter_norm=worst("parameters", 2),
        other_names=sorted(found.gradients.keys() ^ wanted.gradients.keys())
        + sorted(found.parameters.keys() ^ wanted.parameters.keys()),
        other_tokens=found.n_tokens != wanted.n_tokens,
    )


def state_bytes(argv: Sequence[str]) -> dict[str, int]:
    """The bytes of weights, gradients and optimizer state that this rank holds between two steps."""
    trainer = new_trainer(argv)
    keep_gradients(trainer)
    trainer.stepper.train_step()
    parameters = list(trainer.state.model.parameters())
    states = [x for state in trainer.state.optimizer.state.values() for x in state.values()]
    return {
        "parameters": n_bytes(parameters),
        "gradients": n_bytes([p.grad for p in parameters if p.grad is not None]),
        "optimizer": n_bytes([x for x in states if isinstance(x, Tensor) and x.numel() > 1]),
    }


def n_parameters(argv: Sequence[str]) -> int:
    """The number of parameters that this rank holds."""
    parameters = new_trainer(argv).state.model.parameters()
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)


def agreed_votes(
    argv: Sequence[str], own: Sequence[Sequence[bool]]
) -> tuple[list[Sequence[bool]], list[int]]:
    """The agreed votes of a step in which each rank sets its `own`, and of one without; the sums of both."""
    trainer, sums = new_trainer(argv), []
    trainer.stepper.train_step()
    rank = trainer.world.rank
    votes = []
    for step_votes in (lambda: own[rank], tuple):
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            votes.append(trainer.stepper.train_step(step_votes).votes)
        sums.append(reduced.call_count)
    return votes, sums


def _local(x: Tensor | None) -> Tensor:
    """This rank's shard."""
    assert x is not None
    return x.to_local() if isinstance(x, DTensor) else x


def held_mib(argv: Sequence[str]) -> tuple[float, float, float]:
    """The MiB that this rank holds after a step: weights, gradients, and the optimizer's moments."""
    trainer = new_trainer(argv)
    sizes: list[int] = []

    def note() -> tuple[()]:  # called when the gradients are complete
        sizes.append(sum(_local(weight.grad).nbytes for weight in trainer.state.parameters.values()))
        return ()

    trainer.stepper.train_step(note)
    weights = sum(_local(weight).nbytes for weight in trainer.state.parameters.values())
    states = trainer.state.optimizer.state.values()
    moments = sum(_local(state[key]).nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))
    return weights / 2**20, sizes[0] / 2**20, moments / 2**20


def said_of_work(argv: Sequence[str]) -> list[str]:
    """The lines about the attention work of the first step that this rank prints."""
    trainer, said = new_trainer(argv), []
    run = run_info(job=trainer.job, rank=trainer.world.rank, world_size=trainer.world.size)
    hook = console.WorkConfig().build(run)
    with mock.patch.object(console, "say", said.append):
        for _ in range(2):
            stats = trainer.stepper.train_step()
            hook.step(stats) if hook else None
    return said


def n_bytes(tensors: Sequence[Tensor]) -> int:
    """The bytes of the storages of these tensors; a shared storage counts once."""
    storages = [(x.to_local() if isinstance(x, DTensor) else x).untyped_storage() for x in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def kept_bytes(argv: Sequence[str]) -> int:
    """The bytes that the forward of a micro-batch keeps for its backward, without the weights.

    Counts all tensors of the forward that still exist: autograd does not know all that recompute keeps.
    """
    trainer = new_trainer(argv)
    trainer.stepper.train_step()  # makes the tensors that stay
    batch = next(trainer.state.batches)
    with Memory() as memory:
        loss, _ = trainer.stepper.loss_of(batch)
    gc.collect()
    kept = memory.alive()
    # Threads of gloo release sent tensors a moment later.
    for _ in range(20 if dist.is_initialized() else 0):
        time.sleep(0.01)
        kept = min(kept, memory.alive())
    loss.backward()
    return kept


def exchanges(argv: Sequence[str]) -> dict[str, int]:
    """How often each collective operator runs in the second step."""
    trainer = new_trainer(argv)
    trainer.stepper.train_step()
    with Operators() as operators:
        trainer.stepper.train_step()
    return dict(Counter(name for name, _ in operators.sent))
