"""The problems of a model's attention: what cannot run, with remedies that have been tried."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

import torch

from torchtitan_lite import registry
from torchtitan_lite.attention import AttentionConfig, Flex, Refusal, refusals
from torchtitan_lite.config.problem import Problem, either, literal
from torchtitan_lite.config.schema import field_types
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.models.registry import flavors_like, own_attention, split_flavor


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The conditions of a run under which its attention must work."""

    decoder: DecoderConfig | None
    """The model, or None if it is not known. Then only the options of the attention are checked."""
    device: str
    """The device: "cpu" or "cuda"."""
    dtype: torch.dtype
    deterministic: bool = False
    is_compiled: bool = False

    def refusals(self, attention: AttentionConfig) -> list[Refusal]:
        """Return the reasons why `attention` cannot run under these conditions."""
        if self.decoder is None:
            found = attention.option_refusals(self.device)
        else:
            found = refusals(
                attention,
                device=self.device,
                dtype=self.dtype,
                head_dim=self.decoder.head_dim,
                n_heads=self.decoder.n_heads,
                n_kv_heads=self.decoder.n_kv_heads,
                sliding_window=self.decoder.sliding_window,
                deterministic=self.deterministic,
            )
        is_refused = any(refusal.field == "block_size" for refusal in found)
        is_compiled = self.is_compiled and self.device == "cuda" and not is_refused
        if is_compiled and isinstance(attention, Flex) and attention.autotuned:
            rule, remedy = "finds no kernel within compiled blocks", "use 128, or set compile.enable = false"
            found = [*found, Refusal("block_size", attention.block_size, rule, remedy)]
        return found


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The keys of a command that decide whether its attention can run."""

    attention: str
    """The section of the attention."""
    conditions: Mapping[str, str]
    """The keys of the conditions, by the `field` of a Refusal. A field without a key cannot be changed."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """The dtypes that the key of the dtype takes."""


KEYS_OF_A_RUN = Keys(
    attention="model.attention",
    conditions={
        "device": "job.device",
        "dtype": "training.mixed_precision_param",
        "deterministic": "debug.deterministic",
        **{name: f"model.overrides.{name}" for name in ("head_dim", "n_heads", "sliding_window")},
    },
)
KEYS_OF_A_COMMAND = Keys(attention="attention", conditions={"device": "device", "dtype": "dtype"})
"""The keys of the commands that use a trained model."""
_FLAVOR = "model.flavor"


def attention_problems(
    attention: AttentionConfig, conditions: Conditions, keys: Keys, flavor: str = ""
) -> list[Problem]:
    """Return the problems of `attention` under `conditions`, each with remedies that were tried.

    If the suffix of `flavor` has chosen the refused option, the remedy names another flavor.
    """
    trial = _Trial(attention, conditions, keys, flavor)
    return [trial.problem(refusal) for refusal in trial.found]


class _Trial:
    """The refusals of an attention, and tries of other values and of other attentions."""

    def __init__(self, attention: AttentionConfig, conditions: Conditions, keys: Keys, flavor: str) -> None:
        self.attention, self.conditions, self.keys, self.flavor = attention, conditions, keys, flavor
        self.found = conditions.refusals(attention)

    def problem(self, refusal: Refusal) -> Problem:
        """Return the problem of a refusal."""
        field, value, rule, remedy, _ = refusal
        key = self.keys.conditions.get(field)
        others = self._others(field)
        if key is not None:
            remedies = [*self._values(refusal), *others]
        elif not hasattr(self.attention, field.partition(".")[0]):  # a size of a model that cannot be changed
            key, rule = f"{self.keys.attention}.kind", f"does not fit: {field} = {literal(value)} {rule}"
            value, remedies = self.attention.kind, others
        else:
            key = f"{self.keys.attention}.{field}"
            remedies = others if self._is_of_flavor(field) else self._values(refusal)
            remedies = [remedy] if remedy and not refusal.choices else remedies or others
        own = f"set {key} = "
        words = [f"use {words.removeprefix(own)}" if words.startswith(own) else words for words in remedies]
        reads = (self.keys.conditions["device"], self.keys.attention)
        reads += ("model.overrides",) * key.startswith("model.overrides")
        return Problem(key, value, rule, ", or ".join(words) or remedy, reads)

    def _helps(self, other: AttentionConfig, field: str) -> bool:
        """Return True if `other` is not refused for `field`, nor for anything that is not refused already."""
        left = {refusal.field for refusal in self.found} - {field}
        return all(refusal.field in left for refusal in self.conditions.refusals(other))

    def _values(self, refusal: Refusal) -> list[str]:
        """Return the remedy that names other values of the refused field, if any value helps."""
        field, choices = refusal.field, refusal.choices
        if field == "dtype":
            # The name of a dtype is shown without quotes, as torch shows it.
            return [f"use {dtype}" for dtype in choices if dtype in self.keys.dtypes][:1]
        if field not in self.keys.conditions:
            choices = [value for value in choices if self._helps(_with(self.attention, field, value), field)]
        return [f"use {either(map(literal, choices))}"] if choices else []

    def _others(self, field: str) -> list[str]:
        """Return the remedy that names the most similar attention that helps, if there is one."""
        found = self._flavors() if self.flavor else iter(())
        candidates = itertools.chain(found, () if self._is_flavored else self._settings())
        helping = (words for words, other in candidates if self._helps(other, field))
        return list(itertools.islice(helping, 1))

    @property
    def _is_flavored(self) -> bool:
        """True if the suffix of the flavor has chosen the whole attention."""
        return bool(split_flavor(self.flavor)[1]) and self.attention == own_attention(self.flavor)

    def _is_of_flavor(self, field: str) -> bool:
        """Return True if the suffix of the flavor has chosen the value of an option, or a part of a table."""
        own = split_flavor(self.flavor)[1] or {}
        if field not in own or own["kind"] != self.attention.kind:
            return False
        return _has(getattr(self.attention, field), own[field])

    def _flavors(self) -> Iterator[tuple[str, AttentionConfig]]:
        """Yield the other flavors of the same size, each with the attention that the flavor would lead to."""
        own = own_attention(self.flavor)
        for flavor in flavors_like(self.flavor) if type(self.attention) is type(own) else ():
            other = own_attention(flavor)
            if type(other) is type(own):
                other = _moved(self.attention, own, other)
            elif self.attention != own:
                continue  # the options that the user has set belong to the kind of the attention
            yield f"set {_FLAVOR} = {literal(flavor)}", other

    def _settings(self) -> Iterator[tuple[str, AttentionConfig]]:
        """Yield attentions with another option, then attentions of another kind."""
        section, cls = self.keys.attention, type(self.attention)
        default, changed = cls(), []
        for name, annotation in field_types(cls).items():
            now = getattr(self.attention, name)
            choices = get_args(annotation) if get_origin(annotation) is Literal else ()
            if now != getattr(default, name):
                changed.append(f"{section}.{name}")
            for value in (getattr(default, name), *choices):
                if value != now:
                    yield f"set {section}.{name} = {literal(value)}", _with(self.attention, name, value)
        without = f" and leave out {' and '.join(changed)}" if changed else ""
        for kind, other in registry.attentions.members.items():
            if other is not cls:
                yield f"set {section}.kind = {literal(kind)}{without}", other()


def _with(attention: Any, field: str, value: object) -> Any:
    """Return `attention` with another value of a field, which may be "table.key"."""
    name, _, key = field.partition(".")
    return replace(attention, **{name: {**getattr(attention, name), key: value} if key else value})


def _moved(attention: Any, own: Any, other: Any) -> Any:
    """Return `attention`, which was made by changes to `own`, with the same changes to `other`."""
    changes = {}
    for name in field_types(type(own)):
        now, before, after = (getattr(one, name) for one in (attention, own, other))
        if isinstance(now, dict):
            changes[name] = {
                **after,
                **{key: value for key, value in now.items() if before.get(key) != value},
            }
        else:
            changes[name] = after if now == before else now
    return replace(attention, **changes)


def _has(value: object, part: object) -> bool:
    """Return True if `value` is `part`, or is a table that has all of the table `part`."""
    if isinstance(value, dict) and isinstance(part, dict):
        return value.items() >= part.items()
    return value == part
