"""Counts the launches, waits, copies, graphs and memory of the trainer's step on a GPU, and prints a table.

    benchmarks/counts.py                                    # all cells, on a GPU, counted by torch's profiler
    benchmarks/counts.py --cells 'varlen/*/compiled/*' '*/cp-*' --jobs 8 --json
    benchmarks/counts.py --counter SYMBOL --also SYMBOL     # counted by a library: see counters.py

A cell is one way to train, attention/rows/how/recompute/with: varlen/packed/compiled/full/alone, for example.
`plain` is not a backend, but the model of plain_model.py. Each cell runs in a new process; cells with cp, tp
or fsdp run in two processes and need two GPUs. Every step gets other documents. Counts are per step, without
the first two steps. Graphs, breaks and peak memory are those of all steps; recompiles are graphs that were
made after the second step.

The goals: one wait per step, no copy from pageable memory, no graph break, no recompile, and at most 1.1
times the launches of `plain`, which has the same recompute, is eager or compiled likewise, and uses the
trainer's settings of inductor (these trade launches for memory). A missed goal is marked ✗, and the exit
status is 1. The model is small (--layers, --preset). Its layers have as many launches as large layers, but
the launches outside of the layers have a larger share.

The symbols of --counter and --also can also be given in the environment, as COUNTERS="SYMBOL SYMBOL ...".
"""

import argparse
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import counters
import plain_model
import step
import torch
from synthetic import write_shards

from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.data import Loader, Samples, Shards
from torchtitan_lite.launch.world import World, join
from torchtitan_lite.parallel.apply import prepare_compile
from torchtitan_lite.training import step as training_step
from torchtitan_lite.training.trainer import Trainer

WINDOW, DOCUMENTS, N_FIRST = 256, (16, 700), 2
MOST_LAUNCHES = 1.1
TWO_RANKS = {
    "cp-allgather": ("context_parallel_degree=2", "context_parallel_method=allgather"),
    "cp-ulysses": ("context_parallel_degree=2", "context_parallel_method=ulysses"),
    "tp": ("tensor_parallel_degree=2",),
    "fsdp": ("data_parallel_shard_degree=2",),
}
FIGURES = ("launches", "of_plain", "waits", "pageable", "graphs", "breaks", "recompiles", "peak_gib")
_TITLES = [name.replace("_", " ").replace("gib", "GiB") for name in FIGURES]
COLUMNS = ("attention", "rows", "how", "recompute", "with", *_TITLES)


@dataclass(frozen=True, order=True)
class Cell:
    """One way to train."""

    attention: str
    rows: str
    how: str
    recompute: str
    beside: str
    """"alone", "window" (a sliding window), or a key of `TWO_RANKS`."""

    @property
    def name(self) -> str:
        return "/".join(vars(self).values())

    @property
    def n_ranks(self) -> int:
        return 2 if self.beside in TWO_RANKS else 1

    @property
    def plain(self) -> "Cell | None":
        """The cell to compare launches with; there is none for two ranks."""
        alone = Cell("plain", "packed", self.how, self.recompute, "alone")
        return alone if self.n_ranks == 1 and self.attention != "plain" else None

    def options(self, args: argparse.Namespace) -> argparse.Namespace:
        """The options of step.py for this cell."""
        words = ["--preset", args.preset, "--layers", args.layers, "--seq", args.seq, "--batch", args.batch]
        words += ["--attention", self.attention if self.attention != "plain" else "varlen"]
        words += ["--recompute", self.recompute, "--dtype", "bf16", "--device", args.device]
        words += ["--warmup", N_FIRST, "--steps", args.steps - N_FIRST]
        words += ["--compile"] * (self.how == "compiled")
        words += ["--documents", *DOCUMENTS] * (self.rows == "packed")
        words += ["--window", WINDOW] * (self.beside == "window")
        return step.parse([str(word) for word in words])


def all_cells() -> list[Cell]:
    """Every cell, in the order of the table."""
    ours, hows, recomputes = ("sdpa", "varlen", "flex"), ("eager", "compiled"), ("none", "selective", "full")
    names = [
        *product(["plain"], ["packed"], hows, recomputes, ["alone"]),
        *product(ours, ["one", "packed"], hows, recomputes, ["alone"]),
        *product(ours, ["packed"], hows, ["none"], ["window", *TWO_RANKS]),
    ]
    return [Cell(*name) for name in names]


