"""The identity of a run, which its checkpoints store, and the check that a run may use a checkpoint."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan_lite.checkpoint.identity import check_same, shown
from torchtitan_lite.checkpoint.restore import (
    VerifiedStep,
    find_initial,
    find_step,
    load,
)
from torchtitan_lite.checkpoint.save import probe
from torchtitan_lite.checkpoint.state import State, changed, fingerprint, flat
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.checkpoint.tensors import Piece
from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.config.problem import printable
from torchtitan_lite.data import Shards, Tokenizer
from torchtitan_lite.launch.world import World
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.parallel.fsdp import own_shard
from torchtitan_lite.training import hub

INITIAL = "checkpoint.initial_load_path"
_ORDER = ("data.fingerprint", "debug.seed", "training.seq_len")
"""The keys of a run's identity whose values decide the order of the samples."""
_NOT_NOTED = ("job.", "checkpoint.", "metrics.", "debug.log_sample_ids")
"""The prefixes of settings whose changes are not reported when a run resumes."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """The source of a run's weights. At most one field is set. If none is set, the run draws its weights."""

    resumed: VerifiedStep | None = None
    """The checkpoint of this run to resume from."""
    initial: VerifiedStep | Path | None = None
    """The weights of a new run: a checkpoint, or the folder of a Hugging Face model."""

    @property
    def step(self) -> int:
        """The number of steps that the run has done already."""
        return self.resumed.state.step if self.resumed else 0

    @property
    def is_model_only(self) -> bool:
        """True if the step to resume from holds the model alone: then the run is over."""
        return self.resumed is not None and self.resumed.state.model_only


def find_start(job: JobConfig, folder: Path, world: World) -> Start:
    """Find and verify the source of the weights of the run in `folder`: a checkpoint, a model, or none.

    Raises ConfigError on all ranks if the source cannot be used, or if the run could not save a checkpoint.
    """
    checkpoint = job.checkpoint
    if checkpoint.enable:
        steps = Steps(folder / checkpoint.folder)
        world.patiently(lambda saving: probe(steps, saving))
        if found := world.patiently(lambda saving: find_step(steps, checkpoint.load_step, saving)):
            return Start(resumed=found)
    if checkpoint.initial_load_in_hf:
        path = Path(os.path.expanduser(checkpoint.initial_load_path)).absolute()
        world.patiently(lambda saving: hub.check(path, job.decoder, saving, INITIAL))
        return Start(initial=path)
    if checkpoint.initial_load_path:
        initial = checkpoint.initial_load_path
        return Start(initial=world.patiently(lambda saving: find_initial(initial, saving)))
    return Start()


