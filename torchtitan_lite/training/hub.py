"""Models in Hugging Face's format: loading their weights into a run, and exporting checkpoints."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan_lite.checkpoint import CheckpointConfig
from torchtitan_lite.checkpoint.manifest import Damaged, refusing_damage
from torchtitan_lite.checkpoint.restore import VerifiedStep, verify
from torchtitan_lite.checkpoint.save import Snapshot, write_step
from torchtitan_lite.checkpoint.state import State, fingerprint, flat
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.checkpoint.tensors import Piece, Stored, read_tensors
from torchtitan_lite.checkpoint.tensors import differences as tensor_differences
from torchtitan_lite.checkpoint.weights import EXACT, are_equal, read_weights_index, write_weights
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.config.validation import validate
from torchtitan_lite.data import Tokenizer, load_tokenizer
from torchtitan_lite.durable import new_folder
from torchtitan_lite.launch.world import World
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.models.huggingface import CONFIG, config_json, differences, export_problems, read_config
from torchtitan_lite.models.parameters import hub_names
from torchtitan_lite.models.registry import config_class, families
from torchtitan_lite.training.outputs import free_folder

_MODEL = "model."
HUB = "hf"
"""The folder, inside the run's folder, for the model of the last step in Hugging Face's format."""
TOKENIZER = "tokenizer"
"""The folder for the tokenizer's files, inside the run's folder or the folder of an imported model."""
SOURCE = "hf_source.json"
"""The file, inside the run's folder, that says which step the folder `HUB` holds, and in which dtype."""
_DAMAGED, _REMEDY = "cannot be loaded", "copy the model again, or choose the one that it is"


def check(folder: Path, config: DecoderConfig, world: World, key: str) -> None:
    """Raise ConfigError on all ranks unless `folder` holds a complete model with this `config`.

    The error names the setting `key` if a tensor is missing, unknown or of another shape, or if a file is
    damaged.
    """

    def check_here() -> None:
        found, problems = read_config(folder)
        if found is not None:
            problems += differences(found, config, str(folder / CONFIG))
        if problems:
            raise ConfigError(problems)
        with torch.device("meta"):
            wanted = {
                config.parameters.hub_name(name): _whole(shape) for name, shape in config.shapes.items()
            }
        _index_for(wanted, folder, config)

    with refusing_damage(key, str(folder), _DAMAGED, _REMEDY):
        world.together(check_here)


def load_weights(
    folder: Path, config: DecoderConfig, pieces: Mapping[str, Piece], world: World, key: str
) -> None:
    """Load `pieces`, by this package's names of the parameters, from the safetensors in `folder`.

    No other bytes are read. Raises ConfigError about the setting `key` if a tensor is missing, unknown or of
    another shape, if a file is damaged, or if a number is not finite.
    """
    own = {config.parameters.hub_name(name): piece for name, piece in pieces.items()}

    def load_here() -> None:
        read_tensors(folder, own, _index_for(own, folder, config))
        for name, piece in own.items():
            if not piece.local.isfinite().all():
                raise Damaged(f"{name} has numbers that are not finite")

    with refusing_damage(key, str(folder), _DAMAGED, _REMEDY):
        world.together(load_here)


def _index_for(wanted: Mapping[str, Piece], folder: Path, config: DecoderConfig) -> dict[str, Stored]:
    """Return the place in `folder` of each `wanted` tensor. Raises Damaged unless exactly these are there."""
    index = read_weights_index(folder)
    head, embedding = (config.parameters.of_group(one).hub or "" for one in ("head", "embedding"))
    # Some folders store a tied head twice: as the head and as the embedding.
    is_twice = head in index and head not in wanted and embedding in index
    if is_twice and not are_equal(folder, index.pop(head), index[embedding]):
        raise Damaged(f"{head} is not {embedding}, and config.json says that they are one")
    if lines := tensor_differences(wanted, index, EXACT, "the files"):
        raise Damaged("; ".join(lines))
    return index


def tokenizer_fingerprint(folder: Path) -> str | None:
    """Return the fingerprint of the tokenizer in `folder`; None if there is no usable tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        return None
    with suppress(ConfigError):
        return load_tokenizer(str(folder)).fingerprint
    return None


def record_of(config: DecoderConfig) -> dict[str, Any]:
    """Return the fields of `config` for a checkpoint, without the attention backend: it changes no result."""
    fields = asdict(config)
    del fields["attention"]
    if config.architecture != DecoderConfig.architecture:
        fields["architecture"] = config.architecture
    return json.loads(json.dumps(fields))


def decoder_of(identity: Mapping[str, Any]) -> DecoderConfig:
    """Return the config of the decoder in a run's `identity`, with the default attention backend.

    Raises Damaged if the entry "model" is wrong, and ConfigError if no model family has its architecture.
    """
    record = identity.get("model")
    if not isinstance(record, dict):
        raise _wrong_record("it is no table")
    architecture = record.get("architecture", DecoderConfig.architecture)
    if not isinstance(architecture, str):
        raise _wrong_record(f"architecture: {architecture!r}")
    if (cls := config_class(architecture)) is None:
        rule, remedy = "is of no model family here", "name the plugin that has it with --plugins"
        raise ConfigError([Problem("model.architecture", architecture, rule, remedy)])
    fields = {key: value for key, value in record.items() if key != "architecture"}
    # A preset's values stand in for fields that are missing or wrong. Such fields are refused below.
    presets = (config for sizes in families.values() for config in sizes.values())
    preset = next(config for config in presets if type(config) is cls)
    if differing := record_of(preset).keys() ^ record.keys():
        raise _wrong_record(f"{min(differing)} is missing or unknown")
    config, problems = validate(cls, [asdict(preset), fields])
    if problems or (problems := config.problems("model")):
        raise _wrong_record(problems[0])
    if differing := flat(record_of(config)).keys() ^ flat(record).keys():
        raise _wrong_record(f"{min(differing)} is missing or unknown")
    return config


def _wrong_record(why: object) -> Damaged:
    return Damaged(f"its record of the model is wrong ({why})")


def check_vocabulary(tokenizer: Tokenizer, config: DecoderConfig, key: str, value: str) -> None:
    """Raise ConfigError about `key` if the tokenizer has more tokens than the model's embedding has rows."""
    if tokenizer.vocab_size > config.vocab_size:
        rule = f"has {tokenizer.vocab_size} tokens, and the model's vocab_size is {config.vocab_size}"
        raise ConfigError([Problem(key, value, rule, "use the tokenizer that the model was trained with")])


