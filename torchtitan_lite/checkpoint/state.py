"""What is saved beside the tensors: how far the run is, and of which model and data."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from torchtitan_lite.checkpoint.manifest import Damaged
from torchtitan_lite.config.load import Problem
from torchtitan_lite.config.problem import literal

STATE = "state.json"
RANDOM = "random-{rank}.json"


_Count = Annotated[int, Field(ge=0, le=2**62)]


@dataclass(frozen=True, kw_only=True)
class State:
    """Where a run stands, all ranks together."""

    step: _Count
    """Steps done."""
    n_tokens_seen: _Count
    consumed_samples: _Count
    """Samples taken of the global order: the position in the data, whatever the number of ranks."""
    validated: int
    """Step of the last validation; -1 before the first."""
    model_only: bool
    """Whether the optimizer's state was left out: to load, but not to go on from."""
    identity: dict[str, Any]
    """What must stay for the run to be the same one: model, tokenizer, data, seed and batch, by key."""
    schedule: dict[str, Any]
    """The learning rate's course, resolved."""
    config: dict[str, Any]
    """The whole configuration, by section."""


def read_state(text: bytes) -> State:
    """The state that `text` holds as JSON; raises Damaged where it holds anything else."""
    try:
        return TypeAdapter(State).validate_json(text, strict=True)
    except ValidationError as error:
        raise Damaged(f"{STATE} is no state of a run ({error.error_count()} values are wrong)") from None


def changes(saved: Mapping[str, Any], now: Mapping[str, Any], *, step: int, remedy: str) -> list[Problem]:
    """A problem for each key whose value is another than when `step` was saved."""
    return [
        Problem(key, new, f"was {literal(old)} when step {step} was saved", remedy)
        for key, (old, new) in changed(saved, now).items()
    ]


def changed(
    saved: Mapping[str, Any], now: Mapping[str, Any], but: tuple[str, ...] = ()
) -> dict[str, tuple[Any, Any]]:
    """What each dotted key was and is, where that differs; none that start with one of `but`."""
    old, new = flat(saved), flat(now)
    pairs = {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if not key.startswith(but)}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by dotted key."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def fingerprint(content: Mapping[str, Any]) -> str:
    """What `content` is known by: SHA-256 of its JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