def main() -> None:
    args = parse(sys.argv[1:])
    chosen = [c for c in all_cells() if any(fnmatchcase(c.name, pattern) for pattern in args.cells)]
    # Also count the cells to compare with.
    plain = {cell.plain for cell in chosen if args.device == "cuda"}
    cells = [cell for cell in all_cells() if cell in {*chosen, *plain}]
    rows: dict[Cell, dict[str, Any]] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for cell, row in zip(cells, pool.map(lambda cell: measure(cell, args), cells), strict=True):
            of_plain = rows.get(cell.plain, {}).get("launches") if cell.plain else None
            rows[cell] = judged(row, of_plain)
            print(json.dumps(rows[cell]) if args.json else progress(rows[cell]), flush=True)
    if not args.json:
        print(table(rows, args))
    missing = [f"{row['cell']} ({', '.join(row['missed'])})" for row in rows.values() if row["missed"]]
    print(f"{len(rows)} cells, {len(missing)} miss a goal: {', '.join(missing)}", file=sys.stderr)
    sys.exit(1 if missing else 0)


def parse(argv: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--cells", nargs="+", default=["*"], help="patterns with * and ?, as in a shell")
    parser.add_argument("--preset", choices=step.PRESETS, default="tiny")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="steps of each cell, each with other documents")
    parser.add_argument("--jobs", type=int, default=1, help="cells to run at the same time")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a cell")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu counts graphs only")
    counters.add_options(parser)
    parser.add_argument("--where", action="store_true", help="print the lines at which a step waits")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each cell")
    return parser.parse_args(argv)


def forks() -> ForkServerContext:
    """A context that forks a process that has imported torch, because the import is as slow as a cell."""
    # The server of the forks is a new Python, which finds this module only through the environment.
    here, path = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
    if here not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([here, path] if path else [here])
    context = get_context("forkserver")
    context.set_forkserver_preload(["counts"])
    return context