class Record:
    """The identity and the settings of a run, which its checkpoints store."""

    def __init__(self, job: JobConfig, world: World, shards: Shards, tokenizer: Tokenizer) -> None:
        self.job, self.degrees = job, job.parallelism.degrees(world.size)
        self.n_ranks = world.size
        training = job.training
        self.identity: dict[str, Any] = _as_json(
            {
                "model": hub.record_of(job.decoder),
                "data.fingerprint": shards.folder.name,
                "data.tokenizer_fingerprint": tokenizer.fingerprint,
                "debug.seed": job.debug.seed,
                "training.seq_len": training.seq_len,
                "training.global_batch_size": training.samples_per_step(self.degrees.data),
            }
        )
        """The `State.identity` of the checkpoints: model, tokenizer, data, seed and batch."""
        self.config: dict[str, Any] = _as_json(asdict(job))
        schedule, steps = job.lr_scheduler, training.steps
        resolved = {"total_steps": schedule.total(steps), "warmup_steps": schedule.warmup(steps)}
        self.schedule: dict[str, Any] = {**asdict(schedule), **resolved}

    def check(self, found: VerifiedStep) -> list[str]:
        """Return lines to print about the resume from `found`. Raise ConfigError if the run cannot resume."""
        state = found.state
        allow = self.job.checkpoint.allow_changes
        if state.model_only and state.step < self.job.training.steps:
            rule = f"leads to step {state.step}, which holds the model alone and was to be the last"
            remedy = "name an earlier step, or start another run with checkpoint.initial_load_path"
            raise ConfigError([Problem("checkpoint.load_step", self.job.checkpoint.load_step, rule, remedy)])
        saved_by = flat(state.config).get("optimizer.name", self.job.optimizer.name)
        if saved_by != self.job.optimizer.name and not state.model_only:
            rule = (
                f'was "{saved_by}" when step {state.step} was saved, and no other optimizer can use its state'
            )
            remedy = "set it back, or start another run with checkpoint.initial_load_path"
            raise ConfigError([Problem("optimizer.name", self.job.optimizer.name, rule, remedy)])
        others = check_same(state, self.identity, self.config, allow_changes=allow)
        settings = changed(state.config, self.config, but=_NOT_NOTED)
        settings |= changed(_resolved(state.schedule), _resolved(self.schedule))
        noted = sorted(settings.items())
        n_ranks = flat(found.manifest.made).get("mesh.ranks")
        where = ""
        if n_ranks != self.n_ranks:
            where = f", which {n_ranks} {'rank' if n_ranks == 1 else 'ranks'} saved"
        if self.job.checkpoint.load_step >= 0:
            where += ", as checkpoint.load_step says: without it, from the newest"
        lines = [
            f"goes on from step {state.step} in {found.folder}{where}",
            *(f"changed since then: {key} = {shown(now)}, was {shown(then)}" for key, (then, now) in noted),
            *(f"allowed: {problem}" for problem in others),
        ]
        is_over = state.step >= self.job.training.steps
        if is_over and self.job.checkpoint.last_save_model_only and not state.model_only:
            lines.append(f"step {state.step} was saved in full and stays so: it is not the model alone")
        return [printable(line) for line in lines]

    def check_initial(self, found: VerifiedStep | Path) -> list[str]:
        """Return lines to print about a new run's weights. Raise ConfigError if they do not fit the run."""
        if isinstance(found, Path):
            return [printable(f"starts with the weights of {found}"), *self._check_tokenizer_of(found)]
        identity = found.state.identity
        # A model that was imported without a tokenizer has no tokenizer fingerprint.
        keys = ["model", *({"data.tokenizer_fingerprint"} & identity.keys())]
        allow = self.job.checkpoint.allow_changes
        beside = (folder / hub.TOKENIZER for folder in found.folder.parents[:2])
        tokenizer = next((place for place in beside if place.exists()), None)
        others = check_same(
            found.state, self.identity, self.config, allow_changes=allow, keys=keys, tokenizer=tokenizer
        )
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
        """Return True if this run reads the samples in the same order as the run that saved `state`."""
        return all(state.identity.get(key) == self.identity[key] for key in _ORDER)

    @property
    def made(self) -> dict[str, Any]:
        """The facts about this run for `Manifest.made`: torch version, mesh and fingerprints."""
        fingerprints = {
            "config": fingerprint(self.config),
            "model": fingerprint(self.identity["model"]),
            "tokenizer": self.identity["data.tokenizer_fingerprint"],
            "data": self.identity["data.fingerprint"],
        }
        mesh = {"ranks": self.n_ranks, **asdict(self.degrees)}
        return {"torch": torch.__version__, "mesh": mesh, "fingerprints": fingerprints}


def pieces(
    parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Piece]:
    """Return this rank's shards of the weights and, if `optimizer` is given, of its state, by stored name."""
    found = {f"model.{name}": _piece(weight) for name, weight in parameters.items()}
    if optimizer is not None:
        for name, weight in parameters.items():
            for key, value in optimizer.state[weight].items():
                assert isinstance(value, Tensor), f"{key} of the optimizer's state is no tensor"
                found[f"optimizer.{name}.{key}"] = _piece(value)
    return found


def _resolved(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """Return the total steps and the warm-up steps of a stored schedule, by the keys that set them."""
    return {f"lr_scheduler.{key}": schedule.get(key) for key in ("total_steps", "warmup_steps")}


def load_initial(
    found: VerifiedStep | Path, config: DecoderConfig, parameters: Mapping[str, Tensor], world: World
) -> None:
    """Load this rank's shards of a new run's weights from `found`. Raises ConfigError if they are damaged."""
    if isinstance(found, Path):
        own = {name: _piece(weight) for name, weight in parameters.items()}
        hub.load_weights(found, config, own, world, INITIAL)
    else:
        load(found, pieces(parameters), world, INITIAL)


def _piece(x: Tensor) -> Piece:
    """Return this rank's shard of a tensor, with the whole tensor's shape and the shard's place in it."""
    local, box = own_shard(x)
    return Piece(local=local, shape=x.shape, offsets=torch.Size(start for start, _ in box))


def _as_json(value: Any) -> Any:
    """Return `value` as it is after a round trip through JSON, to compare it with stored values."""
    return json.loads(json.dumps(value))
