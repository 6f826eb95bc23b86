"""Measures how soon a run starts: imports, help, the first step eager and compiled, saving and loading.

    benchmarks/startup.py --rounds 3 --dtype fp32 --json

Imports and first steps are timed in new processes, from the start of the process; a first step ends when it
is reported. "cold" starts with an empty cache of compiled kernels, "warm" with the cache of a cold start.
Saving ends when the step is published. Loading is the time to build a trainer from the step, minus the time
to build a trainer without one; the files are in the page cache.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from step import DTYPES, PRESETS
from synthetic import write_shards

from torchtitan_lite.config.job import load_job
from torchtitan_lite.launch.world import World
from torchtitan_lite.training.record import find_start
from torchtitan_lite.training.trainer import Trainer

STARTS = {
    "import torch": ["-c", "import torch"],
    "import the entry": ["-c", "import torch, torchtitan_lite.train"],
    "import all of a run": ["-c", "import torch, torchtitan_lite.training.trainer"],
    "train --help": ["-m", "torchtitan_lite", "train", "--help"],
    "torchtitan-lite --help": ["-m", "torchtitan_lite", "--help"],
}
"""The command lines of Python whose whole processes are timed."""


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print a line of JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        timed(STARTS["import all of a run"])  # so that the files are in the page cache
        turns = [{name: timed(words) for name, words in STARTS.items()} for _ in range(args.rounds)]
        seconds = {name: [turn[name] for turn in turns] for name in STARTS}
        seconds |= first_steps(args, Path(folder))
        saving = save_and_load(args, Path(folder))
    report = {name: round(statistics.median(found), 2) for name, found in seconds.items()} | saving
    if args.json:
        print(json.dumps(report))
    else:
        print("\n".join(f"{name:24} {value}" for name, value in report.items()))


def timed(words: Sequence[str]) -> float:
    """Seconds of a process that runs `python *words`."""
    began = perf_counter()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return perf_counter() - began


def options(args: argparse.Namespace, folder: Path) -> list[str]:
    """A run of step.py's tiny preset, on the text of the standard library."""
    name, flavor, overrides = PRESETS["tiny"]
    return [
        "--model.name", name, "--model.flavor", flavor, "--model.overrides", json.dumps(overrides),
        "--training.seq-len", "512", "--training.local-batch-size", "8", "--training.steps", "1",
        "--training.mixed-precision-param", DTYPES[args.dtype], "--lr-scheduler.warmup-steps", "0",
        "--job.device", args.device, "--data.cache-dir", str(folder / "data"),
    ]  # fmt: skip


def first_steps(args: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds until the first step is reported: eager, compiled with an empty and with a full cache."""
    common = options(args, folder)
    first_step(common, folder, folder / "unused")  # fills the token cache
    found: dict[str, list[float]] = {"eager": [], "cold": [], "warm": []}
    for number in range(args.rounds):
        cache = folder / f"cache-{number}"
        found["eager"].append(first_step(common, folder, cache))
        found["cold"].append(first_step([*common, "--compile.enable"], folder, cache))
        found["warm"].append(first_step([*common, "--compile.enable"], folder, cache))
    return {f"first step, {name}": seconds for name, seconds in found.items()}


def first_step(words: Sequence[str], folder: Path, cache: Path) -> float:
    """Seconds from the start of a run to its report of the first step."""
    run = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, "-u", "-m", "torchtitan_lite.train", *words, "--job.dump-folder", run]
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    began, seconds, lines = perf_counter(), 0.0, []
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env={**os.environ, **caches}, **pipes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if re.match(r"[\d:]+ +1 ", line) and not seconds:
                seconds = perf_counter() - began
    if process.returncode or not seconds:
        sys.exit(f"{' '.join(command)}\nfailed with status {process.returncode}:\n{''.join(lines[-20:])}")
    return seconds


def save_and_load(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds to save and to load a step of the tiny preset, and its MiB."""
    job = load_job([*options(args, folder), "--checkpoint.enable"]).config
    shards = write_shards(folder, job.decoder.vocab_size, 16, 512)
    trainer = Trainer(job, folder=folder, shards=shards)
    trainer.stepper.train_step()
    saver, state = trainer.saver, trainer.state
    assert saver is not None

    def load() -> Trainer:
        return Trainer(job, World(), find_start(job, folder, World()), shards=shards)

    saving, _ = clocked(lambda: saver.save(state.step, lambda: state.snapshot(is_done=False), last=True))
    building, _ = clocked(lambda: Trainer(job, shards=shards))
    loading, resumed = clocked(load)
    assert resumed.state.step == trainer.state.step
    size = sum(path.stat().st_size for path in (folder / job.checkpoint.folder).rglob("*") if path.is_file())
    loaded = round(max(loading - building, 0.0), 2)
    return {"save": round(saving, 2), "load": loaded, "saved MiB": round(size / 2**20, 1)}


def clocked(act: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds of `act`, and its result."""
    began = perf_counter()
    made = act()
    return perf_counter() - began, made


if __name__ == "__main__":
    main()
