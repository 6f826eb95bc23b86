"""What steps ask of a GPU, counted: by torch's profiler, or by functions of a library that counts for us.

A library that is loaded before CUDA's runtime, and passes calls on or does nothing, can count them without
a GPU. Such a library exports `long SYMBOL(int)`, whose argument says of what the count is: `_PLACES` below.
"""

import ctypes
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
# Product is a call of cuBLAS, which such a library does not let come to a launch.
_PLACES = {"launches": 0, "waits": 1, "to_device": 2, "to_host": 3, "products": 5, "pageable": 9}
_SPAN = "the steps that count"
_LAUNCH = re.compile(r"(cudaLaunch(Cooperative)?Kernel|cuLaunch(Cooperative)?Kernel|cudaGraphLaunch)")
_WAIT = re.compile(r"(cuda(Device|Stream|Event)Synchronize|cu(Ctx|Stream|Event)Synchronize|cudaMemcpy)$")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of all steps that were counted."""

    launches: int
    """Kernels, matrix products included."""
    waits: int
    """Calls that return when the device has done something."""
    to_device: int
    """Copies from the host."""
    pageable: int
    """Those of them whose source is not pinned."""
    to_host: int
    """Copies to the host."""

    def per_step(self, n_steps: int) -> dict[str, float]:
        """Each count by step."""
        return {name: round(count / n_steps, 2) for name, count in vars(self).items()}


Counting = Callable[[Callable[[], object]], Counts]
"""Does what it is given, and counts what that asks of the device."""


def by_symbols(symbol: str, also: Iterable[str] = ()) -> Counting:
    """Counts of a library in this process; `also` are functions `long SYMBOL(void)`, all of launches.

    They are looked for in the driver's library too, which Triton calls without the runtime.
    """
    counter = _function(symbol)
    others = [_function(name) for name in also]

    def read() -> dict[str, int]:
        found = {name: counter(place) for name, place in _PLACES.items()}
        found["launches"] += found.pop("products") + sum(other() for other in others)
        return found

    def counting(act: Callable[[], object]) -> Counts:
        before = read()
        act()
        return Counts(**{name: count - before[name] for name, count in read().items()})

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
    """Counts of torch's profiler, of the calls that begin within `act`."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        with torch.profiler.record_function(_SPAN):
            act()
        # So that the last copies are in the trace; this wait and the profiler's own are outside of the span.
        torch.cuda.synchronize()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [(e.name(), e.start_ns(), e.end_ns()) for e in profile.profiler.kineto_results.events()]
    found = counts_of(events)
    if not found.launches:
        raise RuntimeError("the profiler saw no launch: CUPTI does not work here")
    return found


def counts_of(events: Iterable[tuple[str, int, int]]) -> Counts:
    """The counts of a trace, (name, start, end) each, of which one is the span."""
    events = list(events)
    # The span is in the trace twice: as the host's, and as the device's, which may begin later.
    start = min(start for name, start, _ in events if name == _SPAN)
    end = next(end for name, begin, end in events if name == _SPAN and begin == start)
    calls = Counter(name for name, begin, _ in events if start <= begin <= end)
    # Of copies only the device's part says from what memory: it may follow after the host's span.
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
    """The lines of the repository at which `act` waits for the device, as torch sees it."""
    found: list[str] = []

    def note(message: Warning | str, *_: Any) -> None:
        if "called a synchronizing" in str(message):
            found.append(_where())

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


def _where() -> str:
    """The innermost line of the repository that is being run, apart from this file's."""
    ours = [
        frame
        for frame in traceback.extract_stack()
        if Path(frame.filename).is_relative_to(ROOT) and frame.filename != __file__
    ]
    frame = ours[-1]
    return f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} {frame.line}"


def graphs() -> dict[str, int]:
    """How many graphs torch.compile has made in this process, and at how many places it broke one off."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
    }
