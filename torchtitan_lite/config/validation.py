"""Merge layers of tables, and let pydantic turn the result into a frozen dataclass.

Every layer must be valid: a value that a later layer replaces is checked too. So pydantic reads the merged
table again after each layer. A wrong value is removed from its layer, and the value of the layer below is
used.
"""

import copy
import functools
import json
from collections.abc import Mapping, Sequence
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
    """Merge `layers` over the defaults of `cls`, from left to right. Return the config and the problems.

    `key` is the place of the tables in the user's input. The default of a section must equal its class
    without arguments. The default of a choice must be its first member.
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
    # Sort the problems by section. Problems of unknown sections come first.
    order = {section: place for place, section in enumerate(field_types(cls))}
    return config, sorted(
        problems, key=lambda one: order.get(one.key.removeprefix(key).lstrip(".").partition(".")[0], -1)
    )


def _lay(
    cls: type[T], table: _Table, layer: _Table, key: str
) -> tuple[T, _Table, list[Problem], dict[Path, Problem]]:
    """Merge `layer` over `table`. Return the config, the merged table and the problems of wrong values.

    The fourth result has, by path, the problems of keys that only other members of a choice have. These keys
    stay in the merged table, because a later layer may choose such a member.
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
            if problem not in wrong:  # two layers may have the same wrong value
                wrong.append(problem)
            # The value is in `table` if this layer has chosen a member with a narrower range.
            del (holder(layer, path) or holder(table, path))[path[-1]]


def overlay(annotation: Any, low: Any, high: Any) -> Any:
    """Return `high` merged over `low`: tables merge key by key, any other value of `high` replaces `low`.

    If `high` chooses another member of a choice, the old member's keys are dropped, except keys that the new
    member has with the same type. Keys that the old member lacks stay. In a `dict` field, a null removes its
    key, and an empty table removes all keys.
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
    """Return `table` without the `old` fields that `new` lacks or has with another type."""
    return {
        name: value
        for name, value in table.items()
        if name not in old or (name in new and plain_types(old[name]) == plain_types(new[name]))
    }


def holder(table: Any, path: Path) -> _Table:
    """Return the inner table that holds the last key of `path`, or an empty table if the key is missing."""
    for name in path[:-1]:
        table = table.get(name) if isinstance(table, dict) else None
    return table if isinstance(table, dict) and path[-1] in table else {}


def to_toml(config: Any, without: Mapping[str, set[str]] | None = None) -> str:
    """Return TOML that loads back to an equal `config`. None is left out, as it is always the default.

    `without` names the keys of each section that are left out too.
    """
    import tomli_w

    tables = adapter(type(config)).dump_python(config, exclude_none=True, exclude=without)
    return tomli_w.dumps({name: table for name, table in tables.items() if table != {}})


def adapter(cls: type) -> Any:
    """Return the pydantic adapter of a configuration class, with all registered members."""
    return _adapter(cls, registry.classes())


@functools.cache
def _adapter(cls: type, members: tuple[type, ...]) -> Any:
    # pydantic applies these settings also to the sections inside `cls`, and in the JSON schema.
    return TypeAdapter(with_config(ConfigDict(extra="forbid", strict=True))(cls))
