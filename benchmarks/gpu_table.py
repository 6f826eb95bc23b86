"""The items of gpu.py: what is run, for how long at most, beside what, and how large."""

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Item:
    """A command that passes when it ends with status 0."""

    name: str
    lane: str
    """Items of a lane run one after the other."""
    seconds: int
    """After which it is ended."""
    words: tuple[str, ...]
    is_tests: bool = False
    """Whether it runs tests, of which one at least must pass."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large the items are, and on what."""

    device: str
    small: bool
    python: str
    here: Path
    peers: Path | None = None
    """A folder with other programs."""
    commands: tuple[str, ...] = ()
    """More of them, as command lines."""

    def script(self, name: str, *words: object) -> tuple[str, ...]:
        """A script of this folder."""
        return self.python, str(self.here / name), *(str(word) for word in words)

    def step(self, size: str, *words: object, few: bool = False) -> tuple[str, ...]:
        """step.py at a size; with `few`, only what compiles: a block, two steps."""
        words = *self.shape(size), *words, "--dtype", "bf16", "--device", self.device, "--json"
        counts = ("--warmup", 5, "--steps", 15)
        if few or self.small:
            counts = ("--warmup", 1, "--steps", 1, "--layers", 1)
        return self.script("step.py", *words, *counts)

    def shape(self, size: str) -> tuple[object, ...]:
        """Preset and tokens, as options of step.py."""
        if self.small:
            return "--preset", "tiny", "--seq", 256, "--batch", 2
        if size == "large":
            return "--preset", "llama3-8b", "--seq", 8192, "--batch", 1
        return "--preset", "qwen3-0.6b", "--seq", 4096, "--batch", 4

    @property
    def rivals(self) -> dict[str, tuple[str, ...]]:
        """The programs to compare with."""
        shape = (
            "--preset tiny --seq 256 --batch 2" if self.small else "--preset qwen3-0.6b --seq 4096 --batch 4"
        )
        more = "--warmup 1 --steps 1" if self.small else "--warmup 5 --steps 15"
        options = shlex.split(f"{shape} {more} --dtype bf16 --compile --device {self.device}")
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
"""Each sample one document."""
PACKED = {kind: ("--attention", kind, "--documents", 16, 700) for kind in ("varlen", "flex", "sdpa")}


def items_of(what: str, sizes: Sizes) -> list[Item]:
    """The items of `check` or `speed`; on a CPU, those that one can do."""
    return check(sizes) if what == "check" else speed(sizes)


def check(sizes: Sizes) -> list[Item]:
    """Is it right? The longest lanes first, as there may be more of them than run at a time."""
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
        # One after the other, as each takes a third of the GPU's memory or more.
        Item("cache-large", "large", 150, sizes.step("large", *ONE, "--compile", few=True)),
        *(Item(f"cache-{name}", "large", 290, words) for name, words in sizes.rivals.items()),
    ]
    return (on_gpu if sizes.device == "cuda" else []) + anywhere


def tests(sizes: Sizes, folder: str, name: str = "") -> tuple[str, ...]:
    """The tests of a folder that need a GPU; with `name`, those that have it in theirs."""
    options = shlex.split("-m gpu -q -ra -p no:cacheprovider -p pytest_timeout --durations 5")
    return sizes.python, "-m", "pytest", *options, *(["-k", name] if name else []), f"tests/{folder}"


def cells(sizes: Sizes) -> tuple[str, ...]:
    """Waits, copies, breaks and recompiles of each backend, with each kind of recompute, and compiled."""
    few = ("--steps", 4, "--seq", 256) if sizes.small else ("--jobs", 8)
    how = "eager" if sizes.small else "*"
    names = f"*/packed/{how}/*/alone", f"*/one/{how}/none/alone", f"*/packed/{how}/none/window"
    return sizes.script("counts.py", "--json", "--where", *few, "--cells", *names)


def seen(sizes: Sizes, name: str) -> tuple[str, ...]:
    """What gpu_items.py finds out."""
    return sizes.script("gpu_items.py", name, "--device", sizes.device, *["--small"] * sizes.small)


def speed(sizes: Sizes) -> list[Item]:
    """How fast is it? What matters most comes first, in case that the time runs out.

    The two rounds of the comparison are in turns (A B C A B C), with others between: a card slows down as it
    warms up.
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
    """A round of our step and those of the others."""
    ours = Item(f"ours-{number}", "speed", 45, sizes.step("", *ONE, "--compile"))
    others = (Item(f"{name}-{number}", "speed", 75, words) for name, words in sizes.rivals.items())
    return [ours, *others]
