"""Turn the name of a model family, a flavor and overrides into a `DecoderConfig`.

A flavor is a size, with or without a suffix that names an attention backend: `8B`, `8B_flex`, `8B_varlen`.
With the name `hf`, the flavor is a folder with a config.json of Hugging Face. It may have a suffix too.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from torchtitan_lite import registry
from torchtitan_lite.attention import BACKENDS, AttentionConfig
from torchtitan_lite.config.load import ConfigError, Problem, last_said, near
from torchtitan_lite.config.problem import of_sound_keys
from torchtitan_lite.config.validation import holder, overlay, validate
from torchtitan_lite.models import huggingface, llama3, qwen3
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.models.presets import Family

# The attention package does not import the registry, so that it can be used alone.
for backend in BACKENDS:
    registry.attentions.register(backend)
registry.families.register(Family(name="llama3", presets=llama3.PRESETS))
registry.families.register(Family(name="qwen3", presets=qwen3.PRESETS))

AnyAttention = Annotated[AttentionConfig, registry.attentions]
"""The annotation of a configuration key that takes any registered attention backend."""


class _Families(Mapping[str, Mapping[str, DecoderConfig]]):
    def __getitem__(self, name: str) -> Mapping[str, DecoderConfig]:
        return registry.families.members[name].presets

    def __iter__(self) -> Iterator[str]:
        return iter(registry.families.members)

    def __len__(self) -> int:
        return len(registry.families.members)


families = _Families()
"""The presets of all registered model families: the name of a family, then a size, then the config."""
DEFAULT_FAMILY = "qwen3"
"""The model family of a configuration that names no family."""
FOLDER = "hf"
"""The name of a model whose flavor is a folder with a config.json."""

_OVERRIDES = "model.overrides"
_SDPA: dict[str, Any] = {"kind": "sdpa"}
_SUFFIXES: dict[str, dict[str, Any]] = {
    "_flex": {"kind": "flex"},
    "_flex_flash": {"kind": "flex", "kernel_options": {"BACKEND": "FLASH"}},
    "_varlen": {"kind": "varlen"},
}


def flavors(name: str) -> list[str]:
    """Return all flavors of a family: every size, without a suffix and with every suffix."""
    return [size + suffix for size in families[name] for suffix in ("", *_SUFFIXES)]


def flavors_in_words() -> list[str]:
    """Return a sentence on the sizes of each family, and a sentence on the suffixes that a size may have."""
    sizes = [f"{name}: {', '.join(presets)}." for name, presets in families.items()]
    *others, last = [f"<size>{suffix}" for suffix in _SUFFIXES]
    return [*sizes, f"Each size also comes as {', '.join(others)} and {last}."]


def class_of_flavor(name: str, flavor: str) -> type[DecoderConfig]:
    """Return the class of a flavor's config, or `DecoderConfig` if the family or the flavor is unknown."""
    preset = families.get(name, {}).get(split_flavor(flavor)[0])
    return DecoderConfig if preset is None else type(preset)


def split_flavor(flavor: str) -> tuple[str, dict[str, Any] | None]:
    """Return the size in a flavor, and the attention table that its suffix means (None without a suffix)."""
    for suffix, attention in _SUFFIXES.items():
        if flavor.endswith(suffix):
            return flavor.removesuffix(suffix), copy.deepcopy(attention)
    return flavor, None


def flavors_like(flavor: str) -> list[str]:
    """Return the other flavors of the same size. First come those that the suffix of `flavor` extends."""
    size = split_flavor(flavor)[0]
    suffix = flavor.removeprefix(size)
    others = {"", *_SUFFIXES} - {suffix}
    return [size + other for other in sorted(others, key=lambda one: (not suffix.startswith(one), -len(one)))]


def own_attention(flavor: str) -> AttentionConfig:
    """Return the attention that the suffix of a flavor means, or SDPA without a suffix."""
    table = dict(split_flavor(flavor)[1] or _SDPA)
    return registry.attentions.members[table.pop("kind")](**table)


