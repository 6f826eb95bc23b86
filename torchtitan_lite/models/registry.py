"""From a family's name, a flavor and overrides to a `DecoderConfig`.

A flavor is a size, alone or with a suffix that names an attention backend: `8B`, `8B_flex`, `8B_varlen`.
Of the name `hf` it is a folder with a config.json of Hugging Face, as it stands or with such a suffix.
"""

import copy
import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from torchtitan_lite import registry
from torchtitan_lite.attention import BACKENDS, AttentionConfig
from torchtitan_lite.config.load import ConfigError, Problem, near
from torchtitan_lite.config.schema import alternatives, field_types
from torchtitan_lite.config.validation import check
from torchtitan_lite.models import huggingface, llama3, qwen3
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.models.presets import Family

# Attention knows nothing of the registry, so that it can be used without the rest.
for backend in BACKENDS:
    registry.attentions.register(backend)
registry.families.register(Family(name="llama3", presets=llama3.PRESETS))
registry.families.register(Family(name="qwen3", presets=qwen3.PRESETS))

AnyAttention = Annotated[AttentionConfig, registry.attentions]
"""An attention backend as a key of a configuration: any that is registered."""


def backends() -> list[type[AttentionConfig]]:
    """The attention backends that are registered."""
    return list(registry.attentions.members.values())


class _Families(Mapping[str, Mapping[str, DecoderConfig]]):
    def __getitem__(self, name: str) -> Mapping[str, DecoderConfig]:
        return registry.families.members[name].presets

    def __iter__(self) -> Iterator[str]:
        return iter(registry.families.members)

    def __len__(self) -> int:
        return len(registry.families.members)


families = _Families()
"""Presets by family and size, of all families that are registered."""
FOLDER = "hf"
"""The name of a model whose flavor is a folder with a config.json, which describes it."""

_SUFFIXES: dict[str, dict[str, Any]] = {
    "_flex": {"kind": "flex"},
    "_flex_flash": {"kind": "flex", "kernel_options": {"BACKEND": "FLASH"}},
    "_varlen": {"kind": "varlen"},
}
_EXPECTED = {int: ("a whole number", 128), float: ("a finite number", 1.0), bool: ("true or false", True)}

_Config = TypeVar("_Config")


def flavors(name: str) -> list[str]:
    """All flavors of a family: every size, alone and with every suffix."""
    return [size + suffix for size in families[name] for suffix in ("", *_SUFFIXES)]


def split_flavor(flavor: str) -> tuple[str, dict[str, Any] | None]:
    """The size of a flavor, and the attention table that its suffix stands for (None without a suffix)."""
    for suffix, attention in _SUFFIXES.items():
        if flavor.endswith(suffix):
            return flavor.removesuffix(suffix), copy.deepcopy(attention)
    return flavor, None


