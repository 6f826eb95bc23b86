"""Measures the seconds to draw the initial weights of a model, on CPU ranks with one thread each.

    benchmarks/initialise.py --model qwen3 0.6B --ranks 1 2 4
    benchmarks/initialise.py --model qwen3 0.6B --ranks 2 4 --axis tp --json

The figures are those of the slowest rank. Processor seconds do not depend on other work of the machine; wall
seconds fall only while there are free cores. `shared` is 1 if each of n ranks needs 1/n of the processor
seconds of one rank.
"""

import argparse
import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from loss import table
from scaling import reported

from torchtitan_lite.launch.world import join, leave
from torchtitan_lite.models.init import init_weights
from torchtitan_lite.models.registry import resolve
from torchtitan_lite.parallel.apply import apply
from torchtitan_lite.parallel.fsdp import own_shard
from torchtitan_lite.parallel.mesh import Degrees, build_mesh

AXES = {
    "fsdp": lambda n: Degrees(shard=n),
    "tp": lambda n: Degrees(tensor=n),
    "cp": lambda n: Degrees(context=n),
}


def main() -> None:
    args = parse(sys.argv[1:])
    if args.worker:
        return work(args)
    rows = [on_ranks(args, n_ranks) for n_ranks in args.ranks]
    seconds_of_all = [row["processor_s"] * row["ranks"] for row in rows]
    for row, seconds in zip(rows, seconds_of_all, strict=True):
        row["shared"] = round(seconds_of_all[0] / seconds, 3)
    print(json.dumps({"torch": torch.__version__, "rows": rows}) if args.json else table(rows), flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", nargs=2, default=["qwen3", "0.6B"], metavar=("NAME", "FLAVOR"))
    parser.add_argument("--layers", type=int, help="number of blocks; default: the preset's")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--axis", choices=AXES, default="fsdp", help="the axis of the N ranks")
    parser.add_argument("--json", action="store_true", help="print a line of JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def on_ranks(args: argparse.Namespace, n_ranks: int) -> dict[str, Any]:
    """The report of `n_ranks`, each with one thread."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n_ranks)]
    options = ["--worker", "--model", *args.model, "--axis", args.axis]
    options += ["--layers", str(args.layers)] if args.layers else []
    return reported([*launcher, __file__, *options], OMP_NUM_THREADS="1")


def work(args: argparse.Namespace) -> None:
    """Be one of the ranks. The first rank prints the figures of the slowest."""
    world, overrides = join("cpu"), {"n_layers": args.layers} if args.layers else {}
    with torch.device("meta"):
        model = resolve(*args.model, overrides=overrides).build()
    apply(model, mesh=build_mesh(AXES[args.axis](world.size), "cpu"))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        own_shard(parameter)[0].zero_()  # the system maps the memory before the clock starts
    dist.barrier()
    wall, processor = time.perf_counter(), time.process_time()
    init_weights(model, 0, own_shard)
    took = [time.perf_counter() - wall, time.process_time() - processor]
    n_drawn = sum(own_shard(parameter)[0].numel() for parameter in model.parameters())
    most = torch.tensor([*took, n_drawn], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if world.is_first:
        wall, processor, n_drawn = most.tolist()
        report = {
            "axis": args.axis,
            "ranks": world.size,
            "numbers_per_rank": int(n_drawn),
            "processor_s": round(processor, 3),
            "wall_s": round(wall, 3),
            "ns_per_number": round(processor / n_drawn * 1e9, 2),
        }
        print(json.dumps(report), flush=True)
    leave()


if __name__ == "__main__":
    main()
