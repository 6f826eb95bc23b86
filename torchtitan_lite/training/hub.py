"""Weights in the format of the Hugging Face Hub: read when a run starts, written from a saved step."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import GenericAlias
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from torchtitan_lite.checkpoint import CheckpointConfig
from torchtitan_lite.checkpoint.manifest import Damaged
from torchtitan_lite.checkpoint.restore import Found, verify
from torchtitan_lite.checkpoint.save import Snapshot, write_step
from torchtitan_lite.checkpoint.state import State, fingerprint, flat
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.checkpoint.tensors import Piece, read_tensors
from torchtitan_lite.checkpoint.weights import Weights, write_weights
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.data import Tokenizer, load_tokenizer
from torchtitan_lite.durable import new_folder
from torchtitan_lite.launch.world import World
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.models.huggingface import (
    CONFIG,
    config_json,
    differences,
    export_problems,
    read_config,
)
from torchtitan_lite.models.parameters import hub_names
from torchtitan_lite.models.registry import config_class
from torchtitan_lite.training.outputs import free_folder

_MODEL = "model."
HUB = "hf"
"""Folder in a run's folder: the model of its last step, for Hugging Face."""
TOKENIZER = "tokenizer"
"""Folder in a run's folder, or beside imported steps: the files of the tokenizer."""
SOURCE = "hf_source.json"
"""File in a run's folder: the step and the precision of the model in `HUB`."""
_MOST_LINES = 5
"""How many tensors a message names at most."""


def check(folder: Path, config: DecoderConfig, ranks: World, key: str) -> None:
    """Raise ConfigError, the same on all ranks, unless `folder` holds a whole model of `config`.

    The error names `key` if tensors are missing, too many or of other shapes, or if a file is damaged.
    """

    def check_here() -> None:
        found, problems = read_config(folder)
        if found is not None:
            problems += differences(found, config, str(folder / CONFIG))
        if problems:
            raise ConfigError(problems)
        with _opened(folder, config, key):
            pass

    ranks.together(check_here)


def load_weights(
    folder: Path, config: DecoderConfig, pieces: Mapping[str, Piece], ranks: World, key: str
) -> None:
    """Load `pieces` of a model, by our names, from the safetensors in `folder`, and read no other bytes.

    Raises ConfigError as `check` does.
    """

    def load_here() -> None:
        with _opened(folder, config, key) as weights:
            weights.read({config.parameters.hub_name(name): piece for name, piece in pieces.items()})

    ranks.together(load_here)


@contextmanager
def _opened(folder: Path, config: DecoderConfig, key: str) -> Iterator[Weights]:
    """The weights in `folder`, which must be those of a model of `config`.

    Raises ConfigError about `key` for other weights, and for damage that is found while they are open.
    """
    table = config.parameters
    shapes = {table.hub_name(name): shape for name, shape in config.shapes.items()}
    # Some folders store a tied head a second time.
    head, embedding = table.of_group("head").hub, table.of_group("embedding").hub
    ignored = [head] if head and head not in shapes else []
    try:
        with Weights(folder) as weights:
            if lines := weights.differences(shapes, ignored):
                more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
                raise Damaged("; ".join([*lines[:_MOST_LINES], *more]))
            for name in ignored:
                if name in weights.places and embedding and not weights.are_equal(name, embedding):
                    raise Damaged(f"{name} is not {embedding}, and config.json says that they are one")
            yield weights
    except Damaged as damage:
        rule, remedy = f"cannot be loaded: {damage}", "copy the model again, or choose the one that it is"
        raise ConfigError([Problem(key, str(folder), rule, remedy)]) from None


def tokenizer_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the tokenizer in `folder`; None if there is no usable tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        return None
    with suppress(ConfigError):
        return load_tokenizer(str(folder)).fingerprint
    return None


def identity_of(config: DecoderConfig) -> dict[str, Any]:
    """The decoder as a step records it, by key: everything but the backend, which does not change numbers."""
    fields = asdict(config)
    del fields["attention"]
    if config.architecture != DecoderConfig.architecture:
        fields["architecture"] = config.architecture
    return flat({"model": json.loads(json.dumps(fields))})


