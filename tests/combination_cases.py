"""Every combination of attention, context parallel, tensor parallel, compile and recompute."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import parallel_cases
import torch
import torch._dynamo
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

N_STEPS = 2
GLOBAL_BATCH = 4
SIZES = {"n_layers": 2, "dim": 32, "n_heads": 8, "n_kv_heads": 4, "head_dim": 16, "ffn_dim": 48}

ATTENTIONS = {
    "sdpa": ["sdpa"],
    "flex": ["flex"],
    "flex, block_size = 32": ["flex", "--model.attention.block-size", "32"],
    'flex, BACKEND = "FLASH"': ["flex", "--model.attention.kernel-options", '{"BACKEND": "FLASH"}'],
    **{
        f'varlen, kernel = "{kernel}"': ["varlen", "--model.attention.kernel", kernel]
        for kernel in ("documents", "torch", "flash_attn", "fa3", "fa4")
    },
}
"""The options of each attention of the table."""

FACTORS = {
    "attention": tuple(ATTENTIONS),
    "method": ("none", "allgather", "ulysses"),
    "tensor": ("1", "2"),
    "compile": ("off", "on"),
    "recompute": ("none", "selective", "full"),
}
"""What is combined with what: the columns of the table and their values."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """A row for each, if the table were written out."""

    attention: str
    method: str
    tensor: str
    compile: str
    recompute: str

    @property
    def size(self) -> int:
        """How many ranks it takes."""
        return int(self.tensor) * (1 if self.method == "none" else 2)

    def words(self, compiler: str = "aot_eager") -> list[str]:
        """The options of its training on all its ranks together."""
        method = {} if self.method == "none" else {"context-parallel-method": self.method}
        options = {
            "parallelism.tensor-parallel-degree": self.tensor,
            "parallelism.context-parallel-degree": 1 if self.method == "none" else 2,
            **{f"parallelism.{key}": value for key, value in method.items()},
            "activation-checkpoint.mode": self.recompute,
            "compile.enable": "true" if self.compile == "on" else "false",
            "compile.backend": compiler,
        }
        return ["--model.attention", *ATTENTIONS[self.attention], *as_words(options)]


def as_words(options: dict[str, object]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def tiny_run(path: object, cache: object, device: str = "cpu", dtype: str = "float32") -> list[str]:
    """The options that all combinations share: packed documents and a model of two blocks."""
    options = {
        "job.device": device,
        "model.flavor": "debugmodel",
        "model.overrides": json.dumps(SIZES),
        "data.dataset": "jsonl",
        "data.path": path,
        "data.cache-dir": cache,
        "training.steps": 10,
        # A GPU's kernels work on tiles of 128.
        "training.seq-len": 64 if device == "cpu" else 256,
        "training.local-batch-size": GLOBAL_BATCH,
        "training.mixed-precision-param": dtype,
        "lr-scheduler.warmup-steps": 2,
    }
    return as_words(options)


def product() -> Iterator[Combination]:
    """Every combination."""
    for values in itertools.product(*FACTORS.values()):
        yield Combination(**dict(zip(FACTORS, values, strict=True)))


def pairwise(combinations: Iterable[Combination]) -> list[Combination]:
    """A few of them, in which any two values meet that meet in one of all."""
    candidates = list(combinations)
    wanted = set().union(*map(pairs, candidates))
    chosen = []
    while wanted:
        # The cheapest of those that bring most.
        best = max(candidates, key=lambda c: (len(pairs(c) & wanted), -c.size, c.compile == "off"))
        chosen.append(best)
        wanted -= pairs(best)
    return chosen


def pairs(combination: Combination) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    """The pairs of values in a combination."""
    return set(itertools.combinations(asdict(combination).items(), 2))


class Curve(NamedTuple):
    """A training in numbers."""

    losses: list[float]
    norms: list[float]


def curves(runs: Sequence[Sequence[str]]) -> list[Curve]:
    """What the trainings with these options come to, on the ranks at hand."""
    return [curve(argv) for argv in runs]


def curve(argv: Sequence[str]) -> Curve:
    torch._dynamo.reset()  # what is compiled of one training counts against the limit of the next
    trainer = parallel_cases.new_trainer(argv)
    steps = [trainer.train_step() for _ in range(N_STEPS)]
    return Curve([step.loss for step in steps], [step.grad_norm for step in steps])


def curves_on_gpus(runs: Sequence[Sequence[str]]) -> list[Curve]:
    """The same with a GPU for each rank, which talk over NCCL."""
    torch.cuda.set_device(dist.get_rank())
    store = dist.distributed_c10d._get_default_store()
    _meet_again("nccl", PrefixStore("gpus", store))
    found = curves(runs)
    _meet_again("gloo", PrefixStore("afterwards", store))
    return found


def _meet_again(backend: str, store: Store) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


assert [field.name for field in fields(Combination)] == list(FACTORS)