def measure(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of a cell, measured in new processes, or the reason why there are none."""
    context = forks()
    ours, theirs = context.Pipe(duplex=False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks = [
        context.Process(target=serve, args=(cell, args, rank, port, theirs), daemon=True)
        for rank in range(cell.n_ranks)
    ]
    for rank in ranks:
        rank.start()
    theirs.close()
    try:
        found = ours.recv() if wait([ours], args.timeout) else {"error": f"took {args.timeout:g} seconds"}
    except EOFError:
        found = {"error": "died"}
    for rank in ranks:
        rank.join(0 if "error" in found else 10)  # after an error, a rank may wait for one that has ended
        rank.kill()
        rank.join()
    return {"cell": cell.name, **found}


def serve(cell: Cell, args: argparse.Namespace, rank: int, port: int, results: Connection) -> None:
    """Measure on one rank. The first rank reports the figures; a rank that fails reports its error."""
    try:
        if cell.n_ranks > 1 and args.device == "cuda" and torch.cuda.device_count() < cell.n_ranks:
            results.send({"skipped": f"needs {cell.n_ranks} GPUs"})
            return
        world = World()
        if cell.n_ranks > 1:
            variables = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables |= {"WORLD_SIZE": cell.n_ranks, "LOCAL_WORLD_SIZE": cell.n_ranks}
            os.environ.update({name: str(value) for name, value in variables.items()})
            world = join(args.device)
        with tempfile.TemporaryDirectory() as folder:
            found = figures(cell, args, world, Path(folder))
        if world.is_first:
            results.send(found)
    except BaseException as error:
        first_line = str(error).strip().partition("\n")[0]
        results.send({"error": f"{type(error).__name__}: {first_line}"[:300]})
        raise


def figures(cell: Cell, args: argparse.Namespace, world: World, folder: Path) -> dict[str, Any]:
    """Train on one rank and count."""
    options = cell.options(args)
    axis = [f"--parallelism.{word}" for word in TWO_RANKS.get(cell.beside, ())]
    job = step.job_of(options, *axis, world_size=world.size)
    n_samples = args.batch * args.steps * (2 if cell.beside == "fsdp" else 1) + args.batch
    shards = write_shards(folder, job.decoder.vocab_size, n_samples, args.seq, options.documents)
    if args.counter:  # the library may compute nothing, so losses may be NaN
        training_step.check_finite = lambda **_: None
    act = plain_step(job, options, shards) if cell.attention == "plain" else ours(job, world, shards)
    for _ in range(N_FIRST):
        act()
    first = counters.graphs()
    n_steps = args.steps - N_FIRST - args.where
    counted = counting(args)(lambda: [act() for _ in range(n_steps)]) if args.device == "cuda" else None
    where = counters.waits_of(act) if args.where else []
    last = counters.graphs()
    return {
        **(counted.per_step(n_steps) if counted else {}),
        **last,
        "recompiles": last["graphs"] - first["graphs"],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if counted else None,
        **({"where": where} if args.where else {}),
    }


def counting(args: argparse.Namespace) -> counters.Counting:
    """Count with the library that --counter names, or with torch's profiler."""
    return counters.by_symbols(args.counter, args.also) if args.counter else counters.by_profiler


def ours(job: JobConfig, world: World, shards: Shards) -> Callable[[], float]:
    """The trainer's own step."""
    trainer = Trainer(job, world, shards=shards)
    return lambda: trainer.stepper.train_step().loss


def plain_step(job: JobConfig, options: argparse.Namespace, shards: Shards) -> Callable[[], float]:
    """A step of the plain model, on the same batches."""
    batches = iter(Loader(Samples(shards.train, options.seq), job.debug.seed, options.batch, 0, 1))
    shape, dtype = job.decoder, job.training.compute_dtype
    device = torch.device(job.device)
    # Sets the trainer's options of inductor, which are global to the process.
    prepare_compile(job.compile, device=device.type, head_dim=shape.head_dim)
    plain = plain_model.Training(shape, dtype, device, options.recompute, options.compile)
    return lambda: plain.step(next(batches))


def judged(row: dict[str, Any], of_plain: float | None) -> dict[str, Any]:
    """The row, with the ratio of its launches to the plain model's and the goals that it misses."""
    times = row["launches"] / of_plain if of_plain and "launches" in row else None
    goals = {
        "launches": times is None or times <= MOST_LAUNCHES,
        "waits": row.get("waits", 1) == 1,
        "pageable": not row.get("pageable"),
        "breaks": not row.get("breaks"),
        "recompiles": not row.get("recompiles"),
        "error": "error" not in row,
    }
    missed = [goal for goal, is_reached in goals.items() if not is_reached]
    return {**row, "of_plain": times and round(times, 2), "missed": missed}


def progress(row: dict[str, Any]) -> str:
    """A line to print when a cell is done."""
    numbers = "  ".join(f"{name} {row[name]:g}" for name in FIGURES if row.get(name) is not None)
    why = (
        row.get("error") or row.get("skipped") or f"{numbers}  misses {', '.join(row['missed']) or 'nothing'}"
    )
    return "\n  ".join([f"{row['cell']}: {why}", *row.get("where", [])])


def table(rows: dict[Cell, dict[str, Any]], args: argparse.Namespace) -> str:
    """All rows in Markdown, under a line that says how they were counted."""
    way = "only graphs" if args.device == "cpu" else f"by {'a library' if args.counter else 'the profiler'}"
    head = (
        f"{args.preset}, {args.layers} layers, {args.batch} x {args.seq} tokens, bf16, on {args.device} "
        f"({way}), torch {torch.__version__}; packed: documents of {DOCUMENTS[0]} to {DOCUMENTS[1]} tokens; "
        f"window: {WINDOW}; {args.steps} steps; ✗ misses a goal"
    )
    lines = [" | ".join(COLUMNS), " | ".join(["---"] * len(COLUMNS))]
    for cell, row in rows.items():
        numbers = [shown(row, name) for name in FIGURES]
        if why := row.get("error", row.get("skipped")):
            numbers = [f"{'✗ ' if 'error' in row else ''}{why}", *[""] * (len(numbers) - 1)]
        lines.append(" | ".join([*vars(cell).values(), *numbers]))
    return "\n".join(["", head, "", *(f"| {line} |" for line in lines)])


def shown(row: dict[str, Any], name: str) -> str:
    """The text of a figure in the table."""
    value = row.get(name)
    goal = "launches" if name == "of_plain" else name
    mark = " ✗" if goal in row["missed"] and name != "launches" else ""
    return "-" if value is None else f"{value:,g}{mark}"


if __name__ == "__main__":
    main()