def decoder_of(identity: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a step records, with the default backend: the inverse of `identity_of`.

    Raises Damaged if the record is wrong, and ConfigError if no family here has this architecture.
    """
    recorded = {key: value for key, value in identity.items() if key.startswith(_MODEL)}
    values = _nested(recorded).get("model", {})
    architecture = values.pop("architecture", DecoderConfig.architecture)
    if not isinstance(architecture, str):
        raise _wrong_record(f"model.architecture: {architecture!r}")
    if (cls := config_class(architecture)) is None:
        rule, remedy = "is of no model family here", "name the plugin that has it with --plugins"
        raise ConfigError([Problem("model.architecture", architecture, rule, remedy)])
    # A list, because pydantic takes no ConfigDict for a dataclass itself. Pydantic does not know the backend.
    one: Any = GenericAlias(list, (cls,))
    adapter = TypeAdapter[list[DecoderConfig]](one, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        (config,) = adapter.validate_json(json.dumps([values]), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise _wrong_record(f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}") from None
    if differing := identity_of(config).keys() ^ recorded.keys():
        raise _wrong_record(f"{min(differing)} is missing or unknown")
    if problems := config.problems("model"):
        raise _wrong_record(problems[0])
    return config


def _wrong_record(why: object) -> Damaged:
    return Damaged(f"its record of the model is wrong ({why})")


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables of values that are given by dotted key."""
    tables: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        table = tables
        for parent in parents:
            table = table.setdefault(parent, {})
        table[name] = value
    return tables


def check_vocabulary(tokenizer: Tokenizer, config: DecoderConfig, key: str, value: str) -> None:
    """Raise ConfigError about `key` if the tokenizer has more tokens than the model has rows."""
    if tokenizer.vocab_size > config.vocab_size:
        rule = f"has {tokenizer.vocab_size} tokens, and the model's vocab_size is {config.vocab_size}"
        raise ConfigError([Problem(key, value, rule, "use the tokenizer that the model was trained with")])


def export(
    found: Found,
    tokenizer: Tokenizer,
    out: Path,
    dtype: torch.dtype,
    key: str = "dtype",
) -> None:
    """Write the model of a verified step to a new folder `out`, which transformers, vLLM and others load.

    The folder holds safetensors with their index, config.json, generation_config.json and the tokenizer. It
    appears when all files are complete. Raises OSError if the folder exists or cannot be written, and
    ConfigError if transformers has no such model, or, about `key`, if `dtype` cannot hold a weight.
    """
    config = decoder_of(found.state.identity)
    if problems := export_problems(config, "model"):
        raise ConfigError(problems)
    stored = {name.removeprefix(_MODEL): x for name, x in found.index.items() if name.startswith(_MODEL)}
    names = {theirs: name for theirs, name in hub_names(config.rows).items() if name in stored}

    def read(some: Sequence[str]) -> dict[str, Tensor]:
        pieces = {name: _whole(stored[names[name]].shape, stored[names[name]].dtype) for name in some}
        read_tensors(found.folder, {_MODEL + names[name]: x for name, x in pieces.items()}, found.index)
        for name, piece in pieces.items():
            _check_range(piece.local, name, dtype, key)
        return {name: piece.local for name, piece in pieces.items()}

    ends = {"eos_id": tokenizer.eos_id, "bos_id": tokenizer.bos_id}
    described = config_json(config, dtype=_name_of(dtype), **ends)
    generation = {name: described[name] for name in ("bos_token_id", "eos_token_id")}
    if len(tokenizer.stop_ids) > 1:
        generation["eos_token_id"] = list(tokenizer.stop_ids)
    with new_folder(out) as folder:
        write_weights(folder, {name: stored[names[name]].shape for name in sorted(names)}, dtype, read)
        tokenizer.save(folder)
        for file, content in ((CONFIG, described), ("generation_config.json", generation)):
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _whole(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Piece:
    """Room for a whole tensor."""
    shape = torch.Size(shape)
    return Piece(local=torch.empty(shape, dtype=dtype), shape=shape, offsets=torch.Size([0] * len(shape)))


def _check_range(x: Tensor, name: str, dtype: torch.dtype, key: str) -> None:
    """Raise ConfigError about `key` unless every number of `x` is finite in `dtype`."""
    most = x.abs().max()
    if not most <= torch.finfo(dtype).max:  # also true for NaN
        rule = f"cannot hold {name}, which reaches {most:.3g}"
        raise ConfigError([Problem(key, _name_of(dtype), rule, "use bfloat16")])


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def export_last(folder: Path, checkpoint: CheckpointConfig, step: int, tokenizer: Tokenizer) -> None:
    """Write the model of the last step of the run in `folder` to `hf` in it, unless that is done already."""
    out, dtype = folder / HUB, checkpoint.export_dtype
    found = verify(Steps(folder / checkpoint.folder).path(step), World())
    source = {"step": step, "manifest": fingerprint(asdict(found.manifest)), "dtype": dtype}
    if out.exists():
        with suppress(OSError, ValueError):
            if json.loads((folder / SOURCE).read_bytes()) == source:
                return
        out.rename(free_folder(folder, "earlier") / HUB)
    export(found, tokenizer, out, getattr(torch, dtype), "checkpoint.export_dtype")
    (folder / SOURCE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def import_(folder: Path, out: Path, tokenizer: Tokenizer | None) -> None:
    """Write the Hugging Face model in `folder` as step 0 in a new folder `out`, to start runs with.

    Raises ConfigError if this decoder cannot be that model, or if a file is damaged.
    """
    config, problems = read_config(folder)
    if config is None or problems:
        raise ConfigError(problems)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config, "PATH", str(folder))
    pieces = {name: _whole(shape) for name, shape in config.shapes.items()}
    load_weights(folder, config, pieces, World(), "PATH")
    identity = identity_of(config)
    if tokenizer is not None:
        identity["data.tokenizer_fingerprint"] = tokenizer.fingerprint
    state = State(
        step=0,
        n_tokens_seen=0,
        consumed_samples=0,
        validated=-1,
        model_only=True,
        identity=identity,
        schedule={},
        config={},
    )
    snapshot = Snapshot(
        step=0,
        pieces={_MODEL + name: piece for name, piece in pieces.items()},
        state=state,
        made={"imported_from": str(folder)},
    )
    with new_folder(out) as place:
        write_step(Steps(place), snapshot, World())
        if tokenizer is not None:
            (place / TOKENIZER).mkdir()
            tokenizer.save(place / TOKENIZER)
