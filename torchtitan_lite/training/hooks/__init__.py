"""Hooks: objects that a run calls while it trains, on every rank, one after the other.

A hook has any of the methods `start(run)`, `step(stats)`, `validated(result)`, `saved(step)`, `end(outcome)`.
Its config, a frozen dataclass, makes the hook: `build(run)` returns it, or None on a rank that needs no hook.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Protocol

import torch
from torch import nn

from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.training.validation import Validation

METHODS = ("start", "step", "validated", "saved", "end")
"""The methods of a hook. A hook has at least one of them."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The facts of a run, for its hooks."""

    job: Any
    """The whole configuration, a `config.job.JobConfig`."""
    folder: Path
    """The run's own folder."""
    rank: int
    world_size: int
    device: torch.device
    model: nn.Module
    """The model. Under FSDP or tensor parallel its parameters are this rank's shards."""
    n_steps: int
    """Optimizer steps of the whole run."""
    flops_per_token: float
    """Floating-point operations of a training step, per token."""
    resumed_step: int | None = None
    """The step that the run resumes from, which may be 0; None in a new run."""

    @property
    def first_step(self) -> int:
        """The first step of this start, counted from 1."""
        return (self.resumed_step or 0) + 1


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """The numbers of one optimizer step."""

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
    """Duration of the step, with the hooks that ran since the step before."""
    data_seconds: float
    """The part of `seconds` that was spent waiting for data."""
    hook_seconds: float = 0.0
    """The part of `seconds` that was spent in hooks."""
    peak_memory_gib: float = 0.0
    """The most memory that this rank has held so far."""
    sample_ids: Sequence[int] = ()
    """Global ids of the samples that this rank read."""
    attention_work: float | None = None
    """Visible pairs of query and key that this rank computed, per head; only in a start's first step."""
    votes: Sequence[bool] = ()
    """The votes that the ranks exchanged in this step: each is set if any rank set it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    kind: Literal["done", "stopped", "failed"]
    error: BaseException | None = None
    """The exception that ended the run, if it failed."""


class HookConfig(Protocol):
    """The options of a hook. `build` returns the hook of this rank, or None, and opens no files."""

    def build(self, run: RunInfo) -> object | None: ...


class HookFailed(Exception):
    """A hook raised an exception, which is the `__cause__` of this exception."""

    def __init__(self, name: str, method: str, error: BaseException) -> None:
        super().__init__(f'hook "{name}" failed in {method}(): {type(error).__name__}: {error}')


class Hooks:
    """The hooks of a run, by name. A call raises HookFailed if a hook raises.

    The constructor raises ConfigError if the `build` of a config raises it.
    """

    def __init__(self, configs: Mapping[str, HookConfig], run: RunInfo | None = None) -> None:
        self._run = run
        built = {name: _call(name, config, "build", run) for name, config in configs.items()}
        self._hooks = {name: hook for name, hook in built.items() if hook is not None}
        for name, hook in self._hooks.items():
            if not any(hasattr(hook, method) for method in METHODS):
                raise HookFailed(name, "build", TypeError(f"a hook has any of {', '.join(METHODS)}"))
        self._started: dict[str, object] = {}
        self._seconds = 0.0

    def start(self) -> None:
        """The run begins: everything is built, and no step is done."""
        for name, hook in self._hooks.items():
            _call(name, hook, "start", self._run)
            self._started[name] = hook

    def step(self, stats: StepStats) -> None:
        """A step is done."""
        self._timed("step", stats)

    def validated(self, result: Validation) -> None:
        """A validation is done."""
        self._timed("validated", result)

    def saved(self, step: int) -> None:
        """A step is published in its folder, and all ranks know."""
        self._timed("saved", step)

    def end(self, outcome: Outcome) -> None:
        """The run ends. Every hook that has started is called, even if another one fails.

        Raises the first failure. If the run has failed already, failures of hooks are only logged.
        """
        failures: list[BaseException] = []
        for name, hook in self._started.items():
            try:
                _call(name, hook, "end", outcome)
            except BaseException as error:  # noqa: BLE001 - the other hooks must close their files first
                failures.append(error)
        self._started.clear()
        if failures and outcome.error is None:
            raise failures[0]
        for failure in failures:
            if not isinstance(failure, BrokenPipeError):
                _LOG.error("%s", failure)

    def take_seconds(self) -> float:
        """Seconds spent in hooks since the last call, without `start` and `end`."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _timed(self, method: str, argument: object) -> None:
        began = perf_counter()
        for name, hook in self._hooks.items():
            _call(name, hook, method, argument)
        self._seconds += perf_counter() - began


def _call(name: str, target: object, method: str, argument: object) -> Any:
    """The result of `target.method(argument)`; None if there is no such method. Raises HookFailed."""
    act = getattr(target, method, None)
    if act is None:
        return None
    try:
        return act(argument)
    except BrokenPipeError:  # the program that reads the output, such as `head`, has ended
        raise
    except (Exception, SystemExit) as error:
        # A signal handler of ours raises SystemExit with 128 + the signal's number.
        if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
            raise
        if method == "build" and isinstance(error, ConfigError):  # the user's input is wrong, not the hook
            raise
        raise HookFailed(name, method, error) from error