def resolve(
    name: str,
    flavor: str,
    attention: AttentionConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> DecoderConfig:
    """The config of a flavor with `overrides` of its fields; `attention`, if given, replaces the suffix's.

    Raises ConfigError with every problem: an unknown name or flavor, overrides that are unknown, of the wrong
    type or out of range.
    """
    config, problems = read(name, flavor, attention, overrides)
    if config is None or problems:
        raise ConfigError(problems)
    return config


def read(
    name: str,
    flavor: str,
    attention: AttentionConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> tuple[DecoderConfig | None, list[Problem]]:
    """As `resolve`, with the problems beside the config instead of raised.

    The flavor's value stands in for an override of the wrong type; there is no config without a flavor.
    """
    size, suffix = split_flavor(flavor)
    found, problems = _preset(name, size, flavor)
    # Overrides of what is not a preset are still read, with any preset under them, to report all at once.
    known, overrides = found is not None, overrides or {}
    preset = found or qwen3.PRESETS["debugmodel"]
    config, wrong = _override(preset, overrides, "model.overrides")
    config = replace(config, attention=attention or _backend(suffix or {"kind": "sdpa"}))
    unsound = [problem.key for problem in wrong]
    if not known:
        unsound += [
            f"model.overrides.{field.name}" for field in fields(preset) if field.name not in overrides
        ]
    sound = [found for found in config.problems("model.overrides") if not _rests_on(found, unsound)]
    return config if known else None, [*problems, *wrong, *sound]


def _preset(name: str, size: str, flavor: str) -> tuple[DecoderConfig | None, list[Problem]]:
    if name == FOLDER:
        return huggingface.read_config(Path(os.path.expanduser(size)))
    if name not in families:
        remedy = near(name, [*families, FOLDER])
        return None, [Problem("model.name", name, "is not a model family", remedy)]
    if size not in families[name]:
        rule = f"is not a flavor of {name}"
        return None, [Problem("model.flavor", flavor, rule, near(flavor, flavors(name)))]
    return families[name][size], []


def _rests_on(problem: Problem, unsound: list[str]) -> bool:
    """Whether `problem` is about one of the keys in `unsound`, or compares with one beside its own."""
    parent = problem.key.rpartition(".")[0]
    beside = [name for above, _, name in (key.rpartition(".") for key in unsound) if above == parent]
    compared = any(re.search(rf"\b{re.escape(name)} = ", problem.rule) for name in beside)
    return problem.key in unsound or compared


def meant_kind(flavor: str) -> str | None:
    """The attention that the suffix of a misspelt flavor was to choose; None for a flavor that exists."""
    known = [flavor for name in families for flavor in flavors(name)]
    close = [] if flavor in known else difflib.get_close_matches(flavor, known, n=1)
    _, attention = split_flavor(close[0]) if close else (flavor, None)
    return attention["kind"] if attention else None


def _backend(table: dict[str, Any]) -> AttentionConfig:
    return registry.attentions.members[table.pop("kind")](**table)


def _override(base: _Config, values: Mapping[str, Any], key: str) -> tuple[_Config, list[Problem]]:
    """`base` with the sound fields in `values`, and what is wrong with others: unknown, or mistyped."""
    hints = field_types(type(base))  # pyright: ignore[reportArgumentType]
    accepted: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, value in values.items():
        field = f"{key}.{name}"
        if name not in hints:
            rule = f"is not a field of {type(base).__name__}"
            problems.append(Problem(field, value, rule, near(name, hints)))
        elif name == "attention":
            problems.append(Problem(field, value, "has a table of its own", "set model.attention"))
        else:
            accepted[name], wrong = _typed(hints[name], getattr(base, name), value, field)
            problems += wrong
    return replace(base, **accepted), problems  # pyright: ignore[reportArgumentType]


def _typed(hint: Any, base: object, value: object, key: str) -> tuple[object, list[Problem]]:
    """`value` as the type of a field, and what is wrong if it is of none; a table is laid over `base`."""
    options = [kind for kind in alternatives(hint) if kind is not type(None)]
    wanted = options[0]
    if isinstance(wanted, type) and is_dataclass(wanted):
        if isinstance(value, Mapping):
            return _override(base if base is not None else wanted(), value, key)
        return base, [Problem(key, value, "is not a table", "use {factor = 1.0} for no scaling")]
    if len(options) > 1 or wanted not in _EXPECTED:  # a field of a plugin's config
        result, wrong = check(hint, value, key)
        return (base if wrong else result), wrong
    if value is None:
        return base, [Problem(key, value, "is what TOML cannot say", "leave the key out")]
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is wanted and (not isinstance(value, float) or math.isfinite(value)):
        return value, []
    kind, example = _EXPECTED[wanted]
    remedy = f"use {json.dumps(example if base is None else base)} or the like"
    if wanted is int and isinstance(value, float) and value.is_integer():
        remedy = f"write {int(value)}"
    return base, [Problem(key, value, f"is not {kind}", remedy)]


def config_class(architecture: str) -> type[DecoderConfig] | None:
    """The class of the decoders of an architecture; None if no family has it.

    Raises ConfigError if several classes have it.
    """
    configs = [config for sizes in families.values() for config in sizes.values()]
    found = {type(config) for config in configs if config.architecture == architecture}
    if len(found) > 1:
        rule = f"is that of {' and '.join(sorted(cls.__qualname__ for cls in found))}"
        raise ConfigError(
            [Problem("model.architecture", architecture, rule, "name one of their plugins alone")]
        )
    return next(iter(found), None)
