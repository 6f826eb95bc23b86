"""From a family's name, a flavor and overrides to a `DecoderConfig`.

A flavor is a size, alone or with a suffix that names an attention backend: `8B`, `8B_flex`, `8B_varlen`. With
the name `hf`, the flavor is a folder that holds a config.json of Hugging Face, with or without such a suffix.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from torchtitan_lite import registry
from torchtitan_lite.attention import BACKENDS, AttentionConfig, Flex, Refusal, refusals
from torchtitan_lite.config.load import ConfigError, Problem, last_said, near
from torchtitan_lite.config.problem import of_sound_keys
from torchtitan_lite.config.validation import holder, overlay, validate
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


class _Families(Mapping[str, Mapping[str, DecoderConfig]]):
    def __getitem__(self, name: str) -> Mapping[str, DecoderConfig]:
        return registry.families.members[name].presets

    def __iter__(self) -> Iterator[str]:
        return iter(registry.families.members)

    def __len__(self) -> int:
        return len(registry.families.members)


families = _Families()
"""Presets by family and size, of all families that are registered."""
DEFAULT_FAMILY = "qwen3"
"""The family of a configuration that names none."""
FOLDER = "hf"
"""The name of a model whose flavor is a folder with a config.json."""

_OVERRIDES = "model.overrides"
_REFUSED_KEYS = {
    "device": "job.device",
    "dtype": "training.mixed_precision_param",
    "deterministic": "debug.deterministic",
    **{name: f"{_OVERRIDES}.{name}" for name in ("head_dim", "n_heads", "sliding_window")},
}
"""The keys of the values that an attention backend is checked against, other than its own options."""
_SDPA: dict[str, Any] = {"kind": "sdpa"}
_SUFFIXES: dict[str, dict[str, Any]] = {
    "_flex": {"kind": "flex"},
    "_flex_flash": {"kind": "flex", "kernel_options": {"BACKEND": "FLASH"}},
    "_varlen": {"kind": "varlen"},
}


def flavors(name: str) -> list[str]:
    """All flavors of a family: every size, alone and with every suffix."""
    return [size + suffix for size in families[name] for suffix in ("", *_SUFFIXES)]


def split_flavor(flavor: str) -> tuple[str, dict[str, Any] | None]:
    """The size of a flavor, and the attention table that its suffix stands for (None without a suffix)."""
    for suffix, attention in _SUFFIXES.items():
        if flavor.endswith(suffix):
            return flavor.removesuffix(suffix), copy.deepcopy(attention)
    return flavor, None


def own_attention(flavor: str) -> AttentionConfig:
    """The attention of a flavor: that of its suffix, otherwise SDPA."""
    table = dict(split_flavor(flavor)[1] or _SDPA)
    return registry.attentions.members[table.pop("kind")](**table)


def expand_model(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`layers` of a configuration, changed in place, with what the short forms in `model` stand for.

    - The attention of a flavor comes below what the same layer says of `model.attention`. A flavor with a
      suffix takes back what earlier layers say of the attention.
    - If the flavor does not exist, nobody knows the kind of an attention table without `kind`, so such tables
      are emptied.
    - A null for `rope_scaling` becomes a scaling by 1, which undoes that of the flavor.
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
        return layers
    expanded: list[dict[str, Any]] = [{"model": {"attention": _SDPA}}]
    for layer in layers:
        said = last_said([layer], "model.flavor")
        if isinstance(said, str) and (own := split_flavor(said)[1]):
            expanded += [{"model": {"attention": None}}, {"model": {"attention": own}}]
        expanded.append(layer)
    return expanded


def _exists(name: object, flavor: object) -> bool:
    """Whether the kind of the flavor's own attention is known. Validation refuses what is no text."""
    if name == FOLDER or not isinstance(flavor, str) or split_flavor(flavor)[1] is not None:
        return True
    return isinstance(name, str) and flavor in families.get(name, {})


def attention_problems(
    attention: AttentionConfig,
    decoder: DecoderConfig | None,
    *,
    device: str,
    dtype: torch.dtype,
    deterministic: bool,
    is_compiled: bool,
) -> list[Problem]:
    """The problems of a run's attention: `attention_refusals`, and a kernel that no compiled block has."""
    found = []
    options: dict[str, Any] = {"device": device, "dtype": dtype, "deterministic": deterministic}
    for name, value, rule, remedy in attention_refusals(attention, decoder, **options):
        key = _REFUSED_KEYS.get(name, f"model.attention.{name}")
        reads = ("job.device", "model.attention", *[_OVERRIDES] * key.startswith(_OVERRIDES))
        found.append(Problem(key, value, rule, remedy, reads))
    if is_compiled and device == "cuda" and isinstance(attention, Flex) and attention.autotuned:
        key, rule = "model.attention.block_size", "finds no kernel within compiled blocks"
        remedy, reads = "use a multiple of 128, or compile.enable = false", ("job.device", "compile.enable")
        found.append(Problem(key, attention.block_size, rule, remedy, reads))
    return found


def attention_refusals(
    attention: AttentionConfig,
    decoder: DecoderConfig | None,
    *,
    device: str,
    dtype: torch.dtype,
    deterministic: bool = False,
) -> list[Refusal]:
    """Why `attention` cannot run in `decoder` on "cpu" or "cuda"; None: only its options are judged."""
    if decoder is None:
        return attention.option_refusals(device)
    return refusals(
        attention,
        device=device,
        dtype=dtype,
        head_dim=decoder.head_dim,
        n_heads=decoder.n_heads,
        n_kv_heads=decoder.n_kv_heads,
        sliding_window=decoder.sliding_window,
        deterministic=deterministic,
    )


def true_flavor(flavor: str, attention: AttentionConfig) -> str:
    """`flavor` without its suffix if that does not stand for `attention`, so that the name is never wrong."""
    size, own = split_flavor(flavor)
    chosen = {name: getattr(attention, name, None) for name in own or {}}
    return flavor if own is None or overlay(None, chosen, own) == chosen else size


def resolve(
    name: str,
    flavor: str,
    attention: AttentionConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> DecoderConfig:
    """The config of a flavor with `overrides` of its fields; None as `attention` is the flavor's own.

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
    """The config as `resolve` returns it, or None without such a flavor, and all problems.

    The flavor's value stands in for a wrong override.
    """
    preset, problems = _preset(name, split_flavor(flavor)[0], flavor)
    # Any preset shows what is wrong with the overrides themselves.
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
