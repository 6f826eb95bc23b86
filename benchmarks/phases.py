"""Counts the operators, bytes and launches of each phase of a step. Measures no time and needs no GPU.

    benchmarks/phases.py --preset tiny --dtype bf16
    benchmarks/phases.py --device cuda --dtype bf16 --compile --counter SYMBOL     # launches: see counters.py

Also takes the options of step.py (step.py --help). Prints a line for each phase: operators, bytes read and
written, and the bytes in units of P, the size of all parameters in float32. With a counter, prints the
launches of each phase.
Operators and bytes are counted when torch dispatches an operator. torch does not dispatch the operators of a
compiled block, so --compile counts only launches. An operator that only makes a view is not counted. Any
other operator counts as reading each of its tensors once, and writing each tensor that it returns or changes
once.
"""

import argparse
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import counters
import step
import torch
from clock import Clock
from synthetic import write_shards
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchtitan_lite.training.trainer import Trainer


class Traffic(TorchDispatchMode):
    """Counts the operators that compute, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: tuple[int, ...] = 0, 0, 0
        """Operators, bytes read, bytes written."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        aliases = [value.alias_info for value in func._schema.returns if value.alias_info is not None]
        if any(not alias.is_write for alias in aliases) or name.startswith(_FREE):
            return out
        given = list(zip(func._schema.arguments, args, strict=False))
        read = [x for argument, value in given if name not in _ONLY_WRITE for x in tensors(value)]
        changed = [
            x
            for argument, value in given
            if argument.alias_info is not None and argument.alias_info.is_write
            if (name, argument.name) not in _UNCHANGED
            for x in tensors(value)
        ]
        written = changed if aliases else tensors([changed, out])
        n, n_read, n_written = self.counts
        self.counts = n + 1, n_read + n_bytes(read), n_written + n_bytes(written)
        return out


_FREE = ("detach", "empty", "new_empty", "lift_fresh", "_unsafe_view", "_record_function")
_ONLY_WRITE = ("zero_", "fill_", "zeros_like", "new_zeros")
_UNCHANGED = (("_fused_adamw_", "grads"),)
"""Arguments that the schema wrongly marks as changed: AdamW unscales gradients only with a scaler."""


def n_bytes(these: list[Tensor]) -> int:
    """The size of all tensors together."""
    return sum(x.nbytes for x in these)


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in `tree`, each once."""
    return list({id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}.values())


class Counter(Clock):
    """A clock that counts instead of measuring time."""

    def __init__(self, device: torch.device, read: Callable[[], tuple[int, ...]]) -> None:
        super().__init__(device)
        self.read, self.before = read, read()
        self.found: dict[str, list[int]] = defaultdict(lambda: [0] * len(self.before))

    def mark(self, phase: str) -> None:
        now = self.read()
        for number, (a, b) in enumerate(zip(self.before, now, strict=True)):
            self.found[phase or "rest"][number] += b - a
        self.before = now


def main() -> None:
    args, own = parse(sys.argv[1:])
    if args.compile and not own.counter:
        sys.exit("--compile needs --counter: of compiled operators, only launches can be counted")
    with tempfile.TemporaryDirectory() as folder:
        job = step.job_of(args)
        shards = write_shards(Path(folder), job.decoder.vocab_size, args.batch * 4, args.seq, args.documents)
        trainer = Trainer(job, shards=shards)
        for _ in range(2):
            trainer.stepper.train_step()
        if own.counter:
            read = counters.reader(own.counter, own.also)
            print_launches(count(trainer, lambda: (read().launches,)))
        if not args.compile:
            with Traffic() as traffic:
                print_traffic(count(trainer, lambda: traffic.counts), 4 * job.decoder.n_params)


def parse(argv: list[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The options of step.py, and those of this script."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    counters.add_options(parser)
    own, others = parser.parse_known_args(argv)
    return step.parse(others), own


def count(trainer: Trainer, read: Callable[[], tuple[int, ...]]) -> dict[str, list[int]]:
    """By how much the counts that `read` returns grow in each phase of one step."""
    counter = Counter(trainer.stepper.device, read)
    step.watched_step(trainer, counter)()
    counter.mark("")
    return counter.found


def print_launches(found: dict[str, list[int]]) -> None:
    for phase, (n,) in found.items():
        print(f"{phase:10} {n:6} launches")


def print_traffic(found: dict[str, list[int]], p: int) -> None:
    print(f"P = {p:,} bytes")
    for phase, (n, n_read, n_written) in found.items():
        units = f"{n_read / p:8.2f} + {n_written / p:.2f} = {(n_read + n_written) / p:.2f} P"
        print(f"{phase:10} {n:6} operators {n_read:>16,} read {n_written:>16,} written {units}")


if __name__ == "__main__":
    main()
