"""Counts launches, waits and copies of training steps on a GPU, with torch's profiler or a counting library.

A counting library is loaded before CUDA's runtime and takes its calls. If the library only counts the calls,
no GPU is needed. The library exports `long SYMBOL(int what)`; `_PLACES` lists the values of `what`.
"""

import argparse
import ctypes
import os
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
# "products" are calls of cuBLAS. The library takes a whole call, so it does not see the call's launches.
_PLACES = {"launches": 0, "waits": 1, "to_device": 2, "to_host": 3, "products": 5, "pageable": 9}
_SPAN = "the steps that count"
_LAUNCH = re.compile(r"(cudaLaunch(Cooperative)?Kernel|cuLaunch(Cooperative)?Kernel|cudaGraphLaunch)")
_WAIT = re.compile(r"(cuda(Device|Stream|Event)Synchronize|cu(Ctx|Stream|Event)Synchronize|cudaMemcpy)$")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Totals over all counted steps."""

    launches: int
    """Kernel launches, matrix products included."""
    waits: int
    """Calls that block the host until the device has finished some work."""
    to_device: int
    """Copies from host to device."""
    pageable: int
    """Copies from host to device whose source is not pinned."""
    to_host: int
    """Copies from device to host."""

    def per_step(self, n_steps: int) -> dict[str, float]:
        """Each count divided by the number of steps."""
        return {name: round(count / n_steps, 2) for name, count in vars(self).items()}


Counting = Callable[[Callable[[], object]], Counts]
"""Calls a function and counts the function's launches, waits and copies."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --counter and --also, which name the functions of a counting library.

    COUNTERS="SYMBOL SYMBOL ..." in the environment gives their defaults.
    """
    first, *others = os.environ.get("COUNTERS", "").split() or [None]
    parser.add_argument("--counter", metavar="SYMBOL", default=first, help="counting function of a library")
    parser.add_argument(
        "--also",
        metavar="SYMBOL",
        nargs="+",
        default=others,
        help="further functions that count launches",
    )


def reader(symbol: str, also: Iterable[str] = ()) -> Callable[[], Counts]:
    """Return a function that reads the counts of a library that is loaded in this process.

    `symbol` names the counting function. `also` names functions `long SYMBOL(void)` that count further
    launches: Triton calls the driver without the runtime, so the driver's library is searched too.
    """
    counter = _function(symbol)
    others = [_function(name) for name in also]

    def read() -> Counts:
        found = {name: counter(place) for name, place in _PLACES.items()}
        found["launches"] += found.pop("products") + sum(other() for other in others)
        return Counts(**found)

    return read


def by_symbols(symbol: str, also: Iterable[str] = ()) -> Counting:
    """Count with a library: see `reader`."""
    read = reader(symbol, also)

    def counting(act: Callable[[], object]) -> Counts:
        before = vars(read())
        act()
        return Counts(**{name: count - before[name] for name, count in vars(read()).items()})

    return counting


def _function(symbol: str) -> Callable[..., int]:
    for library in (None, "libcuda.so.1"):
        try:
            function = getattr(ctypes.CDLL(library), symbol)
        except (OSError, AttributeError):
            continue
        function.restype = ctypes.c_long
        return function
    raise SystemExit(f"no library in this process exports {symbol}")


def by_profiler(act: Callable[[], object]) -> Counts:
    """Count the calls that begin within `act`, with torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        with torch.profiler.record_function(_SPAN):
            act()
        # Without this wait the trace lacks the last copies. The wait lies outside of the span: not counted.
        torch.cuda.synchronize()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [(e.name(), e.start_ns(), e.end_ns()) for e in profile.profiler.kineto_results.events()]
    found = counts_of(events)
    if not found.launches:
        raise RuntimeError("the profiler saw no launch: CUPTI does not work here")
    return found


def counts_of(events: Iterable[tuple[str, int, int]]) -> Counts:
    """The counts of a trace of (name, start, end); the calls to count lie within the event _SPAN."""
    events = list(events)
    # The trace has the span twice: on the host, and on the device, where it may begin later.
    start = min(start for name, start, _ in events if name == _SPAN)
    end = next(end for name, begin, end in events if name == _SPAN and begin == start)
    calls = Counter(name for name, begin, _ in events if start <= begin <= end)
    # Only a copy's event on the device names the kind of memory. It may begin after the host's span.
    copies = Counter(name for name, begin, _ in events if start <= begin and name.startswith("Memcpy"))

    def total(names: Counter[str], is_one: Callable[[str], object]) -> int:
        return sum(n for name, n in names.items() if is_one(name))

    return Counts(
        launches=total(calls, _LAUNCH.match),
        waits=total(calls, _WAIT.match),
        to_device=total(copies, lambda name: "HtoD" in name),
        pageable=total(copies, lambda name: "HtoD" in name and "Pageable" in name),
        to_host=total(copies, lambda name: "DtoH" in name),
    )


def waits_of(act: Callable[[], object]) -> list[str]:
    """The lines of the repository at which `act` waits for the device, by torch's sync debug mode."""
    found: list[str] = []

    def note(message: Warning | str, *_: Any) -> None:
        if "called a synchronizing" in str(message):
            found.append(innermost_line())

    with warnings.catch_warnings():
        warnings.showwarning = note
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            act()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return found


def innermost_line() -> str:
    """The innermost line of the repository on the stack, without lines of this file."""
    ours = [
        frame
        for frame in traceback.extract_stack()
        if Path(frame.filename).is_relative_to(ROOT)
        and frame.filename != __file__
        and "site-packages" not in frame.filename  # the environment may lie in the repository
    ]
    if not ours:
        return "outside of the repository"
    frame = ours[-1]
    return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} {frame.line}"


def graphs() -> dict[str, int]:
    """How many graphs torch.compile has made in this process, and how many graph breaks it met."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }
