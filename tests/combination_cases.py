"""Every combination of attention, context parallel, tensor parallel, compile and recompute: works or refused.

`python tests/combination_cases.py` writes the table of docs/parallelism.md.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import parallel_cases
import torch
import torch._dynamo
import torch.distributed as dist
from programs import words_of
from torch.distributed.distributed_c10d import PrefixStore, Store

from torchtitan_lite.attention.capabilities import INSTALL_FA4

PAGE = Path(__file__).parents[1] / "docs" / "parallelism.md"
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
"""The options of each attention in the table."""

METHODS, DEGREES = ("none", "allgather", "ulysses"), ("1", "2")
COMPILE, RECOMPUTE = ("off", "on"), ("none", "selective", "full")
FACTORS = {
    "attention": tuple(ATTENTIONS),
    "method": METHODS,
    "tensor": DEGREES,
    "compile": COMPILE,
    "recompute": RECOMPUTE,
}
"""The columns of the table and their values."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One value of each factor."""

    attention: str
    method: str
    tensor: str
    compile: str
    recompute: str

    @property
    def size(self) -> int:
        """The number of ranks."""
        return int(self.tensor) * (1 if self.method == "none" else 2)

    def words(self, compiler: str = "aot_eager") -> list[str]:
        """The options of a training of this combination."""
        method = {} if self.method == "none" else {"context-parallel-method": self.method}
        options = {
            "parallelism.tensor-parallel-degree": self.tensor,
            "parallelism.context-parallel-degree": 1 if self.method == "none" else 2,
            **{f"parallelism.{key}": value for key, value in method.items()},
            "activation-checkpoint.mode": self.recompute,
            "compile.enable": "true" if self.compile == "on" else "false",
            "compile.backend": compiler,
        }
        return ["--model.attention", *ATTENTIONS[self.attention], *words_of(options)]


@dataclass(frozen=True)
class Works:
    """The combination works. `test` is the name of the test that shows it."""

    test: str

    def __str__(self) -> str:
        return f"works: `{self.test}`"


@dataclass(frozen=True)
class Refused:
    """The configuration is refused with this line."""

    line: str

    def __str__(self) -> str:
        return f"refused: `{self.line}`"


Verdict = Works | Refused


@dataclass(frozen=True)
class Row:
    """A row of the table: the values of each factor, and one verdict for all their combinations."""

    attention: str
    compile: tuple[str, ...] = COMPILE
    cpu: Verdict = Works("test_every_combination")
    cuda: Verdict = Works("test_on_gpus")

    @property
    def values(self) -> tuple[tuple[str, ...], ...]:
        return (self.attention,), METHODS, DEGREES, self.compile, RECOMPUTE

    def __str__(self) -> str:
        return as_line([*map(", ".join, self.values), str(self.cpu), str(self.cuda)])


def as_line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


_FLASH = Refused(
    'model.attention.kernel_options = {"BACKEND": "FLASH"} is for CUDA kernels, and the device is cpu: use {}'
)
_SMALL_BLOCKS = Refused(
    "model.attention.block_size = 32 finds no kernel within compiled blocks: "
    "use 128, or set compile.enable = false"
)


def _no_kernel(kernel: str, needs: str) -> Refused:
    rule = f"needs a CUDA device with compute capability {needs}, and the device is cpu"
    return Refused(f'model.attention.kernel = "{kernel}" {rule}: use "auto" or "documents"')


_TORCH = _no_kernel("torch", "8.x or 9.x or 10.x or 12.x")
_FLASH_ATTN = _no_kernel("flash_attn", '8.x or 9.x or 10.x or 12.x, pip install "flash-attn>=2.7"')
_FA3 = _no_kernel("fa3", "9.x, FlashAttention-3 from the flash-attention sources")
_FA4 = _no_kernel("fa4", f"9.x or 10.x, {INSTALL_FA4}")
ROWS = (
    Row("sdpa"),
    Row("flex"),
    Row("flex, block_size = 32", ("off",)),
    Row("flex, block_size = 32", ("on",), cuda=_SMALL_BLOCKS),
    Row('flex, BACKEND = "FLASH"', cpu=_FLASH),
    Row('varlen, kernel = "documents"'),
    Row('varlen, kernel = "torch"', cpu=_TORCH),
    Row('varlen, kernel = "flash_attn"', cpu=_FLASH_ATTN),
    Row('varlen, kernel = "fa3"', cpu=_FA3),
    Row('varlen, kernel = "fa4"', cpu=_FA4),
)
"""The table of docs/parallelism.md."""
HEADER = ("attention", "context parallel", "tp", "compile", "recompute", "on a CPU", "on CUDA (not run yet)")


