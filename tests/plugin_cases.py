"""A plugin that registers a member at every door, and a context that undoes registrations."""

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from parallel_cases import here, precision

from torchtitan_lite import registry
from torchtitan_lite.config.job import load_job
from torchtitan_lite.training.trainer import Trainer

DOORS = {
    "families": registry.families,
    "attentions": registry.attentions,
    "datasets": registry.datasets,
    "tokenizers": registry.tokenizers,
    "optimizers": registry.optimizers,
    "hooks": registry.hooks,
}

ALL = '''
"""A member for every door."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch

from torchtitan_lite import registry
from torchtitan_lite.attention import Capabilities, Refusal, Sdpa
from torchtitan_lite.config.load import Problem
from torchtitan_lite.data import DataConfig, Source, Texts
from torchtitan_lite.data.tokenizer import ByteTokenizer, Tokenizer
from torchtitan_lite.models import qwen3
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.models.presets import Family


@dataclass(frozen=True, kw_only=True)
class Olmo(DecoderConfig):
    """A decoder with a field of its own."""

    architecture: ClassVar[str] = "olmo"
    norm: Literal["before", "after"] = "after"


debugmodel = qwen3.PRESETS["debugmodel"]
values = {**{field.name: getattr(debugmodel, field.name) for field in fields(debugmodel)}, "n_layers": 3}
registry.families.register(Family(name="olmo", presets={"tiny": Olmo(**values)}))


@registry.attentions.register
@dataclass(frozen=True, kw_only=True)
class Plain:
    """Attention by another name."""

    kind: Literal["plain"] = "plain"
    chunk: int = 16
    """Queries that are computed at a time."""

    supports: ClassVar = (replace(Sdpa.supports[0], name="plain"),)

    def implementation(self, device: str) -> Capabilities:
        return self.supports[0]

    def option_refusals(self, device: str) -> list[Refusal]:
        return [] if self.chunk > 0 else [Refusal("chunk", self.chunk, "must be greater than 0", "use 16")]

    def build(self) -> torch.nn.Module:
        return Sdpa().build()

    def mask(self, *args: Any, **options: Any) -> Any:
        return Sdpa().mask(*args, **options)


@registry.datasets.register
@dataclass(frozen=True, kw_only=True)
class Counting(DataConfig):
    """Numbers, counted up."""

    dataset: Literal["counting"] = "counting"
    path: str = "nowhere"
    """A key that other datasets have too."""
    n_documents: int = 200
    """How many texts there are."""

    def problems(self, key: str) -> list[Problem]:
        few = self.n_documents < 1
        found = [Problem(f"{key}.n_documents", self.n_documents, "must be at least 1", "use 200")] * few
        return super().problems(key) + found

    def open(self) -> Source:
        return Texts(lambda: (" ".join(map(str, range(n, n + 40))) for n in range(self.n_documents)))


class _Shifted(ByteTokenizer):
    def __init__(self, shift: int) -> None:
        self.fingerprint = f"shifted-{shift}"


@registry.tokenizers.register
@dataclass(frozen=True, kw_only=True)
class Shifted:
    """Bytes by another name."""

    name: Literal["shifted"] = "shifted"
    shift: int = 1
    """A number that only the fingerprint knows."""

    def problems(self, key: str) -> list[Problem]:
        return [Problem(f"{key}.shift", self.shift, "is 0", "use 1")] if self.shift == 0 else []

    def build(self) -> Tokenizer:
        assert self.shift, "options that are wrong build nothing"
        return _Shifted(self.shift)


@registry.optimizers.register
@dataclass(frozen=True, kw_only=True)
class Descent:
    """Gradient descent."""

    name: Literal["Descent"] = "Descent"
    lr: float = 0.25
    """Learning rate."""
    momentum: float = 0.0
    """Share of the last update that is made again."""

    def problems(self, key: str) -> list[Problem]:
        return [] if self.lr > 0 else [Problem(f"{key}.lr", self.lr, "must be greater than 0", "use 0.1")]

    def build(self, parameters: Mapping[str, Any], groups: Mapping[str, str]) -> torch.optim.Optimizer:
        assert set(parameters) <= set(groups)
        return torch.optim.SGD(parameters.values(), lr=self.lr, momentum=self.momentum)


@registry.hooks.register
@dataclass(frozen=True, kw_only=True)
class Clock:
    """Says the time."""

    name: Literal["clock"] = "clock"
    every_steps: int = 10
    """Steps from one time to the next."""

    def problems(self, key: str) -> list[Problem]:
        wrong = self.every_steps < 1
        return [Problem(f"{key}.every_steps", self.every_steps, "must be at least 1", "use 10")] * wrong

    def build(self, run: Any) -> object:
        return self

    def step(self, stats: Any) -> None:
        """Nothing."""
'''


def run_to_the_end(argv: list[str], folder: Path) -> list[dict[str, Any]]:
    """Run in float64 with all hooks, on all ranks, and return the lines of metrics.jsonl."""
    with precision(double=True):
        world = here()
        job = load_job(argv, world_size=world.size).config
        Trainer(job, world, folder=folder).run()
    if dist.is_initialized():
        dist.barrier()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def forgotten() -> Iterator[None]:
    """Undo the registrations, imports and changes of sys.path that happen in this context."""
    members = {door: dict(door.members) for door in DOORS.values()}
    registering = set(registry._registering)
    path, modules = list(sys.path), set(sys.modules)
    importlib.invalidate_caches()  # Python may have cached a folder before a test wrote a file into it
    try:
        yield
    finally:
        for door, before in members.items():
            door.members = before
        registry._registering.intersection_update(registering)
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if not name.startswith(("torch", "numpy", "pydantic")):
                del sys.modules[name]
