"""Runs the items of `gpu.sh check` and `gpu.sh speed`: each item is a process with a time limit.

    gpu.sh check [--items NAME ...]     several items at a time; fills the compile caches for `speed`
    gpu.sh speed [COMMAND ...]          one item after the other; the commands take turns with our step

Writes two files to the folder OUT: results.jsonl has a line for each item, logs.tgz has the output of the
items. When the time is up, the remaining items are skipped. The last line says how many items passed; the
exit status is 1 if an item failed or was skipped.

Environment variables, with their defaults:
    OUT             outputs/benchmarks
    CACHE           outputs/gpu-cache: the folder of the compile caches, the same for `check` and `speed`
    PEERS           no default: a folder with other trainers
    LANES           items at a time in `check`: three for each four cores
    SECONDS_IN_ALL  310
    SIZE, DEVICE    SIZE=small makes the items tiny, DEVICE=cpu needs no GPU: to try the script
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

from gpu_table import Item, Sizes, items_of

HERE = Path(__file__).resolve().parent
LEAST_SECONDS = 3
"""If less time is left, no item is started."""
SHOWN = (
    "tests",
    "tokens_per_s_median",
    "step_ms_median",
    "peak_mem_gib",
    "peak_rss_gib",
    "tflops",
    "gb_per_s",
)
_TESTS = re.compile(r"^(?:=+ )?((?:\d+ \w+(?:, )?)+) in [\d.]+s", re.MULTILINE)


def main() -> None:
    args = parse(sys.argv[1:])
    environment = os.environ
    sizes = Sizes(
        device=environment.get("DEVICE", "cuda"),
        small=environment.get("SIZE") == "small" or environment.get("DEVICE") == "cpu",
        python=sys.executable,
        here=HERE,
        peers=Path(environment["PEERS"]).absolute() if environment.get("PEERS") else None,
        commands=tuple(args.commands),
    )
    items = items_of(args.suite, sizes)
    if unknown := sorted(set(args.items) - {item.name for item in items}):
        sys.exit(f"no such items: {' '.join(unknown)}; there are {' '.join(item.name for item in items)}")
    items = [item for item in items if item.name in args.items or not args.items]
    if sizes.small:  # a trial may run on a slow and busy machine
        items = [replace(item, seconds=4 * item.seconds) for item in items]
    cores = os.cpu_count() or 1
    n_lanes = int(environment.get("LANES", max(1, cores * 3 // 4))) if args.suite == "check" else 1
    run = Run(
        out=Path(environment.get("OUT", "outputs/benchmarks")),
        seconds=float(environment.get("SECONDS_IN_ALL", 310)),
        environment=variables(sizes, args.suite, cores, n_lanes),
    )
    # Do not change a cache that the user named.
    if args.suite == "speed" and "TORCHINDUCTOR_CACHE_DIR" not in environment:
        forget_choices(Path(run.environment["TORCHINDUCTOR_CACHE_DIR"]))
    results = run.all(items, n_lanes)
    print(last_line(args.suite, results), flush=True)
    sys.exit(0 if all(result["status"] == "passed" for result in results) else 1)


def parse(argv: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__, formatter_class=raw)
    suites = parser.add_subparsers(dest="suite", required=True)
    check, speed = (
        suites.add_parser(name, description=__doc__, formatter_class=raw) for name in ("check", "speed")
    )
    speed.add_argument("commands", nargs="*", default=[], metavar="COMMAND", help="runs another program")
    for each in (check, speed):
        each.add_argument("--items", nargs="+", default=[], metavar="NAME", help="run only these items")
    check.set_defaults(commands=[])
    return parser.parse_args(argv)


def variables(sizes: Sizes, suite: str, cores: int, n_lanes: int) -> dict[str, str]:
    """The environment variables of the items."""
    cache = Path(os.environ.get("CACHE", "outputs/gpu-cache")).absolute()
    found = {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # unknown plugins may warn, and warnings are errors
        "HF_HUB_OFFLINE": "1",
        "TT022": os.environ.get("TT022", os.environ.get("PACKAGES", "")),
    }
    if suite == "check" and sizes.device == "cuda":
        found |= {"OMP_NUM_THREADS": str(max(1, cores // n_lanes)), "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    return found


def forget_choices(cache: Path) -> None:
    """Make inductor time its variants of each kernel again, because `check` timed them on a busy GPU."""
    for choice in cache.rglob("*.best_config"):
        choice.unlink()


@dataclass
class Run:
    """Runs items until the time is up, and records their results."""

    out: Path
    seconds: float
    environment: dict[str, str]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def all(self, items: Sequence[Item], n_lanes: int) -> list[dict[str, Any]]:
        """Run all items, the items of a lane one after the other. Return the results in the items' order."""
        self.deadline = monotonic() + self.seconds
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "results.jsonl").write_text("")
        lanes = {item.lane: [other for other in items if other.lane == item.lane] for item in items}
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(n_lanes) as pool:
            self.logs = Path(folder)
            try:
                done = pool.map(lambda lane: [self.one(item) for item in lane], lanes.values())
                results = {result["item"]: result for lane in done for result in lane}
            finally:
                with tarfile.open(self.out / "logs.tgz", "w:gz") as archive:
                    archive.add(folder, "logs")
        return [results[item.name] for item in items]

    def one(self, item: Item) -> dict[str, Any]:
        """Run an item, and record its result."""
        left = self.deadline - monotonic()
        began = monotonic()
        if left < LEAST_SECONDS:
            status, figures = "skipped", {"why": "no time left"}
        else:
            status, figures = self.outcome(item, min(item.seconds, left))
        result = {"item": item.name, "status": status, "seconds": round(monotonic() - began, 1)}
        result["figures"] = figures
        with self.lock:
            with (self.out / "results.jsonl").open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(described(result), flush=True)
        return result

    def outcome(self, item: Item, seconds: float) -> tuple[str, dict[str, Any]]:
        """Run an item and write its output to a log. Return its status and its figures."""
        log = self.logs / f"{item.name}.log"
        with log.open("w") as file:
            file.write(f"$ {' '.join(item.words)}\n")
            file.flush()
            options = {"stdout": file, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            # In a new session, so that `kill` also ends the children.
            process = subprocess.Popen(
                item.words, env=self.environment, cwd=HERE.parent, start_new_session=True, **options
            )
            try:
                status = "passed" if process.wait(seconds) == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "timeout"
            finally:
                kill(process)
        text = log.read_text(errors="replace")
        figures = figures_of(text)
        if item.is_tests and status == "passed" and "passed" not in figures.get("tests", ""):
            status = "failed"  # all tests were skipped
        if status == "failed":
            figures["why"] = "\n".join(text.strip().splitlines()[-3:])[-600:]
        return status, figures


def kill(process: subprocess.Popen[Any]) -> None:
    """End a process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def figures_of(text: str) -> dict[str, Any]:
    """The figures in an item's output: its line of JSON, or all such lines as rows, or pytest's summary."""
    lines = [found for line in text.splitlines() if (found := table_of(line))]
    if lines:
        return lines[0] if len(lines) == 1 else {"rows": lines}
    tests = _TESTS.findall(text)
    return {"tests": tests[-1]} if tests else {}


def table_of(line: str) -> dict[str, Any] | None:
    """The JSON object on a line, or None if the line is something else, such as a Python dict."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def described(result: dict[str, Any]) -> str:
    """A line to print when an item is done."""
    figures = result["figures"]
    shown = [f"{name} {figures[name]}" for name in SHOWN if name in figures]
    if "why" in figures:
        shown.append(figures["why"].splitlines()[-1][:160])
    return (
        f"{result['item']:<22} {result['status']:<8} {result['seconds']:6.1f} s  {'  '.join(shown)}".rstrip()
    )


def last_line(suite: str, results: Sequence[dict[str, Any]]) -> str:
    """How many items passed, and the names of the others."""
    passed = sum(result["status"] == "passed" for result in results)
    others = {
        status: [result["item"] for result in results if result["status"] == status]
        for status in ("failed", "timeout", "skipped")
    }
    words = [f"{status}: {' '.join(names)}" for status, names in others.items() if names]
    return "; ".join([f"{suite}: {passed} of {len(results)} passed", *words])


if __name__ == "__main__":
    main()
