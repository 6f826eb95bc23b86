"""Measures time on a device (by CUDA events on a GPU), and the time of each phase of a step."""

from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

PHASES = ("data", "forward", "loss", "backward", "clip", "optimizer")


class Clock:
    """Time by phase: the time between two marks belongs to the phase that the second mark names."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """End a phase here; "" ends an interval that belongs to no phase."""
        self._marks.append((phase, self.tick()))

    def forget(self) -> None:
        """Drop all marks."""
        self._marks.clear()

    def wait(self) -> None:
        """Wait until the device has finished all its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def tick(self) -> Any:
        """A moment. On a GPU: when the device has finished all the work that it has been given so far."""
        if self.device.type == "cpu":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, ticks: list[Any]) -> list[float]:
        """Seconds from each moment to the next."""
        if self.device.type == "cpu":
            return [after - before for before, after in pairwise(ticks)]
        self.wait()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(ticks)]

    def shares(self, seconds: float) -> dict[str, float]:
        """Each phase's share of `seconds`, and the rest."""
        found: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        phases, ticks = [phase for phase, _ in self._marks], [tick for _, tick in self._marks]
        for phase, spent in zip(phases[1:], self.between(ticks), strict=False):
            if phase:
                found[phase] += spent
        rest = seconds - sum(found.values())
        return {phase: round(part / seconds, 4) for phase, part in {**found, "rest": rest}.items()}
