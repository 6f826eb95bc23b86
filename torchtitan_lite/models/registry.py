"""From a family's name, a flavor and overrides to a `DecoderConfig`.

A flavor is a size, alone or with a suffix that names an attention backend: `8B`, `8B_flex`, `8B_varlen`.
"""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import is_dataclass, replace
from typing import Any, TypeVar, get_args, get_type_hints

from torchtitan_lite.attention import AttentionConfig, Flex, Sdpa, Varlen
from torchtitan_lite.config.load import ConfigError, Problem, near
from torchtitan_lite.models import llama3, qwen3
from torchtitan_lite.models.decoder import DecoderConfig

families: dict[str, dict[str, DecoderConfig]] = {"llama3": llama3.PRESETS, "qwen3": qwen3.PRESETS}
"""Presets by family and size."""

_SUFFIXES: dict[str, dict[str, Any]] = {
    "_flex": {"kind": "flex"},
    "_flex_flash": {"kind": "flex", "kernel_options": {"BACKEND": "FLASH"}},
    "_varlen": {"kind": "varlen"},
}
_BACKENDS = {"sdpa": Sdpa, "flex": Flex, "varlen": Varlen}

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
    size, suffix = split_flavor(flavor)
    problems = []
    if name not in families:
        problems.append(Problem("model.name", name, "is not a model family", near(name, families)))
    elif size not in families[name]:
        rule = f"is not a flavor of {name}"
        problems.append(Problem("model.flavor", flavor, rule, near(flavor, flavors(name))))
    # Overrides of what is not a preset are still read, with any preset under them, to report all at once.
    preset = qwen3.PRESETS["debugmodel"] if problems else families[name][size]
    config, wrong = _override(preset, overrides or {}, "model.overrides")
    problems += wrong
    if not problems:
        config = replace(config, attention=attention or _backend(suffix or {"kind": "sdpa"}))
        problems = config.problems("model.overrides")
    if problems:
        raise ConfigError(problems)
    return config


def _backend(table: dict[str, Any]) -> AttentionConfig:
    return _BACKENDS[table.pop("kind")](**table)


def _override(base: _Config, values: Mapping[str, Any], key: str) -> tuple[_Config, list[Problem]]:
    """`base` with the fields in `values`, and what is wrong with those: unknown, or of another type."""
    hints = get_type_hints(type(base))
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
    if problems:
        return base, problems
    return replace(base, **accepted), []  # pyright: ignore[reportArgumentType]


def _typed(hint: Any, base: object, value: object, key: str) -> tuple[object, list[Problem]]:
    """`value` as the type of a field, and what is wrong if it is of none; a table is laid over `base`."""
    wanted = next(kind for kind in get_args(hint) or (hint,) if kind is not type(None))
    if isinstance(wanted, type) and is_dataclass(wanted):
        if isinstance(value, Mapping):
            return _override(base if base is not None else wanted(), value, key)
        return base, [Problem(key, value, "is not a table", "use {factor = 1.0} for no scaling")]
    if value is None:
        return base, [Problem(key, value, "is what TOML cannot say", "leave the key out")]
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is wanted and (not isinstance(value, float) or math.isfinite(value)):
        return value, []
    kind, example = _EXPECTED[wanted]
    remedy = f"use {json.dumps(example if base is None else base)} or the like"
    return base, [Problem(key, value, f"is not {kind}", remedy)]