def verdicts() -> dict[Combination, tuple[Verdict, Verdict]]:
    """The verdict of every combination, on a CPU and on CUDA."""
    found: dict[Combination, tuple[Verdict, Verdict]] = {}
    for row in ROWS:
        for values in itertools.product(*row.values):
            combination = Combination(**dict(zip(FACTORS, values, strict=True)))
            assert combination not in found, f"twice in the table: {combination}"
            found[combination] = row.cpu, row.cuda
    return found


def with_table(page: str) -> str:
    """The page, with its table replaced by the table of `ROWS`."""
    header = as_line(HEADER)
    table = "\n".join([header, "|---" * len(HEADER) + "|", *map(str, ROWS)]) + "\n"
    old = re.compile(rf"^{re.escape(header)}\n(\|.*\n)*", re.MULTILINE)
    written, n_tables = old.subn(lambda _: table, page)
    assert n_tables == 1, f"{n_tables} tables begin with {header}"
    return written


def tiny_run(texts: Path, device: str = "cpu", dtype: str = "float32") -> list[str]:
    """The options of all combinations: packed documents and a model of two blocks."""
    options = {
        "job.device": device,
        "model.overrides": SIZES,
        # A GPU's kernels work on tiles of 128.
        "training.seq-len": 64 if device == "cpu" else 256,
        "training.local-batch-size": GLOBAL_BATCH,
        "training.mixed-precision-param": dtype,
        "lr-scheduler.warmup-steps": 2,
    }
    return parallel_cases.run_of(texts, options)


def product() -> Iterator[Combination]:
    """Every combination."""
    for values in itertools.product(*FACTORS.values()):
        yield Combination(**dict(zip(FACTORS, values, strict=True)))


def pairwise(combinations: Iterable[Combination]) -> list[Combination]:
    """A few of the combinations, which together have every pair of values that the combinations have."""
    candidates = list(combinations)
    wanted = set().union(*map(pairs, candidates))
    chosen = []
    while wanted:
        # The combination with the most new pairs; of several, the cheapest.
        best = max(candidates, key=lambda c: (len(pairs(c) & wanted), -c.size, c.compile == "off"))
        chosen.append(best)
        wanted -= pairs(best)
    return chosen


def pairs(combination: Combination) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    """The pairs of values in a combination."""
    return set(itertools.combinations(asdict(combination).items(), 2))


class Curve(NamedTuple):
    """The numbers of a training, by step."""

    losses: list[float]
    norms: list[float]


def curves(runs: Sequence[Sequence[str]]) -> list[Curve]:
    """The curves of trainings with these options, on all ranks of this process group."""
    return [curve(argv) for argv in runs]


def curve(argv: Sequence[str]) -> Curve:
    torch._dynamo.reset()  # otherwise the graphs of one training count against the limit of the next
    trainer = parallel_cases.new_trainer(argv)
    steps = [trainer.stepper.train_step() for _ in range(N_STEPS)]
    return Curve([step.loss for step in steps], [step.grad_norm for step in steps])


def curves_on_gpus(runs: Sequence[Sequence[str]]) -> list[Curve]:
    """The curves, with a GPU for each rank and NCCL."""
    torch.cuda.set_device(dist.get_rank())
    store = dist.distributed_c10d._get_default_store()
    _meet_again("nccl", PrefixStore("gpus", store))
    found = curves(runs)
    _meet_again("gloo", PrefixStore("afterwards", store))
    return found


def _meet_again(backend: str, store: Store) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    # A rank that leaves early would disconnect a rank that is still joining.
    on_gpus = dist.get_backend() == "nccl"
    dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpus else None)
    dist.destroy_process_group()
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


assert [field.name for field in fields(Combination)] == list(FACTORS)

if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
