"""Measures traffic and memory of ranks, and memory of long sequences: the trainer's step on a CPU, float32.

    benchmarks/scaling.py --ranks 1 2 4 --axes fsdp tp cp
    benchmarks/scaling.py --sequences 4096 16384 65536 131072 --attention sdpa --compile --json

With --ranks: the second step on rank 0. The global batch is the same for every axis and number of ranks.
Prints calls of collectives and the bytes of their inputs, bytes of the rank's tensors, and the bytes that one
micro-batch keeps for its backward.
With --sequences: the second step, on one document. Prints the peak resident memory of the step minus the
resident memory before it (Linux), and the growth: the exponent with which memory grows with the length, from
the next shorter sequence to this one. 1.0 is linear, 2.0 quadratic.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from loss import peak, reset_peak, table
from memory import bytes_by_kind, keep_gradients
from synthetic import write_shards
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchtitan_lite.config.job import load_job
from torchtitan_lite.launch.world import join, leave, world_size
from torchtitan_lite.training.trainer import Trainer

AXES = {"fsdp": "data-parallel-shard-degree", "tp": "tensor-parallel-degree", "cp": "context-parallel-degree"}
TINY = {"n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 512}  # with --sequences


def main() -> None:
    args = parse(sys.argv[1:])
    if args.worker:
        with tempfile.TemporaryDirectory() as folder:
            return (work_on_sequence if args.sequences else work_as_rank)(args, Path(folder))
    report = {
        "torch": torch.__version__,
        "ranks": [on_ranks(args, axis, n_ranks) for axis in args.axes for n_ranks in args.ranks],
        "sequences": with_growth([on_sequence(args, length) for length in sorted(set(args.sequences))]),
    }
    print(json.dumps(report) if args.json else described(report), flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--ranks", type=int, nargs="+", default=[], metavar="N")
    parser.add_argument("--axes", choices=AXES, nargs="+", default=list(AXES), help="axes of the N ranks")
    parser.add_argument("--batch", type=int, default=8, help="samples in a step of all ranks")
    parser.add_argument("--seq", type=int, default=256, help="tokens in each sample")
    parser.add_argument("--sequences", type=int, nargs="+", default=[], metavar="TOKENS")
    parser.add_argument("--attention", choices=("sdpa", "flex", "varlen"), default="sdpa")
    parser.add_argument("--compile", action="store_true", help="only with --sequences, like --attention")
    parser.add_argument("--json", action="store_true", help="print a line of JSON")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.worker and not args.ranks and not args.sequences:
        parser.error("give --ranks, --sequences or both")
    return args


def on_ranks(args: argparse.Namespace, axis: str, n_ranks: int) -> dict[str, Any]:
    """The report of rank 0 of `n_ranks`, each with one thread."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_ranks)]
    options = ["--worker", axis, "--batch", str(args.batch), "--seq", str(args.seq)]
    return reported([*launcher, __file__, *options], OMP_NUM_THREADS="1")


def on_sequence(args: argparse.Namespace, length: int) -> dict[str, Any]:
    """The report of a process that trains on sequences of `length` tokens."""
    options = ["--worker", "sequence", "--sequences", str(length), "--attention", args.attention]
    return reported([__file__, *options, *["--compile"] * args.compile])


def reported(argv: list[str], **environment: str) -> dict[str, Any]:
    """Run a worker that sees no GPU, and return its line of JSON."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        sys.exit(f"{' '.join(argv)}\nfailed with status {done.returncode}:\n{done.stderr}")
    print(lines[-1], file=sys.stderr)
    return json.loads(lines[-1])


class Traffic(TorchDispatchMode):
    """Counts the calls of each collective and the bytes of the tensors that go into it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # DTensor then runs its own operators and exchanges, which come here too
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait_", "_wrap_")):
            # Most collectives name their inputs `input...`; an all-reduce has only `tensors`, first.
            named = zip(func._schema.arguments, args, strict=False)
            inputs = [value for argument, value in named if argument.name.startswith("input")] or args[:1]
            self.sent[name][0] += 1
            self.sent[name][1] += sum(x.nbytes for x in tree_leaves(inputs) if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def work_as_rank(args: argparse.Namespace, folder: Path) -> None:
    """Be one of the ranks. The first rank prints its report."""
    axis, n_ranks = args.worker, world_size()
    local = args.batch // n_ranks if axis == "fsdp" else args.batch
    options = [f"--parallelism.{AXES[axis]}", str(n_ranks), "--training.global-batch-size", str(args.batch),
               "--training.local-batch-size", str(local), "--training.seq-len", str(args.seq)]  # fmt: skip
    trainer = trainer_of(options, folder, n_samples=3 * args.batch)
    trainer.stepper.train_step()
    keep_gradients(trainer)
    reset_peak("cpu")
    with Traffic() as traffic:
        stats = trainer.stepper.train_step()
    report = {
        "axis": axis,
        "ranks": n_ranks,
        "peak_rss_gib": round(peak("cpu") / 2**30, 3),
        "loss": round(stats.loss, 4),
        "collectives": dict(sorted(traffic.sent.items())),
        "bytes_into_collectives": sum(size for _, size in traffic.sent.values()),
        **bytes_by_kind(trainer),
    }
    if trainer.world.is_first:
        print(json.dumps(report), flush=True)
    leave()


def work_on_sequence(args: argparse.Namespace, folder: Path) -> None:
    """Train on one sequence and print the time and the memory."""
    [length] = args.sequences
    overrides = json.dumps({**TINY, "max_seq_len": length})
    options = ["--model.overrides", overrides, "--model.attention", args.attention,
               "--training.seq-len", str(length), "--training.local-batch-size", "1",
               "--compile.enable" if args.compile else "--compile.no-enable"]  # fmt: skip
    trainer = trainer_of(options, folder, n_samples=2)
    trainer.stepper.train_step()
    before = reset_peak("cpu")
    stats = trainer.stepper.train_step()
    above = peak("cpu") - before
    report = {
        "tokens": length,
        "attention": args.attention,
        "compile": args.compile,
        "step_s": round(stats.seconds, 2),
        "before_gib": round(before / 2**30, 3),
        "above_gib": round(above / 2**30, 3),
        "bytes_per_token": round(above / length),
    }
    print(json.dumps(report), flush=True)


def trainer_of(options: list[str], folder: Path, n_samples: int) -> Trainer:
    """A trainer on synthetic tokens in `folder`, the same tokens on every rank."""
    argv = ["--model.name", "qwen3", "--model.flavor", "debugmodel", "--job.device", "cpu",
            "--training.mixed-precision-param", "float32", *options]  # fmt: skip
    job = load_job(argv, world_size=world_size()).config
    shards = write_shards(folder, job.decoder.vocab_size, n_samples, job.training.seq_len)
    return Trainer(job, join("cpu"), shards=shards)


def with_growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add its growth (see the docstring of this module) to each report except the first."""
    for last, row in pairwise(rows):
        beyond = math.log(row["bytes_per_token"] / last["bytes_per_token"])
        row["growth"] = round(1 + beyond / math.log(row["tokens"] / last["tokens"]), 3)
    return rows


def described(report: dict[str, Any]) -> str:
    """The report as tables."""
    tables = [table(report[mode]) for mode in ("sequences", "ranks") if report[mode]]
    exchanges = [
        f"{row['axis']} {row['ranks']}: {name}, {n_calls} calls, {size:,} bytes"
        for row in report["ranks"]
        for name, (n_calls, size) in row["collectives"].items()
    ]
    return "\n".join([*tables, *exchanges])


if __name__ == "__main__":
    main()
