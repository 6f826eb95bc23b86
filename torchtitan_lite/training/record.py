"""What a checkpoint says of a run beside its tensors, and what a run may go on from or start with."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan_lite.checkpoint.randomness import random_state
from torchtitan_lite.checkpoint.restore import Found, check_same, check_same_run, find, find_initial, load
from torchtitan_lite.checkpoint.save import Snapshot, probe
from torchtitan_lite.checkpoint.state import State, changed, fingerprint, flat
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.checkpoint.tensors import Piece
from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.config.problem import printable
from torchtitan_lite.data import Shards, Tokenizer
from torchtitan_lite.launch.background import patiently
from torchtitan_lite.launch.world import World
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.parallel.fsdp import local_shard, shard_box
from torchtitan_lite.training import hub

INITIAL = "checkpoint.initial_load_path"
_ORDER = ("data.fingerprint", "debug.seed", "training.seq_len")
"""What the order of the samples depends on, among what makes a run what it is."""
_MEANING = ("model.", "data.tokenizer_fingerprint")
"""What weights depend on for what they mean."""
_NOT_NOTED = ("job.", "checkpoint.", "metrics.", "debug.log_sample_ids")


def find_start(
    job: JobConfig, folder: Path, world: World, alive: Callable[[], None]
) -> tuple[Found | None, Found | Path | None]:
    """The verified step that the run in `folder` goes on from, or the one whose weights it starts with.

    Instead of the latter, the folder of a Hugging Face model.

    Raises ConfigError, on all ranks alike, where there is none that is good, or where none could be saved.
    """
    checkpoint, ranks = job.checkpoint, world.saving
    if checkpoint.enable:
        steps = Steps(folder / checkpoint.folder)
        patiently(lambda: probe(steps, ranks), alive)
        if found := patiently(lambda: find(steps, checkpoint.load_step, ranks), alive):
            return found, None
    if checkpoint.initial_load_in_hf:
        path = Path(os.path.expanduser(checkpoint.initial_load_path)).absolute()
        patiently(lambda: hub.check(path, job.decoder, ranks, INITIAL), alive)
        return None, path
    if checkpoint.initial_load_path:
        return None, patiently(lambda: find_initial(checkpoint.initial_load_path, ranks), alive)
    return None, None


class Record:
    """What a run is, for its checkpoints."""

    def __init__(self, job: JobConfig, world: World, shards: Shards, tokenizer: Tokenizer) -> None:
        self.job, self.degrees = job, job.parallelism.degrees(world.size)
        self.n_ranks = world.size
        training = job.training
        accumulation = training.accumulation(self.degrees.data)
        self.identity: dict[str, Any] = _as_json(
            {
                **hub.identity_of(job.decoder),
                "data.fingerprint": shards.folder.name,
                "data.tokenizer_fingerprint": tokenizer.fingerprint,
                "debug.seed": job.debug.seed,
                "training.seq_len": training.seq_len,
                "training.global_batch_size": training.local_batch_size * accumulation * self.degrees.data,
            }
        )
        """What must stay for a run to be the same one."""
        self.config: dict[str, Any] = _as_json(asdict(job))
        schedule, steps = job.lr_scheduler, training.steps
        resolved = {"total_steps": schedule.total(steps), "warmup_steps": schedule.warmup(steps)}
        self.schedule: dict[str, Any] = {**asdict(schedule), **resolved}

    def check(self, found: Found) -> list[str]:
        """What there is to say of going on from a step. Raises ConfigError where it is another run's."""
        state = found.state
        allow = self.job.checkpoint.allow_changes
        if state.model_only and state.step < self.job.training.steps:
            rule = f"leads to step {state.step}, which holds the model alone and was to be the last"
            remedy = "name an earlier step, or start another run with checkpoint.initial_load_path"
            raise ConfigError([Problem("checkpoint.load_step", self.job.checkpoint.load_step, rule, remedy)])
        saved_by = state.config.get("optimizer", {}).get("name", self.job.optimizer.name)
        if saved_by != self.job.optimizer.name and not state.model_only:
            rule = (
                f'was "{saved_by}" when step {state.step} was saved, and no other optimizer can use its state'
            )
            remedy = "set it back, or start another run with checkpoint.initial_load_path"
            raise ConfigError([Problem("optimizer.name", self.job.optimizer.name, rule, remedy)])
        others = check_same_run(state, self.identity, self.config, allow_changes=allow)
        noted = changed(state.config, self.config, but=_NOT_NOTED)
        noted |= changed(_resolved(state.schedule), _resolved(self.schedule))
        n_ranks = flat(found.manifest.made).get("mesh.ranks")
        where = (
            ""
            if n_ranks == self.n_ranks
            else f", which {n_ranks} {'rank' if n_ranks == 1 else 'ranks'} saved"
        )
        if self.job.checkpoint.load_step >= 0:
            where += ", as checkpoint.load_step says: without it, from the newest"
        lines = [
            f"goes on from step {state.step} in {found.folder}{where}",
            *(f"changed since then: {key} = {now}, was {then}" for key, (then, now) in sorted(noted.items())),
            *(f"allowed: {problem}" for problem in others),
        ]
        is_over = state.step >= self.job.training.steps
        if is_over and self.job.checkpoint.last_save_model_only and not state.model_only:
            lines.append(f"step {state.step} was saved in full and stays so: it is not the model alone")
        return [printable(line) for line in lines]

    def check_initial(self, found: Found | Path) -> list[str]:
        """What there is to say of starting with those weights; raises ConfigError like `check`."""
        if isinstance(found, Path):
            return [printable(f"starts with the weights of {found}"), *self._check_tokenizer_of(found)]
        keys = [key for key in {**found.state.identity, **self.identity} if key.startswith(_MEANING)]
        saved, own = (
            {key: x[key] for key in keys if key in x} for x in (found.state.identity, self.identity)
        )
        if "data.tokenizer_fingerprint" not in saved:  # imported without one
            own.pop("data.tokenizer_fingerprint", None)
        others = check_same(saved, own, found.state.step, allow_changes=self.job.checkpoint.allow_changes)
        return [
            f"starts with the weights of {found.folder}",
            *(f"allowed: {problem}" for problem in others),
        ]

    def _check_tokenizer_of(self, model: Path) -> list[str]:
        theirs, own = hub.tokenizer_fingerprint(model), self.identity["data.tokenizer_fingerprint"]
        if theirs is None or theirs == own:
            return []
        rule, remedy = f"is not the tokenizer of {model}", f"use {model}, or --checkpoint.allow-changes"
        problem = Problem("data.tokenizer", self.job.data.tokenizer, rule, remedy)
        if not self.job.checkpoint.allow_changes:
            raise ConfigError([problem])
        return [printable(f"allowed: {problem}")]

    def has_order_of(self, state: State) -> bool:
        """Whether the samples come in the order that they came in when `state` was saved."""
        return all(state.identity.get(key) == self.identity[key] for key in _ORDER)

    def snapshot(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        step: int,
        n_tokens_seen: int,
        consumed_samples: int,
        validated: int,
        is_done: bool,
    ) -> Snapshot:
        """What is saved of a step; once the run `is_done`, the model alone where that is configured."""
        config = self.job.checkpoint
        model_only = config.last_save_model_only and is_done
        if model_only:
            dtype = getattr(torch, config.export_dtype)
            found = {
                name: replace(piece, local=piece.local.cpu().to(dtype))
                for name, piece in pieces(parameters).items()
            }
        else:
            # Before the first step there is no state, and only the optimizer knows how its own begins.
            found = pieces(parameters, optimizer if optimizer.state else None)
        state = State(
            step=step,
            n_tokens_seen=n_tokens_seen,
            consumed_samples=consumed_samples,
            validated=validated,
            model_only=model_only,
            identity=self.identity,
            schedule=self.schedule,
            config=self.config,
        )
        return Snapshot(step=step, pieces=found, state=state, random=random_state(), made=self._made())

    def _made(self) -> dict[str, Any]:
        model = {key: value for key, value in self.identity.items() if key.startswith("model.")}
        return {
            "torch": torch.__version__,
            "mesh": {"ranks": self.n_ranks, **asdict(self.degrees)},
            "fingerprints": {
                "config": fingerprint(self.config),
                "model": fingerprint(model),
                "tokenizer": self.identity["data.tokenizer_fingerprint"],
                "data": self.identity["data.fingerprint"],
            },
        }