def export(found: VerifiedStep, tokenizer: Tokenizer, out: Path, dtype: str, key: str = "dtype") -> None:
    """Write the model of the verified checkpoint `found` to a new folder `out`, for transformers or vLLM.

    The folder holds safetensors with their index, config.json, generation_config.json and the tokenizer. The
    folder appears when all files are complete. Raises OSError if `out` exists or cannot be written. Raises
    ConfigError if transformers has no such model, and ConfigError about `key` if `dtype` cannot hold a
    weight.
    """
    config = decoder_of(found.state.identity)
    if problems := export_problems(config, "model"):
        raise ConfigError(problems)
    stored = found.index
    names = {theirs: _MODEL + name for theirs, name in hub_names(config.rows).items()}
    names = {theirs: name for theirs, name in sorted(names.items()) if name in stored}

    def read(some: Sequence[str]) -> dict[str, Tensor]:
        pieces = {name: _whole(stored[names[name]].shape, stored[names[name]].dtype) for name in some}
        read_tensors(found.folder, {names[name]: piece for name, piece in pieces.items()}, stored)
        for name, piece in pieces.items():
            most = piece.local.abs().max()
            if not most <= torch.finfo(getattr(torch, dtype)).max:  # also true for NaN
                rule = f"cannot hold {name}, which reaches {most:.3g}"
                raise ConfigError([Problem(key, dtype, rule, "use bfloat16")])
        return {name: piece.local for name, piece in pieces.items()}

    ends = {"eos_id": tokenizer.eos_id, "bos_id": tokenizer.bos_id}
    described = config_json(config, dtype=dtype, **ends)
    generation = {name: described[name] for name in ("bos_token_id", "eos_token_id")}
    if len(tokenizer.stop_ids) > 1:
        generation["eos_token_id"] = list(tokenizer.stop_ids)
    with new_folder(out) as folder:
        shapes = {theirs: stored[name].shape for theirs, name in names.items()}
        write_weights(folder, shapes, getattr(torch, dtype), read)
        tokenizer.save(folder)
        for file, content in ((CONFIG, described), ("generation_config.json", generation)):
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _whole(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Piece:
    """Return a new piece that covers a whole tensor of this shape. Its values are not set."""
    shape = torch.Size(shape)
    return Piece(local=torch.empty(shape, dtype=dtype), shape=shape, offsets=torch.Size([0] * len(shape)))


def export_last(folder: Path, checkpoint: CheckpointConfig, step: int, tokenizer: Tokenizer) -> None:
    """Export `step`, the last of the run in `folder`, to `folder`/hf, unless that is done already."""
    out, dtype = folder / HUB, checkpoint.export_dtype
    found = verify(Steps(folder / checkpoint.folder).path(step), World())
    source = {"step": step, "manifest": fingerprint(asdict(found.manifest)), "dtype": dtype}
    if out.exists():
        with suppress(OSError, ValueError):
            if json.loads((folder / SOURCE).read_bytes()) == source:
                return
        out.rename(free_folder(folder, "earlier") / HUB)
    export(found, tokenizer, out, dtype, "checkpoint.export_dtype")
    (folder / SOURCE).write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def import_(folder: Path, out: Path, tokenizer: Tokenizer | None) -> None:
    """Convert the Hugging Face model in `folder` to a checkpoint, step 0, in a new folder `out`.

    A new run can start with the weights. Raises ConfigError if our decoder cannot compute this model, or if a
    file is damaged.
    """
    config, problems = read_config(folder)
    if config is None or problems:
        raise ConfigError(problems)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config, "PATH", str(folder))
    pieces = {name: _whole(shape) for name, shape in config.shapes.items()}
    load_weights(folder, config, pieces, World(), "PATH")
    identity: dict[str, Any] = {"model": record_of(config)}
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
        pieces={_MODEL + name: piece for name, piece in pieces.items()},
        state=state,
        made={"imported_from": str(folder)},
    )
    with new_folder(out) as place:
        write_step(Steps(place), snapshot, World())
        if tokenizer is not None:
            (place / TOKENIZER).mkdir()
            tokenizer.save(place / TOKENIZER)
