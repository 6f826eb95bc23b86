"""The items of gpu.py: their commands, time limits, lanes and sizes."""

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Item:
    """A command that passes when it ends with status 0."""

    name: str
    lane: str
    """Items of one lane run one after the other."""
    seconds: int
    """Time limit."""
    words: tuple[str, ...]
    is_tests: bool = False
    """Whether the item runs tests; at least one of them must pass."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of the items, and where programs are."""

    device: str
    small: bool
    python: str
    here: Path
    peers: Path | None = None
    """A folder with other trainers."""
    commands: tuple[str, ...] = ()
    """Command lines of further programs."""

    def script(self, name: str, *words: object) -> tuple[str, ...]:
        """The command of a script in this folder."""
        return self.python, str(self.here / name), *(str(word) for word in words)

    def step(self, size: str, *words: object, few: bool = False) -> tuple[str, ...]:
        """The command of step.py at a size. `few`: one block, two steps, enough to fill the compile cache."""
        few = few or self.small
        layers = ("--layers", 1) if few else ()
        return self.script("step.py", *self.options(size, few), *words, *layers, "--json")

    def options(self, size: str, few: bool) -> tuple[object, ...]:
        """The options that step.py and the programs to compare with have in common."""
        counts = ("--warmup", 1, "--steps", 1) if few else ("--warmup", 5, "--steps", 15)
        return *self.shape(size), *counts, "--dtype", "bf16", "--device", self.device

    def shape(self, size: str) -> tuple[object, ...]:
        """The options of step.py for preset and tokens."""
        if self.small:
            return "--preset", "tiny", "--seq", 256, "--batch", 2
        if size == "large":
            return "--preset", "llama3-8b", "--seq", 8192, "--batch", 1
        return "--preset", "qwen3-0.6b", "--seq", 4096, "--batch", 4

    @property
    def rivals(self) -> dict[str, tuple[str, ...]]:
        """The commands of the programs to compare with."""
        options = *map(str, self.options("", self.small)), "--compile"
        known = {
            "torchtitan": ("torchtitan022_trainer.py", "--attn", "sdpa"),
            "transformers": ("hf_trainer.py", "--bare"),
        }
        found = {}
        for name, (script, *words) in known.items():
            if self.peers and (self.peers / script).is_file():
                found[name] = (self.python, str(self.peers / script), *words, *options)
        named = {f"other-{n}": tuple(shlex.split(line)) for n, line in enumerate(self.commands, start=1)}
        return {**found, **named}


ONE = ("--attention", "sdpa")
"""Each row is one document."""
PACKED = {kind: ("--attention", kind, "--documents", 16, 700) for kind in ("varlen", "flex", "sdpa")}


def items_of(suite: str, sizes: Sizes) -> list[Item]:
    """The items of `check` or `speed`; on a CPU, those that need no GPU."""
    return check(sizes) if suite == "check" else speed(sizes)


def check(sizes: Sizes) -> list[Item]:
    """Are the results correct? The longest lanes come first, because some lanes may have to wait."""
    on_gpu = [
        *(
            Item(f"combinations-{kind}", f"combinations-{kind}", 300, tests(sizes, "parallel", kind), True)
            for kind in ("varlen", "sdpa", "flex")
        ),
        Item("cells", "cells", 300, cells(sizes)),
        Item("kernels", "kernels", 280, tests(sizes, "attention"), True),
        Item("resume", "resume", 200, tests(sizes, "checkpoint"), True),
        Item("one-wait", "tests", 120, tests(sizes, "training"), True),
        Item("generate", "tests", 120, tests(sizes, "inference"), True),
        Item("loss", "tests", 120, tests(sizes, "models"), True),
        Item("forks", "tests", 60, tests(sizes, "parallel", "a_rank_can_use"), True),
        Item("ranks", "ranks", 160, seen(sizes, "ranks")),
    ]
    anywhere = [
        Item("environment", "environment", 60, seen(sizes, "environment")),
        Item("curve", "environment", 200, seen(sizes, "curve")),
        Item("cache-one", "caches", 150, sizes.step("", *ONE, "--compile", few=True)),
        *(
            Item(f"cache-{kind}", "caches", 150, sizes.step("", *options, "--compile", few=True))
            for kind, options in PACKED.items()
        ),
        # In one lane, because each takes at least a third of the GPU's memory.
        Item("cache-large", "large", 150, sizes.step("large", *ONE, "--compile", few=True)),
        *(Item(f"cache-{name}", "large", 290, words) for name, words in sizes.rivals.items()),
    ]
    return (on_gpu if sizes.device == "cuda" else []) + anywhere


def tests(sizes: Sizes, folder: str, name: str = "") -> tuple[str, ...]:
    """The command of a folder's tests for a GPU; with `name`, of those whose names contain it."""
    options = shlex.split("-m gpu -q -ra -p no:cacheprovider -p pytest_timeout --durations 5")
    return sizes.python, "-m", "pytest", *options, *(["-k", name] if name else []), f"tests/{folder}"


def cells(sizes: Sizes) -> tuple[str, ...]:
    """The command of counts.py for each backend, eager and compiled, with each kind of recompute."""
    few = ("--steps", 4, "--seq", 256) if sizes.small else ("--jobs", 8)
    how = "eager" if sizes.small else "*"
    names = f"*/packed/{how}/*/alone", f"*/one/{how}/none/alone", f"*/packed/{how}/none/window"
    return sizes.script("counts.py", "--json", "--where", *few, "--cells", *names)


def seen(sizes: Sizes, name: str) -> tuple[str, ...]:
    """The command of an item of gpu_items.py."""
    return sizes.script("gpu_items.py", name, "--device", sizes.device, *["--small"] * sizes.small)


def speed(sizes: Sizes) -> list[Item]:
    """How fast is it? The most important items come first, in case the time runs out.

    A GPU slows down as it warms up, so the comparison has two rounds in turns (A B C ... A B C), with other
    items between them.
    """
    first, second = (rivals_in_turn(sizes, number) for number in (1, 2))
    vocabulary, rows, dim = (512, 256, 64) if sizes.small else (151936, 16384, 1024)
    loss = ("--vocabularies", vocabulary, "--rows", rows, "--dim", dim, "--dtype", "bf16", "--json")
    return [
        Item("ceilings", "speed", 30, seen(sizes, "ceilings")),
        *first,
        Item("loss", "speed", 40, sizes.script("loss.py", *loss, "--device", sizes.device)),
        Item("packed-varlen", "speed", 45, sizes.step("", *PACKED["varlen"], "--compile")),
        Item("large", "speed", 60, seen(sizes, "large")),
        *second,
        Item("packed-flex", "speed", 45, sizes.step("", *PACKED["flex"], "--compile")),
        Item("packed-sdpa", "speed", 45, sizes.step("", *PACKED["sdpa"], "--compile")),
        Item("eager", "speed", 40, sizes.step("", *ONE)),
    ]


def rivals_in_turn(sizes: Sizes, number: int) -> list[Item]:
    """A round of the comparison: our step, then the steps of the other programs."""
    ours = Item(f"ours-{number}", "speed", 45, sizes.step("", *ONE, "--compile"))
    others = (Item(f"{name}-{number}", "speed", 75, words) for name, words in sizes.rivals.items())
    return [ours, *others]
