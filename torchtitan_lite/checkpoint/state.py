"""state.json of a step: the progress and the identity of the run."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from torchtitan_lite.checkpoint.manifest import Damaged

STATE = "state.json"

_Count = Annotated[int, Field(ge=0, le=2**62)]


@dataclass(frozen=True, kw_only=True)
class State:
    """The progress of a run, with the counts of all ranks, and the identity of the run."""

    step: _Count
    """The number of finished steps."""
    n_tokens_seen: _Count
    consumed_samples: _Count
    """The number of samples taken from the global order, which is the same for any number of ranks."""
    validated: int
    """The step of the last validation, or -1 before the first validation."""
    model_only: bool
    """True if the step holds only the weights: other runs can load them, but no run can resume from it."""
    identity: dict[str, Any]
    """The values that a resumed run must share: the table "model", tokenizer, data, seed and batch."""
    schedule: dict[str, Any]
    """The learning-rate schedule, with its resolved numbers of steps."""
    config: dict[str, Any]
    """The whole configuration, by section."""


def read_state(text: bytes) -> State:
    """Return the state in the JSON `text`. Raises Damaged if the JSON is not a valid state."""
    try:
        return TypeAdapter(State).validate_json(text, strict=True)
    except ValidationError as error:
        raise Damaged(f"{STATE} is no state of a run ({error.error_count()} values are wrong)") from None


def changed(
    saved: Mapping[str, Any], now: Mapping[str, Any], but: tuple[str, ...] = ()
) -> dict[str, tuple[Any, Any]]:
    """Return the old and new value of each dotted key that differs, except keys with a prefix in `but`."""
    old, new = flat(saved), flat(now)
    pairs = {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if not key.startswith(but)}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by dotted key, such as "training.steps"."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def fingerprint(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the JSON of `content`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
