"""A run as one value: the sections that the other modules own, and what must hold between them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from torchtitan_lite import registry
from torchtitan_lite.attention import Flex, Sdpa, refusals
from torchtitan_lite.checkpoint import CheckpointConfig
from torchtitan_lite.config.division import Division
from torchtitan_lite.config.load import (
    Afresh,
    ConfigError,
    Loaded,
    Problem,
    load,
    of_sound_values,
    overlay,
    to_toml,
)
from torchtitan_lite.data.datasets import DataConfig, PythonStdlib
from torchtitan_lite.data.tokenizer import load_tokenizer
from torchtitan_lite.launch.world import CommConfig
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.models.huggingface import export_problems
from torchtitan_lite.models.registry import FOLDER, AnyAttention, meant_kind, read, resolve, split_flavor
from torchtitan_lite.parallel.apply import CompileConfig, model_problems, plan
from torchtitan_lite.parallel.mesh import ParallelismConfig
from torchtitan_lite.parallel.recompute import ActivationCheckpointConfig
from torchtitan_lite.training.config import TrainingConfig
from torchtitan_lite.training.hooks import own as own_hooks  # noqa: F401 (registers our hooks)
from torchtitan_lite.training.hooks.profiler import ProfilingConfig
from torchtitan_lite.training.metrics import MetricsConfig
from torchtitan_lite.training.optimizer import AdamW, OptimizerConfig
from torchtitan_lite.training.outputs import is_inside
from torchtitan_lite.training.process import DebugConfig
from torchtitan_lite.training.schedule import LRSchedulerConfig
from torchtitan_lite.training.validation import ValidationConfig

_EMPTY = {"path": "", "field": "text"}
"""What earlier versions wrote out for a dataset without such options."""
_OVERRIDES = "model.overrides."
_REFUSED_KEYS = {
    "device": "job.device",
    "dtype": "training.mixed_precision_param",
    "deterministic": "debug.deterministic",
    **{
        field.name: _OVERRIDES + field.name
        for field in fields(DecoderConfig)
        if field.name in signature(refusals).parameters
    },
}
"""The keys that set what an attention backend was checked against, where they are not its own."""


@dataclass(frozen=True, kw_only=True)
class JobSection:
    """What the run is called, where it writes, and on which device it runs."""

    dump_folder: str = ""
    """The run's own folder, used as given. Empty: outputs/<name>-<flavor>-<time>."""
    description: str = ""
    """What the run is for, in your own words; kept with its files."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu."""
    plugins: tuple[str, ...] = ()
    """Modules to import before other keys are read, such as my_package.module: they add model families,
    attention backends, datasets, tokenizers, optimizers and hooks."""

    def problems(self, key: str) -> list[Problem]:
        """An output folder that cannot be made or written to."""
        try:
            folder = Path(self.dump_folder or "outputs").expanduser().absolute()
            nearest = next(place for place in (folder, *folder.parents) if place.exists())
        except (OSError, RuntimeError) as error:  # a name too long; ~ of a user who is not known
            rule = f"cannot be a folder ({getattr(error, 'strerror', error)})"
            return [Problem(f"{key}.dump_folder", self.dump_folder, rule, "name another")]
        if not nearest.is_dir():
            rule = "is a file" if nearest == folder else f"cannot be made below {nearest}, which is a file"
            return [Problem(f"{key}.dump_folder", self.dump_folder, rule, "name a folder")]
        if not os.access(nearest, os.W_OK | os.X_OK):
            rule, remedy = f"cannot be written: {nearest} is read-only", "name a folder that you can write to"
            return [Problem(f"{key}.dump_folder", self.dump_folder, rule, remedy)]
        return []


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which decoder is trained."""

    name: Annotated[str, registry.Names(registry.families)] = "qwen3"
    """Family of the model; or hf, whose flavors are folders with a config.json."""
    flavor: str = "debugmodel"
    """Size of the model, alone or with an attention: 8B, 8B_flex, 8B_flex_flash, 8B_varlen."""
    attention: AnyAttention = field(default_factory=Sdpa)
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the decoder that replace those of the flavor, such as {"n_layers": 2}."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Train a decoder on text.

    - An option is a key of a file: --training.steps 20 is steps = 20 in [training].
    - Later wins: defaults, each --config in order, then the options, in any order.
    - The defaults below are those after what is given with --help.
    """

    job: JobSection = field(default_factory=JobSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: Annotated[DataConfig, registry.datasets] = field(default_factory=PythonStdlib)
    tokenizers: Annotated[Any, registry.tokenizers] = field(default_factory=registry.tokenizers.defaults)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: Annotated[OptimizerConfig, registry.optimizers] = field(default_factory=AdamW)
    lr_scheduler: LRSchedulerConfig = field(default_factory=LRSchedulerConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    parallelism: ParallelismConfig = field(default_factory=ParallelismConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    hooks: Annotated[Any, registry.hooks] = field(default_factory=registry.hooks.defaults)

    @property
    def device(self) -> str:
        """The device that `job.device` comes to here: "cpu" or "cuda"."""
        if self.job.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.job.device

    @property
    def decoder(self) -> DecoderConfig:
        """The decoder that the model section describes. Raises ConfigError where it describes none."""
        return resolve(self.model.name, self.model.flavor, self.model.attention, self.model.overrides)

    @property
    def hook_configs(self) -> dict[str, Any]:
        """The hooks of the run by name, each with its options: every one that is registered."""
        return registry.hooks.configured(self.hooks)

    def plan(self, world_size: int) -> list[str]:
        """How the run is spread over `world_size` ranks, in a few lines; needs no ranks."""
        return plan(
            self.decoder,
            self.parallelism.degrees(world_size),
            parallelism=self.parallelism,
            recompute=self.activation_checkpoint,
            compile=self.compile,
            offload=self.training.enable_cpu_offload,
        )

    def to_toml(self, world_size: int) -> str:
        """The whole configuration as TOML, after the plan for `world_size` ranks as comments."""
        return "".join(f"# {line}\n" for line in self.plan(world_size)) + "\n" + to_toml(self)

    def check(self, world_size: int = 1, dry_run: bool = False) -> list[Problem]:
        """Everything that is wrong on `world_size` ranks although each value has its type.

        A dry run needs neither the ranks nor a GPU.
        """
        mesh = self.parallelism.problems("parallelism", world_size)
        arguments: dict[str, Any] = {
            "parallelism": {"world_size": world_size},
            "training": {"data_ranks": 1 if mesh else self.parallelism.degrees(world_size).data},
            "compile": {"device": None if dry_run else self.device},
            "lr_scheduler": {"training_steps": self.training.steps if self.training.steps > 0 else None},
        }
        found = []
        for section in fields(self):
            problems = getattr(getattr(self, section.name), "problems", None)
            if problems is not None:
                found += problems(section.name, **arguments.get(section.name, {}))
        if dry_run:
            found = [
                replace(problem, key="--world-size") if problem.key == "WORLD_SIZE" else problem
                for problem in found
            ]
        if self.device == "cuda" and not dry_run and not torch.cuda.is_available():
            rule, remedy = "is not available, as torch finds no GPU", 'use "cpu" or "auto"'
            found.append(Problem("job.device", "cuda", rule, remedy))
        if self.validation.enable and self.data.validation_fraction == 0:
            rule, remedy = "needs held-out text, and data.validation_fraction is 0", "set that to 0.05"
            found.append(Problem("validation.enable", True, rule, remedy))
        return found + self._folder_problems() + self._model_problems(world_size)

    def _folder_problems(self) -> list[Problem]:
        """A folder of steps that is something else too, and would be moved aside with it."""
        folder = self.checkpoint.folder
        if Path(folder).name != folder or folder in ("", ".."):  # which the section itself refuses
            return []
        others = (self.metrics.save_tb_folder, self.profiling.save_traces_folder)
        if is_inside(folder) and not any(Path(other).parts[:1] == (folder,) for other in others):
            return []
        rule = "is the name of something else in the run's folder"
        return [Problem("checkpoint.folder", folder, rule, 'use "checkpoint"')]

    def _model_problems(self, world_size: int) -> list[Problem]:
        model = self.model
        decoder, wrong = read(model.name, model.flavor, model.attention, model.overrides)
        sound_heads = not {problem.key for problem in wrong} & set(_REFUSED_KEYS.values())
        found = self._attention_problems(decoder if sound_heads else None) + self._tokenizer_problems(decoder)
        if decoder is not None and self.training.seq_len > decoder.max_seq_len:
            rule = f"is more than the {decoder.max_seq_len} tokens that the model is meant for"
            remedy = f"use at most {decoder.max_seq_len}, or raise model.overrides.max_seq_len"
            found.append(Problem("training.seq_len", self.training.seq_len, rule, remedy))
        mesh_problems = self.parallelism.problems("parallelism", world_size)
        unsound = {problem.key.removeprefix(_OVERRIDES) for problem in wrong}
        found += self._division_problems(decoder, unsound, world_size)
        if decoder is not None:
            found += self.activation_checkpoint.block_problems("activation_checkpoint", decoder.n_layers)
            if self.checkpoint.last_save_in_hf:
                found += export_problems(decoder, "model.overrides")
        if decoder is not None and type(decoder) is not DecoderConfig and not wrong and not mesh_problems:
            found += model_problems(decoder, self.parallelism.degrees(world_size))
        return wrong + of_sound_values(found, wrong)

    def _division_problems(
        self, decoder: DecoderConfig | None, unsound: set[str], world_size: int
    ) -> list[Problem]:
        """What the mesh does not divide; nothing of the decoder's `unsound` fields."""
        wrong = self.parallelism.problems("parallelism", world_size)
        if self.training.seq_len < 1 or any(problem.key != "WORLD_SIZE" for problem in wrong):
            return []
        kind, sizes = (DecoderConfig, {}) if decoder is None else (type(decoder), decoder.splits)
        return Division(
            parallelism=self.parallelism,
            world_size=world_size,
            seq_len=self.training.seq_len,
            max_seq_len=None if decoder is None or "max_seq_len" in unsound else decoder.max_seq_len,
            sizes={name: size for name, size in sizes.items() if name not in unsound},
            dealt_by_ulysses=kind.dealt_by_ulysses,
            extensible=kind.extensible,
        ).problems()

    def _attention_problems(self, decoder: DecoderConfig | None) -> list[Problem]:
        """What keeps the backend from running; without a decoder, for heads that suit every backend."""
        refused = refusals(
            self.model.attention,
            device=self.device,
            dtype=self.training.compute_dtype,
            head_dim=decoder.head_dim if decoder else 64,
            n_heads=decoder.n_heads if decoder else 1,
            n_kv_heads=decoder.n_kv_heads if decoder else 1,
            sliding_window=decoder.sliding_window if decoder else None,
            deterministic=self.debug.deterministic,
        )
        found = [
            Problem(_REFUSED_KEYS.get(field, f"model.attention.{field}"), value, rule, remedy)
            for field, value, rule, remedy in refused
        ]
        attention = self.model.attention
        if (
            self.device == "cuda"
            and self.compile.enable
            and isinstance(attention, Flex)
            and attention.autotuned
        ):
            rule = "finds no kernel within compiled blocks"
            remedy = "use a multiple of 128, or compile.enable = false"
            found.append(Problem("model.attention.block_size", attention.block_size, rule, remedy))
        return found

    def _tokenizer_problems(self, decoder: DecoderConfig | None) -> list[Problem]:
        if self.tokenizers.problems("tokenizers"):
            return []  # no tokenizer is built with options that are wrong
        try:
            size = load_tokenizer(self.data.tokenizer, self.tokenizers).vocab_size
        except ConfigError as error:
            return list(error.problems)
        if decoder is None or size <= decoder.vocab_size:
            return []
        rule = f"has {size} tokens, and the model's vocab_size is {decoder.vocab_size}"
        remedy = f"set model.overrides.vocab_size to {size} or more"
        return [Problem("data.tokenizer", self.data.tokenizer, rule, remedy)]


def load_job(
    argv: Sequence[str], *, world_size: int = 1, prog: str = "python -m torchtitan_lite.train"
) -> Loaded[JobConfig]:
    """The checked configuration of the command line `argv`; raises ConfigError with all that is wrong."""
    loaded = load(
        JobConfig,
        argv,
        prog=prog,
        layer_hook=expand,
        check=JobConfig.check,
        world_size=world_size,
        plugins="job.plugins",
    )
    return replace(loaded, config=_with_true_flavor(loaded.config))


def expand(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer with what stands for something longer written out: the flavor's suffix, and a null scaling."""
    layer = _without_empty_options(layer)
    model = layer.get("model")
    overrides = model.get("overrides") if isinstance(model, dict) else None
    if isinstance(model, dict) and isinstance(overrides, dict) and overrides.get("rope_scaling", 0) is None:
        # TOML has no null, and a flavor may have a scaling of its own to undo.
        overrides = overlay(overrides, {"rope_scaling": Afresh(factor=1.0)})
        layer = {**layer, "model": {**model, "overrides": overrides}}
    return expand_flavor(layer)


def _without_empty_options(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer without the `path` and `field` that earlier versions wrote out for datasets that have none."""
    data = layer.get("data")
    name = data.get("dataset") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(name, str) or name not in registry.datasets.members:
        return layer
    options = {option.name for option in fields(registry.datasets.members[name])}
    unused = [key for key, empty in _EMPTY.items() if key not in options and data.get(key) == empty]
    return {**layer, "data": {key: value for key, value in data.items() if key not in unused}}


def expand_flavor(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer with the attention that the suffix of its flavor stands for.

    That attention replaces what earlier layers say; the layer's own attention table is laid over it, or wins
    as a whole when it names another kind. A flavor without a suffix leaves the attention alone.
    """
    model = layer.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("flavor"), str):
        return layer
    _, attention = split_flavor(model["flavor"])
    own = model.get("attention", {})
    is_folder = model.get("name") == FOLDER or os.path.isdir(model["flavor"])
    if attention is None and not is_folder and (kind := meant_kind(model["flavor"])):
        # The flavor is refused later; what is said of the attention meant is not wrong as well.
        attention = {"kind": kind}
    if attention is None or not isinstance(own, dict):
        return layer
    if own.get("kind", attention["kind"]) != attention["kind"]:
        return layer
    return {**layer, "model": {**model, "attention": Afresh(overlay(attention, own))}}


def _with_true_flavor(job: JobConfig) -> JobConfig:
    """`job` without the flavor's suffix where a later layer has chosen another attention.

    So the name never says what is not so, and the resolved file, read again, means the same.
    """
    size, attention = split_flavor(job.model.flavor)
    chosen = {name: getattr(job.model.attention, name, None) for name in attention or {}}
    if attention is None or overlay(chosen, attention) == chosen:
        return job
    return replace(job, model=replace(job.model, flavor=size))
