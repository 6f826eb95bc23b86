"""Items of gpu.py that no other script has. Each prints a line of JSON; exit status 1 means a wrong result.

environment   the card, and the versions of the installed packages
ceilings      the speeds of a large matrix product and of a large copy: upper limits for a step
curve         losses of the debug model, compiled in bfloat16, against the same training in float32 on the CPU
ranks         losses with a process group of one rank, and with shards in host memory, against a plain run
large         a step of Llama-3 8B's shape, with as many blocks as fit the card's memory
"""

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import step
import torch
from clock import Clock

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "triton", "numpy", "pydantic", "safetensors", "tokenizers", "transformers", "torchtitan",
)  # fmt: skip
MOST_APART_AT_FIRST, N_FIRST = 0.01, 5
"""Largest distance in nats in each of the first steps, which differ by rounding only."""
MOST_APART, WINDOW = 0.05, 10
"""Largest distance of the means of WINDOW steps. By then single steps differ by twice that on any device."""
MOST_APART_OF_RANKS, N_STEPS_OF_RANKS = 1e-2, 5
NO_CURVE = 1e9
LAYERS = ((120, 24), (70, 14), (40, 6), (0, 2))
"""(GiB of memory, number of blocks that fit with 8,192 tokens)."""


def main() -> None:
    args = parse(sys.argv[1:])
    found = ITEMS[args.item](args)
    print(json.dumps(found), flush=True)
    sys.exit(0 if found.get("is_right", True) else 1)