def pieces(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Piece]:
    """This rank's shards of the weights, and of the optimizer's state where one is given."""
    found = {f"model.{name}": _piece(weight) for name, weight in parameters.items()}
    if optimizer is not None:
        for name, weight in parameters.items():
            for key, value in optimizer.state[weight].items():
                assert isinstance(value, Tensor), f"{key} of the optimizer's state is no tensor"
                found[f"optimizer.{name}.{key}"] = _piece(value)
    return found


def _resolved(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """What the schedule's settings have come to."""
    return {f"schedule.{key}": schedule.get(key) for key in ("total_steps", "warmup_steps")}


def load_initial(
    found: Found | Path, config: DecoderConfig, parameters: Mapping[str, Tensor], ranks: World
) -> None:
    """Read the weights that a new run starts with, each rank its own shards; raises ConfigError."""
    if isinstance(found, Path):
        own = {name: _piece(weight) for name, weight in parameters.items()}
        hub.load_weights(found, config, own, ranks, INITIAL)
    else:
        load(found, pieces(parameters), ranks, INITIAL)


def _piece(x: Tensor) -> Piece:
    """This rank's shard of a tensor, as a part of the whole one."""
    offsets = torch.Size(start for start, _ in shard_box(x))
    return Piece(local=local_shard(x), shape=x.shape, offsets=offsets)


def _as_json(value: Any) -> Any:
    """`value` as it is when it has been written and read again."""
    return json.loads(json.dumps(value))
