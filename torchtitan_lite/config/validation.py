"""Lays tables over each other, and has pydantic make a frozen dataclass of the result.

Every layer must be right in itself: a value that a later layer replaces is checked too. So pydantic reads the
table again after each layer. A wrong value is taken out of its layer, and the value below stands in.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from torchtitan_lite import registry
from torchtitan_lite.config.messages import Path, Refusal, refusal_at, refusals
from torchtitan_lite.config.problem import Problem
from torchtitan_lite.config.schema import choice_of, classes, field_types, plain_types
from torchtitan_lite.config.toml import storable
from torchtitan_lite.registry import Choice

T = TypeVar("T")
_Table = dict[str, Any]


def validate(cls: type[T], layers: Sequence[_Table], key: str = "") -> tuple[T, list[Problem]]:
    """Lay `layers` over the defaults of `cls`, from left to right; returns the config and the problems.

    `key` is where the tables stand in the user's input. The default of a section must be that of its class,
    and the default of a choice must be its first member.
    """
    table: _Table = {}
    config = None
    problems: list[Problem] = []
    waiting: dict[Path, Problem] = {}
    """Keys of members that are not chosen: the next layer may choose them."""
    for layer in layers or [{}]:
        layer, unfit = storable(layer, key)
        config, table, refused = _lay(cls, table, layer, key)
        of_other_members = {one.path: one.problem for one in refused if one.is_of_another_member}
        wrong = {one.path: one.problem for one in refused if not one.is_of_another_member}
        dropped = [path for path in waiting if not (path in wrong or _has(table, path))]
        problems += [*unfit, *wrong.values(), *(_dropped(cls, table, waiting, path, key) for path in dropped)]
        waiting = of_other_members
    assert config is not None
    problems += waiting.values()
    # In the order of the sections; unknown sections come first.
    order = {section: place for place, section in enumerate(field_types(cls))}
    return config, sorted(
        problems, key=lambda one: order.get(one.key.removeprefix(key).lstrip(".").partition(".")[0], -1)
    )


def _lay(cls: type[T], table: _Table, layer: _Table, key: str) -> tuple[T, _Table, list[Refusal]]:
    """`layer` over `table`: the config, the table for the next layer, and the refused values.

    The key of a member that is not chosen stays in the table, in case a later layer chooses that member.
    """
    from pydantic import ValidationError

    refused: list[Refusal] = []
    while True:
        merged = overlay(cls, table, layer)
        of_other_members = [one.path for one in refused if one.is_of_another_member]
        sound = functools.reduce(_without, of_other_members, merged)
        try:
            config = adapter(cls).validate_json(json.dumps(sound), strict=True, extra="forbid")
            return config, merged, refused
        except ValidationError as error:
            found = refusals(cls, sound, error.errors(include_url=False), key)
        refused += found
        for path in [one.path for one in found if not one.is_of_another_member]:
            if _has(layer, path):
                layer = _without(layer, path)
            else:  # the range of a member that this layer has chosen is narrower
                assert _has(table, path), path
                table = _without(table, path)


def _dropped(cls: type, table: _Table, waiting: dict[Path, Problem], path: Path, key: str) -> Problem:
    """The problem of a key that no layer used before `table` chose a member without the key."""
    layer: Any = waiting[path].value
    for name in reversed(path):
        layer = {name: layer}
    return refusal_at(cls, overlay(cls, table, layer), path, [], key).problem


def overlay(annotation: Any, low: Any, high: Any) -> Any:
    """`high` laid over `low`: tables merge key by key, anything else is replaced.

    In a choice, another tag drops the keys of `low` that the new member lacks or has with another type. In a
    free table, a null takes its key back, and an empty table takes back everything.
    """
    if not isinstance(high, dict):
        return high
    low = low if isinstance(low, dict) else {}
    if choice := choice_of(annotation):
        low = low or {choice.tag: next(iter(choice.members))}
        old, new = (_member(choice, table.get(choice.tag)) for table in (low, high))
        low = _shared(low, choice.tag, old, new) if old and new and old is not new else low
        types = field_types(new or old) if new or old else {}
    else:
        types = {name: child for owner in classes(annotation) for name, child in field_types(owner).items()}
    merged = {**low, **{name: overlay(types.get(name), low.get(name), value) for name, value in high.items()}}
    if types:
        return merged
    return {name: value for name, value in merged.items() if value is not None} if high else {}


def _member(choice: Choice, name: object) -> type | None:
    return choice.members.get(name) if isinstance(name, str) else None


def _shared(table: _Table, by: str, old: type, new: type) -> _Table:
    """The keys of `table` that the member `new` has, except those that `old` has with another type."""
    before, after = field_types(old), field_types(new)
    shared = {
        name
        for name, annotation in after.items()
        if name not in before or plain_types(before[name]) == plain_types(annotation)
    }
    return {name: value for name, value in table.items() if name in shared | {by}}


def _has(table: Any, path: Path) -> bool:
    for name in path:
        if not isinstance(table, dict) or name not in table:
            return False
        table = table[name]
    return True


def _without(table: _Table, path: Path) -> _Table:
    """`table` without the value at `path`, if there is one."""
    if not _has(table, path):
        return table
    name, *rest = path
    if rest:
        return {**table, name: _without(table[name], tuple(rest))}
    return {key: value for key, value in table.items() if key != name}


def adapter(cls: type) -> Any:
    """The pydantic adapter of a configuration class, with all members that are registered."""
    return _adapter(cls, registry.classes())


@functools.cache
def _adapter(cls: type, members: tuple[type, ...]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)
