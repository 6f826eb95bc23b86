"""What each phase of a step computes and moves, counted as torch dispatches it: no clock, no need for a GPU.

    benchmarks/phases.py --preset tiny --dtype bf16

Takes the options of step.py, without --compile: what is compiled is not dispatched. An operator that only
makes a view counts for nothing; any other reads each tensor that it is given once, all of it, and writes each
that it returns or changes once. Prints a line for each phase: operators, bytes read and written, and these
bytes in units of the parameters as float32 (P).
"""

import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from step import Clock, job_of, parse, watched_step
from synthetic import write_shards
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchtitan_lite.training.trainer import Trainer


class Traffic(TorchDispatchMode):
    """Operators that compute, and the bytes that they are given and make."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = 0, 0, 0
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
"""What an operator says that it changes, for a loss that was scaled, and does not in our use."""


def n_bytes(these: list[Tensor]) -> int:
    """Of all of them."""
    return sum(x.nbytes for x in these)


def tensors(tree: Any) -> list[Tensor]:
    """Those in `tree`, each once."""
    return list({id(x): x for x in tree_leaves(tree) if isinstance(x, Tensor)}.values())


class Counter(Clock):
    """Counts by phase instead of time."""

    def __init__(self, device: torch.device, traffic: Traffic) -> None:
        super().__init__(device)
        self.traffic, self.before = traffic, traffic.counts
        self.found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])

    def mark(self, phase: str) -> None:
        now = self.traffic.counts
        for number, (a, b) in enumerate(zip(self.before, now, strict=True)):
            self.found[phase or "rest"][number] += b - a
        self.before = now


def main() -> None:
    args = parse(sys.argv[1:])
    assert not args.compile, "what is compiled is not dispatched"
    with tempfile.TemporaryDirectory() as folder:
        job = job_of(args)
        shards = write_shards(Path(folder), job.decoder.vocab_size, args.batch * 2, args.seq, args.documents)
        trainer = Trainer(job, shards=shards)
        trainer.train_step()
        with Traffic() as traffic:
            counter = Counter(trainer.device, traffic)
            watched_step(trainer, counter)()
            counter.mark("")
    p = 4 * job.decoder.n_params
    print(f"P = {p:,} bytes")
    for phase, (n, n_read, n_written) in counter.found.items():
        units = f"{n_read / p:8.2f} + {n_written / p:.2f} = {(n_read + n_written) / p:.2f} P"
        print(f"{phase:10} {n:6} operators {n_read:>16,} read {n_written:>16,} written {units}")


if __name__ == "__main__":
    main()
