"""Hooks: objects that a run calls while it trains. Each rank calls its hooks one after the other.

A hook has at least one of the methods `start(run)`, `step(stats)`, `validated(result)`, `saved(step)` and
`end(outcome)`. The config of a hook is a frozen dataclass. Its method `build(run)` returns the hook, or None
on a rank that needs no hook.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.training.validation import Validation

if TYPE_CHECKING:
    from torchtitan_lite.training.metrics import Meter

METHODS = ("start", "step", "validated", "saved", "end")
"""The names of the methods that a hook may have. A hook has at least one of them."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The facts about a run that its hooks may need."""

    job: Any
    """The whole configuration, a `config.job.JobConfig`."""
    folder: Path
    """The folder that the run writes its files to."""
    rank: int
    world_size: int
    device: torch.device
    model: nn.Module
    """The model. Under FSDP or tensor parallel its parameters are this rank's shards."""
    n_steps: int
    """The number of optimizer steps of the whole run."""
    flops_per_token: float
    """The floating-point operations of a training step (forward and backward), per token."""
    resumed_step: int | None = None
    """The step that the run resumes from, which may be 0; None in a new run."""

    @property
    def first_step(self) -> int:
        """The number of the first step that this process takes. The first step of a new run has number 1."""
        return (self.resumed_step or 0) + 1

    @cached_property
    def meter(self) -> "Meter":
        """The numbers of the run's reports, which all hooks share."""
        from torchtitan_lite.training.metrics import Meter  # not above: that module imports this one

        return Meter(self)


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """The measurements of one optimizer step."""

    step: int
    """The number of optimizer steps done in the whole run, including this step."""
    loss: float
    """The mean loss over the step's tokens that have a label, in nats per token."""
    grad_norm: float
    """The global norm of the gradients before clipping."""
    lr: float
    n_tokens: int
    """The number of tokens of the step, over all ranks and micro-batches."""
    n_tokens_seen: int
    """The number of tokens of the whole run so far."""
    seconds: float
    """The duration of the step, plus the time of the hooks that ran since the previous step."""
    data_seconds: float
    """The part of `seconds` that this rank waited for data."""
    hook_seconds: float = 0.0
    """The part of `seconds` that was spent in hooks."""
    peak_memory_gib: float = 0.0
    """The most memory that this rank has held so far, in GiB."""
    sample_ids: Sequence[int] = ()
    """The global ids of the samples that this rank read in the step."""
    attention_work: float | None = None
    """The visible (query, key) pairs that this rank computed, per head; None after a process's first step."""
    votes: Sequence[bool] = ()
    """The votes of all ranks in this step, combined. A vote is set if any rank set it."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The way in which a run ended: "done" after all steps, "stopped" early on request, or "failed"."""

    kind: Literal["done", "stopped", "failed"]
    error: BaseException | None = None
    """The exception that ended the run. None unless the run failed."""


class HookConfig(Protocol):
    """The options of a hook. `build` returns this rank's hook or None, and must not open files."""

    def build(self, run: RunInfo) -> object | None: ...


class HookFailed(Exception):
    """The error for a hook that raised an exception. That exception is the `__cause__` of this error."""

    def __init__(self, name: str, method: str, error: BaseException) -> None:
        super().__init__(f'hook "{name}" failed in {method}(): {type(error).__name__}: {error}')


class Hooks:
    """The hooks of a run, by name. A method calls every hook, and raises HookFailed if a hook raises.

    The constructor calls `build` of every config, and passes on a ConfigError that `build` raises.
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
        """Call `start` of every hook. Everything is built by now, and no step is done."""
        for name, hook in self._hooks.items():
            _call(name, hook, "start", self._run)
            self._started[name] = hook

    def step(self, stats: StepStats) -> None:
        """Call `step` of every hook, after an optimizer step."""
        self._timed("step", stats)

    def validated(self, result: Validation) -> None:
        """Call `validated` of every hook, after a validation."""
        self._timed("validated", result)

    def saved(self, step: int) -> None:
        """Call `saved` of every hook, when all ranks know that the checkpoint of `step` is complete."""
        self._timed("saved", step)

    def end(self, outcome: Outcome) -> None:
        """Call `end` of every hook that has started, even if another hook fails.

        Raises the first failure. If the run itself has failed, the failures of hooks are only logged.
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
            _LOG.error("%s", failure)

    def take_seconds(self) -> float:
        """Return the seconds spent in hooks since the previous call. `start` and `end` do not count."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _timed(self, method: str, argument: object) -> None:
        began = perf_counter()
        for name, hook in self._hooks.items():
            _call(name, hook, method, argument)
        self._seconds += perf_counter() - began


def _call(name: str, target: object, method: str, argument: object) -> Any:
    """Return `target.method(argument)`, or None if `target` has no such method. Raises HookFailed."""
    act = getattr(target, method, None)
    if act is None:
        return None
    try:
        return act(argument)
    except (Exception, SystemExit) as error:
        # Our signal handlers raise SystemExit with 128 + the signal's number. The hook did not fail.
        if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
            raise
        if method == "build" and isinstance(error, ConfigError):  # the user's input is wrong, not the hook
            raise
        raise HookFailed(name, method, error) from error
