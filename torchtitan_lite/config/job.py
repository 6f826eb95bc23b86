"""The whole configuration of a run: the sections of all modules, and the checks between sections."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch

from torchtitan_lite import registry
from torchtitan_lite.attention import AttentionConfig
from torchtitan_lite.checkpoint import CheckpointConfig
from torchtitan_lite.config import torchtitan
from torchtitan_lite.config.load import ConfigError, Loaded, Problem, load, to_toml
from torchtitan_lite.config.problem import of_sound_keys
from torchtitan_lite.data.datasets import DataConfig, PythonStdlib
from torchtitan_lite.data.tokenizer import load_tokenizer
from torchtitan_lite.launch.world import CommConfig
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.models.huggingface import export_problems
from torchtitan_lite.models.refusals import KEYS_OF_A_RUN, Conditions, attention_problems
from torchtitan_lite.models.registry import (
    DEFAULT_FAMILY,
    class_of_flavor,
    expand_model,
    flavors_in_words,
    own_attention,
    read,
    resolve,
    true_flavor,
)
from torchtitan_lite.parallel.apply import CompileConfig, model_problems, plan
from torchtitan_lite.parallel.division import Division
from torchtitan_lite.parallel.mesh import ParallelismConfig
from torchtitan_lite.parallel.recompute import ActivationCheckpointConfig
from torchtitan_lite.training.config import DebugConfig, TrainingConfig
from torchtitan_lite.training.hooks import own as own_hooks  # noqa: F401 (registers our hooks)
from torchtitan_lite.training.hooks.profiler import ProfilingConfig
from torchtitan_lite.training.metrics import MetricsConfig
from torchtitan_lite.training.optimizer import AdamW, OptimizerConfig
from torchtitan_lite.training.outputs import is_inside
from torchtitan_lite.training.schedule import LRSchedulerConfig
from torchtitan_lite.training.validation import ValidationConfig


@dataclass(frozen=True, kw_only=True)
class JobSection:
    """The output folder, description, device and plugins of the run."""

    dump_folder: str = ""
    """The folder that the run writes to, used as given. Empty: outputs/<name>-<flavor>-<overrides>-<time>."""
    description: str = ""
    """A note on what the run is for, kept with the run's files."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one, else cpu."""
    plugins: tuple[str, ...] = ()
    """Modules to import before other keys are read, such as my_package.module. They add model families,
    attention backends, datasets, tokenizers, optimizers and hooks.
    """

    def problems(self, key: str) -> list[Problem]:
        """Return a problem if the output folder cannot be made or written."""
        try:
            folder = Path(self.dump_folder or "outputs").expanduser().absolute()
            nearest = next(place for place in (folder, *folder.parents) if place.exists())
        except (OSError, RuntimeError) as error:  # the name is too long, or ~ names an unknown user
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
    """The decoder to train."""

    name: Annotated[str, registry.Names(registry.families)] = DEFAULT_FAMILY
    """Family of the model. With hf, the flavor is a folder with a config.json."""
    flavor: Annotated[str, registry.Lines(lambda _: flavors_in_words())] = "debugmodel"
    """Size of the model, with or without an attention backend: 8B, 8B_flex, 8B_flex_flash, 8B_varlen."""
    attention: Annotated[AttentionConfig | None, registry.attentions] = None
    """The attention backend. Unset: the backend that belongs to the flavor."""
    overrides: Annotated[
        dict[str, Any],
        registry.FieldsOf(lambda model: class_of_flavor(model.name, model.flavor), but=("attention",)),
    ] = field(default_factory=dict)
    """Fields of the decoder that replace the flavor's fields, such as {"n_layers": 2}."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Train a decoder on text.

    - Every option is also a key of a file: --training.steps 20 is steps = 20 in [training].
    - Later values win: first the defaults, then each --config in order, then the options in any order.
    - The defaults below include the values of the files and options given with --help.
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

    foreign_keys: ClassVar[Mapping[str, str]] = torchtitan.REMEDIES
    """The remedies for unknown keys that people bring from elsewhere."""

    @property
    def device(self) -> str:
        """The device of the run: "cpu" or "cuda". "auto" becomes "cuda" if torch finds a GPU."""
        if self.job.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.job.device

    @property
    def attention(self) -> AttentionConfig:
        """The attention backend of the model: `model.attention`, or the flavor's backend if that is unset."""
        return self.model.attention or own_attention(self.model.flavor)

    @property
    def decoder(self) -> DecoderConfig:
        """The decoder that the section `[model]` describes. Raises ConfigError if the section is wrong."""
        return resolve(self.model.name, self.model.flavor, self.model.attention, self.model.overrides)

    @property
    def hook_configs(self) -> dict[str, Any]:
        """The config of every registered hook, by the name of the hook."""
        return registry.hooks.configured(self.hooks)

    def plan(self, world_size: int) -> list[str]:
        """Return lines on the model, and on how `world_size` ranks train it. No rank need be running."""
        model, training, degrees = self.model, self.training, self.parallelism.degrees(world_size)
        changes = "".join(f", {name} = {value}" for name, value in sorted(model.overrides.items()))
        tokens = training.samples_per_step(degrees.data) * training.seq_len
        return [
            f"model: {model.name} {model.flavor}{changes}",
            *plan(
                self.decoder,
                degrees,
                device=self.device,
                parallelism=self.parallelism,
                recompute=self.activation_checkpoint,
                compile=self.compile,
                offload=training.enable_cpu_offload,
                optimizer_numbers=getattr(self.optimizer, "numbers_per_weight", None),
            ),
            f"tokens: {tokens:,} per step, {tokens * training.steps:,} in {training.steps:,} steps",
        ]

    def to_toml(self, world_size: int) -> str:
        """Return the plan for `world_size` ranks as comments, then the whole configuration as TOML."""
        return _comments(self.plan(world_size)) + "\n" + to_toml(self)

    def to_movable_toml(self, world_size: int, folder: Path) -> str:
        """Return the text of `to_toml` without the keys that name `folder`, the run's own folder.

        A folder may be moved, and a run that starts from this text must not write to the old place. The text
        still names a tokenizer or weights inside `folder`, because the run depends on them.
        """
        note = "job.dump_folder is left out: to go on in this folder, name the folder with --job.dump-folder"
        without = {"job": {"dump_folder"}}
        cache = self.data.cache_dir
        if cache and Path(cache).expanduser().resolve().is_relative_to(folder.resolve()):
            without["data"] = {"cache_dir"}
        return _comments([*self.plan(world_size), note]) + "\n" + to_toml(self, without)

    def check(self, world_size: int = 1, dry_run: bool = False) -> list[Problem]:
        """Return all problems between values that are each valid alone, for a run on `world_size` ranks.

        A dry run needs neither a GPU nor running ranks.
        """
        model, mesh = self.model, self.parallelism.problems("parallelism", world_size)
        decoder, wrong = read(model.name, model.flavor, model.attention, model.overrides)
        if dry_run:
            mesh = [replace(problem, key="--world-size") for problem in mesh]
        n_blocks = decoder.n_layers if decoder else None
        found = [
            *self.job.problems("job"),
            *_own_problems(self.data, "data"),
            *self.tokenizers.problems("tokenizers"),
            *self.training.problems("training", 1 if mesh else self.parallelism.degrees(world_size).data),
            *_own_problems(self.optimizer, "optimizer"),
            *self.lr_scheduler.problems("lr_scheduler", self.training.steps),
            *self.checkpoint.problems("checkpoint"),
            *self.activation_checkpoint.problems("activation_checkpoint", n_blocks),
            *self.compile.problems("compile", None if dry_run else self.device),
            *mesh,
            *self.hooks.problems("hooks"),
        ]
        if self.device == "cuda" and not dry_run and not torch.cuda.is_available():
            rule, remedy = "is not available, as torch finds no GPU", 'use "cpu" or "auto"'
            found.append(Problem("job.device", "cuda", rule, remedy))
        if self.validation.enable and self.data.validation_fraction == 0:
            rule, remedy = (
                "needs held-out text, and data.validation_fraction is 0",
                "set data.validation_fraction = 0.05",
            )
            found.append(Problem("validation.enable", True, rule, remedy, ("data.validation_fraction",)))
        found += self._folder_problems()
        found += self._text_problems()
        conditions = Conditions(
            decoder=decoder,
            device=self.device,
            dtype=self.training.compute_dtype,
            deterministic=self.debug.deterministic,
            is_compiled=self.compile.enable,
        )
        found += attention_problems(self.attention, conditions, KEYS_OF_A_RUN, model.flavor)
        found += self._tokenizer_problems(decoder)
        division = Division(self.parallelism, decoder, seq_len=self.training.seq_len, world_size=world_size)
        found += division.problems()
        found += self._length_problems(decoder, division.unit)
        if decoder is not None and self.checkpoint.last_save_in_hf:
            found += export_problems(decoder, "model.overrides")
        if decoder is not None and type(decoder) is not DecoderConfig and not wrong and not mesh:
            found += model_problems(decoder, self.parallelism.degrees(world_size))
        return wrong + of_sound_keys(found, wrong)

    def _length_problems(self, decoder: DecoderConfig | None, unit: int) -> list[Problem]:
        """Return a problem if the samples, a multiple of `unit` tokens, are too long for the model."""
        seq_len = self.training.seq_len
        if decoder is None or seq_len <= decoder.max_seq_len:
            return []
        rule = f"is more than the {decoder.max_seq_len} tokens that the model is meant for"
        remedy = "raise model.overrides.max_seq_len"
        if most := decoder.max_seq_len // unit * unit:
            remedy = f"use at most {most}, or {remedy}"
        return [Problem("training.seq_len", seq_len, rule, remedy, ("model.overrides.max_seq_len",))]

    def _folder_problems(self) -> list[Problem]:
        """Return a problem for each folder that is outside the run's folder, or whose name is used there."""
        tb, traces = self.metrics.save_tb_folder, self.profiling.save_traces_folder
        folder = self.checkpoint.folder
        reports = {
            "metrics.save_tb_folder": (tb, ("tb", "tensorboard")),
            "profiling.save_traces_folder": (traces, ("profile_traces", "traces")),
        }
        found = [
            Problem(key, place, "is not a folder of its own inside the run's", _use_free(names, {folder}))
            for key, (place, names) in reports.items()
            if not is_inside(place)
        ]
        used = {"tb", "profile_traces", *Path(tb).parts[:1], *Path(traces).parts[:1]}
        remedy = _use_free(("checkpoint", "checkpoints", "steps"), used)
        if Path(folder).name != folder or folder in ("", ".."):
            found.append(Problem("checkpoint.folder", folder, "is not a folder inside the run's", remedy))
        elif not is_inside(folder) or folder in (Path(tb).parts[:1] + Path(traces).parts[:1]):
            rule = "is the name of something else in the run's folder"
            found.append(Problem("checkpoint.folder", folder, rule, remedy, tuple(reports)))
        return found

    def _text_problems(self) -> list[Problem]:
        """Return a problem if the text is read from the run's own folder: the run would add files to it."""
        paths = self.job.dump_folder, getattr(self.data, "path", "")
        ours, text = (os.path.expanduser(path) if isinstance(path, str) else "" for path in paths)
        if not (os.path.isdir(ours) and os.path.isdir(text) and os.path.samefile(ours, text)):
            return []
        rule = "is data.path too, and the run's own files must not become text"
        remedy = f"name another folder, such as {os.path.join(self.job.dump_folder, 'run')}"
        return [Problem("job.dump_folder", self.job.dump_folder, rule, remedy, ("data.path",))]

    def _tokenizer_problems(self, decoder: DecoderConfig | None) -> list[Problem]:
        if self.tokenizers.problems("tokenizers"):
            return []  # a tokenizer cannot be built with wrong options
        try:
            size = load_tokenizer(self.data.tokenizer, self.tokenizers).vocab_size
        except ConfigError as error:
            return list(error.problems)
        if decoder is None or size <= decoder.vocab_size:
            return []
        rule = f"has {size} tokens, and the model's vocab_size is {decoder.vocab_size}"
        tensor = self.parallelism.tensor_parallel_degree
        remedy = f"set model.overrides.vocab_size to {size} or more"
        if size % tensor:
            remedy = f"set model.overrides.vocab_size = {-(-size // tensor) * tensor}"
        reads = ("tokenizers", "model.overrides.vocab_size")
        return [Problem("data.tokenizer", self.data.tokenizer, rule, remedy, reads)]


def _use_free(names: Sequence[str], used: set[str]) -> str:
    """Return the remedy that proposes the first of `names` that is not `used`."""
    return f'use "{next(name for name in names if name not in used)}"'


def _comments(lines: Sequence[str]) -> str:
    return "".join(f"# {line}\n" for line in lines)


def _own_problems(section: Any, key: str) -> list[Problem]:
    """Return `section.problems(key)`, or no problems if a plugin's section lacks this method."""
    return section.problems(key) if hasattr(section, "problems") else []


def load_job(
    argv: Sequence[str], *, world_size: int = 1, prog: str = "python -m torchtitan_lite.train"
) -> Loaded[JobConfig]:
    """Return the checked configuration of the command line `argv`. Raises ConfigError with all problems."""
    loaded = load(
        JobConfig,
        argv,
        prog=prog,
        expand=expand_model,
        check=JobConfig.check,
        world_size=world_size,
        plugins="job.plugins",
    )
    model = loaded.config.model
    model = replace(model, flavor=true_flavor(model.flavor, loaded.config.attention))
    return replace(loaded, config=replace(loaded.config, model=model))
