"""Save and load a step, in turns with torch's plain dcp.save and dcp.load of the same tensors.

    [torchrun --nproc_per_node 2] benchmarks/checkpoint.py --mib 512 --tensors 64 --rounds 5 --folder FOLDER

Each save goes into a new folder, and the order of the turns changes. The time of a save ends when all bytes
are on the disk: our save hashes them, writes a manifest and publishes too. The time of a load is taken with
the files in the page cache, where the save has left them: our load reads every byte twice, once to verify
it. The peak memory is what the process needs beyond the tensors (Linux). Prints JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from torchtitan_lite.checkpoint.restore import verify
from torchtitan_lite.checkpoint.save import Snapshot, write_step
from torchtitan_lite.checkpoint.state import State
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.checkpoint.tensors import Piece, read_tensors
from torchtitan_lite.launch.world import World


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--mib", type=int, default=512, help="of float32 tensors on each rank")
    parser.add_argument("--tensors", type=int, default=64, help="on each rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where to write; default: the temporary folder")
    args = parser.parse_args()
    # Where there is one process, torch says so at every save.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    ranks = join()
    place = Path(ranks.broadcast(tempfile.mkdtemp(dir=args.folder) if ranks.is_first else ""))
    n = args.mib * 2**18 // args.tensors
    own = {f"model.{ranks.rank}.{i}": torch.randn(n) for i in range(args.tensors)}
    pieces = {name: Piece(local=x, shape=x.shape, offsets=torch.Size([0])) for name, x in own.items()}
    seconds: dict[str, list[float]] = {"plain save": [], "save": [], "plain load": [], "load": []}
    memory: dict[str, float] = dict.fromkeys(seconds, 0.0)
    for number in range(args.rounds):
        turns = list(one_round(place / str(number), number, own, pieces, ranks))
        for name, act in turns if number % 2 else [turns[1], turns[0], turns[3], turns[2]]:
            ranks.gather(None)
            before = resident("VmRSS", reset=True)
            began = perf_counter()
            act()
            ranks.gather(None)
            seconds[name].append(perf_counter() - began)
            memory[name] = max(memory[name], resident("VmHWM") - before)
        if ranks.is_first:
            shutil.rmtree(place / str(number))
    if ranks.is_first:
        place.rmdir()
        print(json.dumps(report(args.mib * ranks.size, ranks.size, seconds, memory), indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()


def join() -> World:
    """Return the ranks that torchrun has started; without torchrun, one."""
    if "RANK" not in os.environ:
        return World()
    dist.init_process_group("gloo")
    return World(rank=dist.get_rank(), size=dist.get_world_size())


def one_round(
    place: Path, number: int, own: dict[str, torch.Tensor], pieces: dict[str, Piece], ranks: World
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield what is timed, in two pairs."""
    state = State(
        step=number,
        n_tokens_seen=0,
        consumed_samples=0,
        validated=-1,
        model_only=False,
        identity={},
        schedule={},
        config={},
    )
    snapshot = Snapshot(pieces=pieces, state=state, made={})
    steps = Steps(place / "ours")
    loaded = {name: torch.full_like(x, -1.0) for name, x in own.items()}

    def save() -> None:
        write_step(steps, snapshot, ranks)

    def load() -> None:
        found = verify(steps.path(number), ranks)
        targets = {name: Piece(local=x, shape=x.shape, offsets=torch.Size([0])) for name, x in loaded.items()}
        read_tensors(found.folder, targets, found.index)
        assert all(torch.equal(x, own[name]) for name, x in loaded.items())

    def plain_load() -> None:
        dcp.load(loaded, checkpoint_id=place / "plain")  # pyright: ignore[reportPrivateImportUsage]
        assert all(torch.equal(x, own[name]) for name, x in loaded.items())

    def plain_save() -> None:
        dcp.save(own, checkpoint_id=place / "plain")  # pyright: ignore[reportPrivateImportUsage]

    yield "plain save", plain_save
    yield "save", save
    yield "plain load", plain_load
    yield "load", load


def resident(key: str, *, reset: bool = False) -> float:
    """Return memory of this process in MiB, now (VmRSS) or at most since the last `reset` (VmHWM)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def report(
    mib: int, n_ranks: int, seconds: dict[str, list[float]], memory: dict[str, float]
) -> dict[str, object]:
    """Return medians, the medians of the ratios within a round, and the most memory."""
    ratios = {
        name: statistics.median(a / b for a, b in zip(seconds[name], seconds[f"plain {name}"], strict=True))
        for name in ("save", "load")
    }
    speeds = {name: round(mib / statistics.median(found)) for name, found in seconds.items()}
    return {
        "mib": mib,
        "ranks": n_ranks,
        "mib_per_second": speeds,
        "times_plain": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "peak_memory_mib": {name: round(mib) for name, mib in memory.items()},
    }


if __name__ == "__main__":
    main()
