"""The weights of a run in the format of the Hugging Face Hub: in at its start, out of a saved step."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from torchtitan_lite.checkpoint.randomness import random_state
from torchtitan_lite.checkpoint.restore import Found, verify
from torchtitan_lite.checkpoint.save import Snapshot, write_step
from torchtitan_lite.checkpoint.state import State, fingerprint, flat
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.checkpoint.tensors import Piece, read_tensors
from torchtitan_lite.checkpoint.weights import Weights, new_folder, write_weights
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.data import Tokenizer, load_tokenizer
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
"""The folder of a run that holds its last model for Hugging Face."""
TOKENIZER = "tokenizer"
"""The folder of a run, or of imported steps, that holds the tokenizer's files."""
SOURCE = "hf_source.json"
"""File in a run's folder: what its own export is of."""
_MOST_LINES = 5
"""That are said of tensors."""


def check(folder: Path, config: DecoderConfig, ranks: World, key: str) -> None:
    """Raise ConfigError, on all ranks alike, where `folder` holds no whole model of `config`.

    About `key` where tensors are missing, too many or of other shapes, and where a file is not whole.
    """

    def act() -> None:
        found, problems = read_config(folder)
        if found is not None:
            problems += differences(found, config, str(folder / CONFIG))
        if problems:
            raise ConfigError(problems)
        with _opened(folder, config):
            pass

    ranks.together(lambda: _told_of(key, folder, act))


def load_weights(
    folder: Path, config: DecoderConfig, pieces: Mapping[str, Piece], ranks: World, key: str
) -> None:
    """Read the pieces of a model, by our names, from the safetensors in `folder`, box by box.

    Raises ConfigError as `check` does.
    """

    def act() -> None:
        with _opened(folder, config) as weights:
            weights.read({config.parameters.hub_name(name): piece for name, piece in pieces.items()})

    ranks.together(lambda: _told_of(key, folder, act))


def _told_of(key: str, folder: Path, act: Callable[[], None]) -> None:
    try:
        act()
    except Damaged as damage:
        rule, remedy = f"cannot be loaded: {damage}", "copy the model again, or choose the one that it is"
        raise ConfigError([Problem(key, str(folder), rule, remedy)]) from None


@contextmanager
def _opened(folder: Path, config: DecoderConfig) -> Iterator[Weights]:
    """The weights in `folder`, which are those of a model of `config`; else raises Damaged."""
    table = config.parameters
    shapes = {table.hub_name(name): shape for name, shape in config.shapes.items()}
    # Some files hold a tied head a second time.
    head, embedding = table.of_group("head").hub, table.of_group("embedding").hub
    ignored = [head] if head and head not in shapes else []
    with Weights(folder) as weights:
        if lines := weights.differences(shapes, ignored):
            more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
            raise Damaged("; ".join([*lines[:_MOST_LINES], *more]))
        for name in ignored:
            if name in weights.places and embedding and not weights.are_equal(name, embedding):
                raise Damaged(f"{name} is not {embedding}, and config.json says that they are one")
        yield weights


def tokenizer_fingerprint(folder: Path) -> str | None:
    """Of the tokenizer beside a model; None where there is none that can be used."""
    if not (folder / "tokenizer.json").is_file():
        return None
    with suppress(ConfigError):
        return load_tokenizer(str(folder)).fingerprint
    return None


