"""Lays tables over each other, and has pydantic make a frozen dataclass of the result.

Every layer must be right in itself: a value that a later layer replaces is checked too. So pydantic reads the
table again after each layer. A wrong value is taken out of its layer, and the value below stands in.
"""

import copy
import functools
import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from torchtitan_lite import registry
from torchtitan_lite.config.messages import Path, wrong_values
from torchtitan_lite.config.problem import Problem
from torchtitan_lite.config.schema import choice_of, classes, field_types, plain_types
from torchtitan_lite.config.toml import storable

T = TypeVar("T")
_Table = dict[str, Any]


def validate(cls: type[T], layers: Sequence[_Table], key: str = "") -> tuple[T, list[Problem]]:
    """Lay `layers` over the defaults of `cls`, from left to right; returns the config and the problems.

    `key` is where the tables stand in the user's input. The default of a section must be that of its class,
    and the default of a choice must be its first member.
    """
    table: _Table = {}
    problems: list[Problem] = []
    config, unchosen = None, {}
    for layer in layers or [{}]:
        layer, unfit = storable(layer, key)
        waiting = unchosen
        config, table, wrong, unchosen = _lay(cls, table, layer, key)
        problems += unfit + wrong
        seen = {problem.key for problem in wrong}
        problems += [one for path, one in waiting.items() if not holder(table, path) and one.key not in seen]
    assert config is not None
    problems += unchosen.values()
    # In the order of the sections; unknown sections come first.
    order = {section: place for place, section in enumerate(field_types(cls))}
    return config, sorted(
        problems, key=lambda one: order.get(one.key.removeprefix(key).lstrip(".").partition(".")[0], -1)
    )


def _lay(
    cls: type[T], table: _Table, layer: _Table, key: str
) -> tuple[T, _Table, list[Problem], dict[Path, Problem]]:
    """`layer` over `table`: the config, the table for the next layer, and the problems of wrong values.

    The last result has, by path, the problems of keys that only other members of a choice have. These keys
    stay in the table, because a later layer may choose such a member.
    """
    wrong: list[Problem] = []
    unchosen: dict[Path, Problem] = {}
    while True:
        merged = overlay(cls, table, layer)
        read = copy.deepcopy(merged)
        for path in unchosen:
            holder(read, path).pop(path[-1], None)
        try:
            config = adapter(cls).validate_json(json.dumps(read))
            return config, merged, wrong, unchosen
        except ValidationError as error:
            found = wrong_values(cls, read, error.errors(include_url=False), key)
        for path, problem, is_of_another_member in found:
            if is_of_another_member:
                unchosen[path] = problem
                continue
            wrong.append(problem)
            # In `table` if the range of a member that this layer has chosen is narrower.
            del (holder(layer, path) or holder(table, path))[path[-1]]


def overlay(annotation: Any, low: Any, high: Any) -> Any:
    """`high` laid over `low`: tables merge key by key, anything else is replaced.

    In a choice, another tag drops the keys of `low` that the new member lacks or has with another type; keys
    that the old member lacked too stay. In a free table, a null takes its key back, and an empty table takes
    back everything.
    """
    if not isinstance(high, dict):
        return high
    low = low if isinstance(low, dict) else {}
    owners = classes(annotation)
    if choice := choice_of(annotation):
        low = low or {choice.tag: next(iter(choice.members))}
        old = choice.members[low[choice.tag]]
        new = next((cls for name, cls in choice.members.items() if name == high.get(choice.tag)), old)
        low, owners = _kept(low, field_types(old), field_types(new)), [new]
    types = {name: child for owner in owners for name, child in field_types(owner).items()}
    merged = {**low, **{name: overlay(types.get(name), low.get(name), value) for name, value in high.items()}}
    if types:
        return merged
    return {name: value for name, value in merged.items() if value is not None} if high else {}


def _kept(table: _Table, old: dict[str, Any], new: dict[str, Any]) -> _Table:
    """The keys of `table`, once `old` fields become `new`: those of the same type, and those not in `old`."""
    return {
        name: value
        for name, value in table.items()
        if name not in old or (name in new and plain_types(old[name]) == plain_types(new[name]))
    }


def holder(table: Any, path: Path) -> _Table:
    """The table inside `table` that has the last key of `path`; empty if there is none."""
    for name in path[:-1]:
        table = table.get(name) if isinstance(table, dict) else None
    return table if isinstance(table, dict) and path[-1] in table else {}


def to_toml(config: Any) -> str:
    """The TOML that loads back to an equal `config`. None, which is always the default, is left out."""
    import tomli_w

    tables = adapter(type(config)).dump_python(config, exclude_none=True)
    return tomli_w.dumps({name: table for name, table in tables.items() if table != {}})


def adapter(cls: type) -> Any:
    """The pydantic adapter of a configuration class, with all members that are registered."""
    return _adapter(cls, registry.classes())


@functools.cache
def _adapter(cls: type, members: tuple[type, ...]) -> Any:
    # The sections inside `cls` take over its settings, and so does the JSON schema.
    return TypeAdapter(with_config(ConfigDict(extra="forbid", strict=True))(cls))
