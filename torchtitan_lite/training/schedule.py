"""The learning-rate schedule: warm-up, plateau, decay."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from torchtitan_lite.config.load import Problem
from torchtitan_lite.config.problem import Remedy

_LONGEST_DEFAULT_WARMUP = 200


@dataclass(frozen=True, kw_only=True)
class LRSchedulerConfig:
    """The learning-rate schedule: a linear warm-up, a plateau, and a decay."""

    warmup_steps: Annotated[int, Field(ge=0), Remedy("use 0 for none")] | None = None
    """Steps of linear rise to the peak rate. Unset: a tenth of total_steps, at most 200."""
    total_steps: Annotated[int, Field(ge=1), Remedy("leave it out for training.steps")] | None = None
    """Steps of the schedule. Unset: training.steps. If larger, the run ends before the schedule ends."""
    decay_ratio: Annotated[float, Field(ge=0, le=1, examples=[0.1])] | None = None
    """Share of total_steps, at the end, in which the rate decays. Unset: all steps after the warm-up."""
    decay_type: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of the decay curve."""
    min_lr_factor: Annotated[float, Field(ge=0, le=1, examples=[0.1])] = 0.0
    """The decay ends at this share of the peak rate."""

    def problems(self, key: str, training_steps: int) -> list[Problem]:
        """Return problems if the schedule does not fit a run of `training_steps` steps."""
        found = []
        total = self.total(training_steps)
        if total < training_steps:
            rule = f"is less than training.steps = {training_steps}, and the rest would train at the floor"
            remedy = f"use {training_steps} or more, or leave it out"
            found.append(Problem(f"{key}.total_steps", total, rule, remedy, ("training.steps",)))
        if self.warmup_steps is not None and self.warmup_steps > total:
            rule = f"is longer than the schedule of {total} steps"
            remedy = f"use {total} or less, or leave it out"
            reads = (f"{key}.total_steps", "training.steps")
            found.append(Problem(f"{key}.warmup_steps", self.warmup_steps, rule, remedy, reads))
        return found

    def total(self, training_steps: int) -> int:
        """Return the number of steps that the schedule spans in a run of `training_steps` steps."""
        return training_steps if self.total_steps is None else self.total_steps

    def warmup(self, training_steps: int) -> int:
        """Return the number of warm-up steps in a run of `training_steps` steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(_LONGEST_DEFAULT_WARMUP, self.total(training_steps) // 10)


def lr_factor(step: int, config: LRSchedulerConfig, training_steps: int) -> float:
    """Return the learning rate at the 0-based `step`, as a share of the peak.

    This is a pure function of its arguments. No step of the schedule has a learning rate of 0: the first step
    has 1 / (warm-up steps), and the last step of the decay is one step above the floor. After the schedule
    the rate stays at the floor. The formula is the one in torchtitan's lr_scheduler.py.
    """
    total, warmup = config.total(training_steps), config.warmup(training_steps)
    if step < warmup:
        return (step + 1) / warmup
    decay = total - warmup
    if config.decay_ratio is not None:
        decay = min(decay, round(total * config.decay_ratio))
    done = step - (total - decay)
    if done < 0 or decay == 0:
        return 1.0
    progress = min(1.0, done / decay)
    left = {
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "sqrt": 1 - math.sqrt(progress),
    }[config.decay_type]
    return config.min_lr_factor + (1 - config.min_lr_factor) * left