def decoder_of(identity: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a step was saved of, on the default backend.

    Raises Damaged where it says of none, and ConfigError where no family here has its architecture.
    """
    own = {key.removeprefix(_MODEL): value for key, value in identity.items() if key.startswith(_MODEL)}
    values = _nested(own)
    architecture = values.pop("architecture", DecoderConfig.architecture)
    if not isinstance(architecture, str):
        raise Damaged("it says of no model (architecture)")
    if (cls := config_class(architecture)) is None:
        rule, remedy = "is of no model family here", "name the plugin that has it with --plugins"
        raise ConfigError([Problem("model.architecture", architecture, rule, remedy)])
    try:
        (config,) = _list_of(cls).validate_json(json.dumps([values]), strict=True)
    except ValidationError as error:
        what = error.errors()[0]
        raise Damaged(f"it says of no model ({'.'.join(map(str, what['loc'][1:]))}: {what['msg']})") from None
    if unknown := {key.removeprefix(_MODEL) for key in identity_of(config)} ^ own.keys():
        raise Damaged(f"it says of no model that is known here ({min(unknown)})")
    if problems := config.problems("model"):
        raise Damaged(f"it says of no model ({problems[0]})")
    return config


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted key, as nested tables."""
    tables: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        table = tables
        for parent in parents:
            table = table.setdefault(parent, {})
        table[name] = value
    return tables


def _list_of(cls: type[DecoderConfig]) -> TypeAdapter[list[DecoderConfig]]:
    # Of a list, since pydantic takes no configuration for a dataclass itself. Any class may be an attention
    # backend; none is read.
    wanted: Any = GenericAlias(list, (cls,))
    return TypeAdapter(wanted, config=ConfigDict(arbitrary_types_allowed=True))


def identity_of(config: DecoderConfig) -> dict[str, Any]:
    """What a step says of its decoder, which is all but the backend: that gives the same numbers."""
    fields = asdict(config)
    del fields["attention"]
    if config.architecture != DecoderConfig.architecture:
        fields["architecture"] = config.architecture
    return flat({"model": json.loads(json.dumps(fields))})


def check_vocabulary(tokenizer: Tokenizer, config: DecoderConfig, key: str, value: str) -> None:
    """Raise ConfigError about `key` where the model has no row for some token."""
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
    """Write the model of a verified step as a folder that transformers, vLLM and the like load.

    safetensors with their index, config.json, generation_config.json and the tokenizer; in `out`, which is
    there only when all of it is. Raises OSError where that cannot be written, or is there already, and
    ConfigError where transformers has no such model, and about `key` where `dtype` cannot hold a weight.
    """
    config = decoder_of(found.state.identity)
    if problems := export_problems(config, "model"):
        raise ConfigError(problems)
    ours = {
        name.removeprefix(_MODEL): stored for name, stored in found.index.items() if name.startswith(_MODEL)
    }
    names = {theirs: name for theirs, name in hub_names(config.rows).items() if name in ours}

    def read(some: Sequence[str]) -> dict[str, Tensor]:
        pieces = {}
        for name in some:
            stored = ours[names[name]]
            whole = torch.empty(stored.shape, dtype=stored.dtype)
            offsets = torch.Size([0] * len(stored.shape))
            pieces[_MODEL + names[name]] = Piece(local=whole, shape=stored.shape, offsets=offsets)
        read_tensors(found.folder, pieces, found.index)
        whole = {name: pieces[_MODEL + names[name]].local for name in some}
        for name, x in whole.items():
            if not x.abs().max() <= torch.finfo(dtype).max:  # nor NaN
                rule = f"cannot hold {name}, which reaches {x.abs().max():.3g}"
                raise ConfigError([Problem(key, str(dtype).removeprefix("torch."), rule, "use bfloat16")])
        return whole

    ends = {"eos_id": tokenizer.eos_id, "bos_id": tokenizer.bos_id}
    described = config_json(config, dtype=str(dtype).removeprefix("torch."), **ends)
    generation = {name: described[name] for name in ("bos_token_id", "eos_token_id")}
    if len(tokenizer.stop_ids) > 1:
        generation["eos_token_id"] = list(tokenizer.stop_ids)
    with new_folder(out) as folder:
        write_weights(folder, {name: ours[names[name]].shape for name in sorted(names)}, dtype, read)
        tokenizer.save(folder)
        for file, content in ((CONFIG, described), ("generation_config.json", generation)):
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export_last(folder: Path, checkpoint: CheckpointConfig, step: int, tokenizer: Tokenizer) -> None:
    """Write the model of the last step of the run in `folder` to hf in it, unless it is that already."""
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
    """Write the model in `folder` as step 0 in `out`, to start runs with: verified, and cut for any mesh.

    Raises ConfigError where it is no model that this decoder can be, or not whole.
    """
    config, problems = read_config(folder)
    if config is None or problems:
        raise ConfigError(problems)
    check(folder, config, World(), "PATH")
    if tokenizer is not None:
        check_vocabulary(tokenizer, config, "PATH", str(folder))
    pieces = {
        name: Piece(local=torch.empty(shape), shape=shape, offsets=torch.Size([0] * len(shape)))
        for name, shape in config.shapes.items()
    }
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
        random=random_state(),
        made={"imported_from": str(folder)},
    )
    with new_folder(out) as place:
        write_step(Steps(place), snapshot, World())
        if tokenizer is not None:
            (place / TOKENIZER).mkdir()
            tokenizer.save(place / TOKENIZER)