def expand_model(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write out the short forms in `model`. Return new layers. The given `layers` are changed too.

    - SDPA comes below all layers. A flavor's suffix becomes a `model.attention` below the flavor's layer, and
      drops the `model.attention` of earlier layers.
    - If the flavor does not exist, an attention table without `kind` has no known kind, and is emptied.
    - A null for `rope_scaling` becomes a scaling by 1, which undoes the flavor's scaling.
    """
    for layer in layers:
        overrides = holder(layer, ("model", "overrides", "rope_scaling"))
        if overrides and overrides["rope_scaling"] is None:
            overrides["rope_scaling"] = {"factor": 1.0}
    name, flavor = last_said(layers, "model.name"), last_said(layers, "model.flavor")
    has_kind = last_said(layers, "model.attention.kind") is not None
    if not has_kind and flavor is not None and not _exists(name or DEFAULT_FAMILY, flavor):
        for model in (holder(layer, ("model", "attention")) for layer in layers):
            model["attention"] = {}
        return [{"model": {"attention": _SDPA}}, *layers]
    expanded: list[dict[str, Any]] = [{"model": {"attention": _SDPA}}]
    for layer in layers:
        said = last_said([layer], "model.flavor")
        if isinstance(said, str) and (own := split_flavor(said)[1]):
            expanded += [{"model": {"attention": None}}, {"model": {"attention": own}}]
        expanded.append(layer)
    return expanded


def _exists(name: object, flavor: object) -> bool:
    """Return True if the flavor's kind of attention is known. Validation refuses a non-string flavor."""
    if name == FOLDER or not isinstance(flavor, str) or split_flavor(flavor)[1] is not None:
        return True
    return isinstance(name, str) and flavor in families.get(name, {})


def true_flavor(flavor: str, attention: AttentionConfig) -> str:
    """Return `flavor`, without its suffix if `attention` is not the attention that the suffix means."""
    size, own = split_flavor(flavor)
    chosen = {name: getattr(attention, name, None) for name in own or {}}
    return flavor if own is None or overlay(None, chosen, own) == chosen else size


def resolve(
    name: str,
    flavor: str,
    attention: AttentionConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> DecoderConfig:
    """Return the config of a flavor with `overrides` of its fields. By default `attention` is the flavor's.

    Raises ConfigError with every problem: an unknown name or flavor, or overrides that are unknown, of the
    wrong type or out of range.
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
    """Return the config that `resolve` returns, and all problems. The config is None for an unknown flavor.

    A wrong override is ignored, so the config has the flavor's value.
    """
    preset, problems = _preset(name, split_flavor(flavor)[0], flavor)
    # If the flavor is unknown, the overrides are still checked, on another preset.
    base, overrides = preset or qwen3.PRESETS["debugmodel"], dict(overrides or {})
    if "attention" in overrides:
        value, remedy = overrides.pop("attention"), "set model.attention"
        problems.append(Problem(f"{_OVERRIDES}.attention", value, "has a table of its own", remedy))
    config, wrong = validate(type(base), [asdict(base), overrides], _OVERRIDES) if overrides else (base, [])
    if preset is None:
        return None, [*problems, *wrong]
    config = replace(config, attention=attention or own_attention(flavor))
    return config, [*problems, *wrong, *of_sound_keys(config.problems(_OVERRIDES), wrong)]


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


def config_class(architecture: str) -> type[DecoderConfig] | None:
    """Return the config class of the decoders with this `architecture`, or None if no family has any.

    Raises ConfigError if several classes have the architecture.
    """
    configs = [config for sizes in families.values() for config in sizes.values()]
    found = {type(config) for config in configs if config.architecture == architecture}
    if len(found) > 1:
        rule = f"is that of {' and '.join(sorted(cls.__qualname__ for cls in found))}"
        raise ConfigError(
            [Problem("model.architecture", architecture, rule, "name one of their plugins alone")]
        )
    return next(iter(found), None)
