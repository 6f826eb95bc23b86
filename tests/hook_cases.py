"""Made-up arguments for hooks."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from torchtitan_lite.training.config import DebugConfig, TrainingConfig
from torchtitan_lite.training.hooks import HookConfig, Hooks, Outcome, RunInfo, StepStats
from torchtitan_lite.training.hooks.profiler import ProfilingConfig
from torchtitan_lite.training.metrics import MetricsConfig
from torchtitan_lite.training.validation import Validation, ValidationConfig

DONE = Outcome(kind="done")


def job_with(**sections: Any) -> SimpleNamespace:
    """The sections of a job that hooks read, with `sections` in place of the defaults."""
    own = {"metrics": MetricsConfig(), "profiling": ProfilingConfig(), "debug": DebugConfig()}
    own |= {
        "validation": ValidationConfig(enable=True),
        "plan": lambda n_ranks: [f"ranks: {n_ranks}", "plan"],
    }
    own |= {"to_toml": lambda n: f"# ranks: {n}\n\n[job]\nnote = '```'\n"}
    return SimpleNamespace(**{"training": TrainingConfig(mixed_precision_param="float32"), **own, **sections})


def run_info(**changes: Any) -> RunInfo:
    """A run of four steps on one rank, in the current folder."""
    values = {
        "job": job_with(),
        "folder": Path(),
        "rank": 0,
        "world_size": 1,
        "device": torch.device("cpu"),
        "model": torch.nn.Identity(),
        "n_steps": 4,
        "flops_per_token": 3e3,
    }
    return RunInfo(**{**values, **changes})


def stats(step: int, **changes: Any) -> StepStats:
    values = {
        "loss": 2.5,
        "grad_norm": 1.25,
        "lr": 1e-3,
        "n_tokens": 100,
        "n_tokens_seen": 100 * step,
        "seconds": 0.5,
        "data_seconds": 0.05,
        "hook_seconds": 0.0,
        "peak_memory_gib": 0.75,
    }
    return StepStats(step=step, **{**values, **changes})


def validation(step: int, loss: float) -> Validation:
    return Validation(step=step, loss=loss, nats_per_byte=loss / 2, unigram_entropy=3.0)


def started(config: HookConfig, run: RunInfo) -> Hooks:
    """The hook of `config`, started as by a run."""
    hooks = Hooks({"tested": config}, run)
    hooks.start()
    return hooks


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass(frozen=True)
class Ready:
    """A config whose hook exists already."""

    hook: object

    def build(self, run: RunInfo) -> object:
        return self.hook
