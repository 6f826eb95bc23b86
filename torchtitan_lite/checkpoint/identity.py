"""Compare the identity of a run with the identity that a step holds, in the words of the configuration."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torchtitan_lite.checkpoint.state import State, changed, flat
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.config.problem import literal

_ALLOW = "use --checkpoint.allow-changes"
_MODEL, _OVERRIDES = "model.", "model.overrides."
_DATA, _TOKENIZER = "data.fingerprint", "data.tokenizer_fingerprint"


def check_same(
    state: State,
    identity: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    allow_changes: bool,
    keys: Collection[str] | None = None,
    tokenizer: Path | None = None,
) -> list[Problem]:
    """Return a problem for each difference between a run and the run that saved `state`.

    `identity` and `config` are those of the run. The problems name settings of `config`. If `keys` are given,
    only these keys of the identity are compared. `tokenizer` is a copy of the step's tokenizer, if there is
    one. Raises ConfigError with the problems unless `allow_changes`.
    """
    saved = state.identity
    if keys is not None:
        saved, identity = ({key: one.get(key) for key in keys} for one in (saved, identity))
    found = _Comparison(saved, identity, flat(state.config), flat(config), state.step, tokenizer).problems()
    if found and not allow_changes:
        raise ConfigError(found)
    return found


class _Comparison:
    """The differences between two identities, and the settings of both runs by dotted key."""

    def __init__(
        self,
        saved: Mapping[str, Any],
        identity: Mapping[str, Any],
        old: Mapping[str, Any],
        new: Mapping[str, Any],
        step: int,
        tokenizer: Path | None,
    ) -> None:
        self.differences = changed(saved, identity)
        self.old, self.new, self.step, self.tokenizer = old, new, step, tokenizer

    def problems(self) -> list[Problem]:
        """Return a problem for each setting that differs, or whose meaning differs."""
        others = {
            key: pair
            for key, pair in self.differences.items()
            if not key.startswith(_MODEL) and key not in (_DATA, _TOKENIZER)
        }
        if "training.global_batch_size" in others:
            others |= self._changed(["training.local_batch_size"])
        return [*self._of_model(), *self._of_data(), *map(self._was, others, others.values())]

    def _was(self, key: str, pair: tuple[Any, Any]) -> Problem:
        old, new = pair
        remedy = "set it back" if old is None or isinstance(old, dict) else f"use {shown(old)}"
        return Problem(
            key, new, f"was {shown(old)} when step {self.step} was saved", f"{remedy}, or {_ALLOW}"
        )

    def _changed(self, keys: list[str]) -> dict[str, tuple[Any, Any]]:
        """Return the old and new value of each setting that differs, if the step has its old value."""
        pairs = {key: (self.old[key], self.new.get(key)) for key in keys if key in self.old}
        return {key: (old, new) for key, (old, new) in pairs.items() if old != new}

    def _of_model(self) -> list[Problem]:
        """Return a problem for each field of the model that differs, or for the flavor that explains them."""
        fields = {
            key.removeprefix(_MODEL): pair for key, pair in self.differences.items() if key.startswith(_MODEL)
        }
        overridden = {name for name in fields if {_OVERRIDES + name} & (self.old.keys() | self.new.keys())}
        named = self._changed(["model.name", "model.flavor"]) if fields.keys() - overridden else {}
        if named:
            fields = {name: pair for name, pair in fields.items() if name in overridden}
        found = [self._was(key, pair) for key, pair in named.items()]
        if "architecture" in fields:
            del fields["architecture"]
            rule = f"is of another architecture than when step {self.step} was saved"
            name = self.new.get("model.name")
            found.append(Problem("model.name", name, rule, "name a model of that architecture"))
        return [*found, *(self._was(_OVERRIDES + name, pair) for name, pair in fields.items())]

    def _of_data(self) -> list[Problem]:
        """Return a problem for each setting that explains other fingerprints, or else one for the text."""
        keys = [
            key for key in self.new if key.startswith(("data.", "tokenizers.")) and key != "data.cache_dir"
        ]
        if _DATA not in self.differences:
            keys = [key for key in keys if key == "data.tokenizer" or key.startswith("tokenizers.")]
        if not {_DATA, _TOKENIZER} & self.differences.keys():
            return []
        if named := self._changed(keys):
            return [self._was(key, pair) for key, pair in named.items()]
        if _TOKENIZER in self.differences:
            rule = f"is not the tokenizer of step {self.step}"
            remedy = f"use {self.tokenizer}" if self.tokenizer else "name that one"
            return [Problem("data.tokenizer", self.new.get("data.tokenizer"), rule, f"{remedy}, or {_ALLOW}")]
        key = "data.path" if "data.path" in self.new else "data.dataset"
        rule = f"gives other tokens than when step {self.step} was saved"
        return [Problem(key, self.new.get(key), rule, f"put the text back, or {_ALLOW}")]


def shown(value: object) -> str:
    """Return a setting as a message shows it."""
    return "unset" if value is None else literal(value)