def parse(argv: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("item", choices=ITEMS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    return parser.parse_args(argv)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """The card, and the versions of the installed packages. Raises if torch does not see the device."""
    found: dict[str, Any] = {name: installed(name) for name in PACKAGES}
    found |= {"python": platform.python_version(), "cores": os.cpu_count(), "cuda": torch.version.cuda}
    if args.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "card": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
            "driver": asked("driver_version"),
            "clocks": asked("clocks.sm,clocks.mem,temperature.gpu,power.draw"),
        }
    return found


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def asked(query: str) -> str | None:
    """A property of the first GPU, by nvidia-smi."""
    words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def ceilings(args: argparse.Namespace) -> dict[str, Any]:
    """TFLOP/s of a bfloat16 matrix product, and GB/s of a copy (bytes read plus bytes written): medians."""
    size, n_bytes, rounds = (256, 1 << 20, 3) if args.small else (8192, 4 << 30, 30)
    # Random values: a product of zeros takes less power and is faster.
    a, b = (torch.randn(size, size, device=args.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randint(255, (n_bytes,), dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    product = median_seconds(lambda: torch.mm(a, b, out=out), rounds, args.device)
    copy = median_seconds(lambda: target.copy_(source), rounds, args.device)
    return {
        "tflops": round(2 * size**3 / product / 1e12, 3),
        "gb_per_s": round(2 * n_bytes / copy / 1e9, 1),
        "product_size": size,
        "copy_bytes": n_bytes,
        "rounds": rounds,
    }


def median_seconds(act: Callable[[], object], rounds: int, device: str) -> float:
    """Median over `rounds`, by CUDA events on a GPU, after three rounds of warm-up."""
    clock = Clock(torch.device(device))
    for _ in range(3):
        act()
    ticks = [clock.tick()]
    for _ in range(rounds):
        act()
        ticks.append(clock.tick())
    return statistics.median(clock.between(ticks))


def curve(args: argparse.Namespace) -> dict[str, Any]:
    """The debug model's losses by step, in bfloat16 on the device and in float32 on the CPU."""
    n_steps = 4 if args.small else 60
    config = ["--config", str(ROOT / "configs" / "debugmodel.toml"), "--training.steps", str(n_steps)]
    with tempfile.TemporaryDirectory() as folder:
        began = perf_counter()
        reference = losses(Path(folder) / "cpu", *config, "--job.device", "cpu")
        seconds = perf_counter() - began
        half = ["--training.mixed-precision-param", "bfloat16", "--compile.enable"]
        found = losses(Path(folder) / "device", *config, *half, "--job.device", args.device)
    first, most = apart(found[:N_FIRST], reference[:N_FIRST]), apart(means(found), means(reference))
    return {
        "is_right": first <= MOST_APART_AT_FIRST and most <= MOST_APART,
        "first_apart": round(first, 5),
        "most_apart": round(most, 5),
        "single_apart": round(apart(found, reference), 5),
        "last": [round(found[-1], 4), round(reference[-1], 4)],
        "cpu_seconds": round(seconds, 1),
        "losses": [round(loss, 4) for loss in found],
    }


def ranks(args: argparse.Namespace) -> dict[str, Any]:
    """The losses of four short runs, which must be the same up to the rounding of bfloat16."""
    config = ["--config", str(ROOT / "configs" / "debugmodel.toml"), "--job.device", args.device]
    config += ["--training.steps", str(N_STEPS_OF_RANKS), "--training.mixed-precision-param", "bfloat16"]
    words = ["RANK=0", "WORLD_SIZE=1", "LOCAL_RANK=0", "LOCAL_WORLD_SIZE=1", "MASTER_ADDR=127.0.0.1"]
    one_rank = dict(word.split("=") for word in [*words, "MASTER_PORT=0"])
    offload = "--training.enable-cpu-offload"
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        runs = {
            "alone": losses(place / "alone", *config),
            "one_rank": losses(place / "one_rank", *config, **one_rank),
            "offload": losses(place / "offload", *config, offload),
            "one_rank_offload": losses(place / "one_rank_offload", *config, offload, **one_rank),
        }
    is_whole = len(runs["alone"]) == N_STEPS_OF_RANKS
    distances = {name: round(apart(found, runs["alone"]), 5) for name, found in runs.items()}
    is_right = is_whole and max(distances.values()) <= MOST_APART_OF_RANKS
    return {"is_right": is_right, "apart": distances, "losses": runs}


def apart(found: list[float], expected: list[float]) -> float:
    """The largest distance in a step; NO_CURVE if the lengths differ or a loss is not finite."""
    if len(found) != len(expected):
        return NO_CURVE
    distances = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    return max(distances) if all(map(math.isfinite, distances)) else NO_CURVE


def means(curve: list[float]) -> list[float]:
    """The means of each WINDOW steps."""
    return [statistics.mean(curve[start : start + WINDOW]) for start in range(0, len(curve), WINDOW)]


def losses(folder: Path, *words: str, **environment: str) -> list[float]:
    """Train, and return the loss of each step. Raises CalledProcessError if the run fails."""
    options = ["--job.dump-folder", str(folder), "--metrics.log-freq", "1", "--metrics.no-enable-tensorboard"]
    options += ["--validation.no-enable"]
    command = [sys.executable, str(ROOT / "torchtitan_lite" / "train.py"), *words, *options]
    status = subprocess.run(command, env={**os.environ, **environment}, check=False).returncode
    if status not in (0, 75):  # 75: stopped early, so the curve is short
        raise subprocess.CalledProcessError(status, command)
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def large(args: argparse.Namespace) -> dict[str, Any]:
    """The report of step.py, and the number of blocks."""
    words = ["--preset", "llama3-8b", "--seq", "8192", "--batch", "1", "--warmup", "3", "--steps", "10"]
    layers = 1
    if args.small:
        words = ["--preset", "tiny", "--seq", "256", "--batch", "1", "--warmup", "1", "--steps", "1"]
    elif args.device == "cuda":
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        layers = next(layers for least, layers in LAYERS if gib >= least)
    options = step.parse([*words, "--dtype", "bf16", "--compile", "--device", args.device])
    refused = []
    while True:
        options.layers = layers
        with tempfile.TemporaryDirectory() as folder:
            try:
                return {**step.measure(options, Path(folder)), "layers": layers, "too_many_layers": refused}
            except torch.OutOfMemoryError:
                if layers <= 2:
                    raise
        refused.append(layers)
        layers -= 2
        gc.collect()
        torch.cuda.empty_cache()


ITEMS = {each.__name__: each for each in (environment, ceilings, curve, ranks, large)}

if __name__ == "__main__":
    main()
