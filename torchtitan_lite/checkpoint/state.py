"""state.json of a step: the progress of the run, and its identity."""

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
    """The progress of a run, over all ranks, and its identity."""

    step: _Count
    """Finished steps."""
    n_tokens_seen: _Count
    consumed_samples: _Count
    """Samples taken from the global order: the position in the data, which no number of ranks changes."""
    validated: int
    """Step of the last validation; -1 before the first validation."""
    model_only: bool
    """Whether the step holds only the weights: other runs can load them, but no run can resume from it."""
    identity: dict[str, Any]
    """Values that a resumed run must have too: the table "model", and tokenizer, data, seed and batch."""
    schedule: dict[str, Any]
    """The learning-rate schedule, with its resolved numbers of steps."""
    config: dict[str, Any]
    """The whole configuration, by section."""


def read_state(text: bytes) -> State:
    """Return the state in the JSON `text`; raises Damaged if it holds anything else."""
    try:
        return TypeAdapter(State).validate_json(text, strict=True)
    except ValidationError as error:
        raise Damaged(f"{STATE} is no state of a run ({error.error_count()} values are wrong)") from None


def changed(
    saved: Mapping[str, Any], now: Mapping[str, Any], but: tuple[str, ...] = ()
) -> dict[str, tuple[Any, Any]]:
    """Return the old and new value of each dotted key that differs and starts with none of `but`."""
    old, new = flat(saved), flat(now)
    pairs = {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if not key.startswith(but)}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested tables by dotted key."""
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
