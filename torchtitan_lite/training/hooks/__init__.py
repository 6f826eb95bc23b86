"""Hooks: objects that a run calls as it goes, on every rank and in their order.

A hook has any of the methods `start(run)`, `step(stats)`, `validated(result)`, `saved(step)`, `end(outcome)`.
A frozen dataclass makes it: `build(run)` returns the hook, or None on a rank that has no use for one.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Protocol, Self

import torch
from torch import nn

from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.training.validation import Validation

METHODS = ("start", "step", "validated", "saved", "end")
"""What a hook may have."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """What a hook may know of the run."""

    job: Any
    """The whole configuration, a `config.job.JobConfig`."""
    folder: Path
    """The run's own folder."""
    rank: int
    world_size: int
    device: torch.device
    model: nn.Module
    """The model that is trained. Under FSDP or tensor parallel its parameters are this rank's shards."""
    n_steps: int
    """Optimizer steps of the whole run."""
    flops_per_token: float
    """Floating-point operations of a training step per token."""
    resumed_step: int | None = None
    """The step that the run goes on from, which may be 0; None in a new run."""

    @property
    def first_step(self) -> int:
        """The step that comes first in this start, counted from 1."""
        return (self.resumed_step or 0) + 1


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What one optimizer step was like."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Mean over the step's valid tokens, in nats per token."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    n_tokens: int
    """Tokens of all ranks and micro-batches."""
    n_tokens_seen: int
    """Tokens of the whole run so far."""
    seconds: float
    """Of the step, with the hooks that ran since the step before."""
    data_seconds: float
    """The part of `seconds` that went into waiting for data."""
    hook_seconds: float = 0.0
    """The part of `seconds` that went into hooks."""
    peak_memory_gib: float = 0.0
    """The most memory that this rank has held so far."""
    sample_ids: Sequence[int] = ()
    """Global ids of the samples that this rank had."""
    attention_work: float | None = None
    """Visible pairs of query and key that this rank computed, per head; measured in a start's first step."""
    flags: Sequence[bool] = ()
    """What the ranks asked each other in the step's one sum: set if any rank set it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    kind: Literal["done", "stopped", "failed"]
    error: BaseException | None = None
    """What ended a run that has failed."""


class HookConfig(Protocol):
    """What makes a hook."""

    def build(self, run: RunInfo) -> object | None:
        """The hook for this rank; None: no hook here. Files are opened in `start`, not yet here."""
        ...


class HookFailed(Exception):
    """A hook raised an exception, which is the cause of this one."""

    def __init__(self, name: str, method: str, error: BaseException) -> None:
        super().__init__(f'hook "{name}" failed in {method}(): {type(error).__name__}: {error}')


class Hooks:
    """The hooks of a run, by name. If a method of a hook raises, the call raises HookFailed."""

    def __init__(self, hooks: Sequence[tuple[str, object]] = (), run: RunInfo | None = None) -> None:
        self._hooks, self._run = hooks, run
        self._started: list[tuple[str, object]] = []
        self._seconds = 0.0

    @classmethod
    def build(cls, configs: Sequence[tuple[str, HookConfig]], run: RunInfo) -> Self:
        """Have each config make its hook. Raises ConfigError where a config does, else HookFailed."""
        built = [(name, _call(name, config, "build", run)) for name, config in configs]
        for name, hook in built:
            if hook is not None and not any(hasattr(hook, method) for method in METHODS):
                raise HookFailed(name, "build", TypeError(f"a hook has any of {', '.join(METHODS)}"))
        return cls([(name, hook) for name, hook in built if hook is not None], run)

    def start(self) -> None:
        """The run begins: everything is built, and no step is done."""
        for name, hook in self._hooks:
            _call(name, hook, "start", self._run)
            self._started.append((name, hook))

    def step(self, stats: StepStats) -> None:
        """A step is done."""
        self._timed("step", stats)

    def validated(self, result: Validation) -> None:
        """A validation is done."""
        self._timed("validated", result)

    def saved(self, step: int) -> None:
        """A step is published in its folder; all ranks know of it."""
        self._timed("saved", step)

    def end(self, outcome: Outcome) -> None:
        """The run ends, however: every hook that has started hears of it, even if others fail.

        Raises the first failure, unless the run has failed already: failures of hooks are logged then.
        """
        failures: list[BaseException] = []
        while self._started:
            name, hook = self._started.pop(0)
            try:
                _call(name, hook, "end", outcome)
            except BaseException as error:  # noqa: BLE001 - the other hooks close their files first
                failures.append(error)
        if failures and outcome.error is None:
            raise failures[0]
        for failure in failures:
            if not isinstance(failure, BrokenPipeError):
                _LOG.error("%s", failure)

    def take_seconds(self) -> float:
        """Seconds spent in hooks since the last call; starting and ending do not count."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _timed(self, method: str, argument: object) -> None:
        began = perf_counter()
        for name, hook in self._hooks:
            _call(name, hook, method, argument)
        self._seconds += perf_counter() - began


def _call(name: str, target: object, method: str, argument: object) -> Any:
    """The result of a method of `target` if it has the method. Raises HookFailed."""
    act = getattr(target, method, None)
    if act is None:
        return None
    try:
        return act(argument)
    except BrokenPipeError:  # whoever reads the output, such as `head`, has had enough
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:  # a signal's
            raise
        if method == "build" and isinstance(error, ConfigError):  # wrong input, answered as everywhere
            raise
        raise HookFailed(name, method, error) from error
