"""Moments on a device, by CUDA events where there is a GPU, and the time by phase."""

from itertools import pairwise
from time import perf_counter
from typing import Any

import torch

PHASES = ("data", "forward", "loss", "backward", "clip", "optimizer")


class Clock:
    """Time by phase: what lies between two marks belongs to the phase that the second one names."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """The phase ends here; "" for what belongs to none."""
        self._marks.append((phase, self.tick()))

    def forget(self) -> None:
        """Count from here."""
        self._marks.clear()

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def tick(self) -> Any:
        """A moment: on a GPU, that at which it has done all that it was given so far."""
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
        """Each phase's share of `seconds`, and what is left."""
        found: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        phases, ticks = [phase for phase, _ in self._marks], [tick for _, tick in self._marks]
        for phase, spent in zip(phases[1:], self.between(ticks), strict=False):
            if phase:
                found[phase] += spent
        rest = seconds - sum(found.values())
        return {phase: round(part / seconds, 4) for phase, part in {**found, "rest": rest}.items()}
