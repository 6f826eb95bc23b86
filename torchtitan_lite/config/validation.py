"""Layers of nested tables to one frozen dataclass, with everything that is wrong in them.

The types steer the merge: a section merges key by key, so does a free table such as `model.overrides`, any
other value is replaced, and a later tag, such as `kind`, drops the keys that the member it names lacks. Every
layer must be right in itself: a value that a later layer replaces is checked all the same.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from typing import Any, TypeVar, get_origin

from torchtitan_lite.config.problem import MISSING, Problem, dotted, literal, near
from torchtitan_lite.config.schema import (
    Available,
    classes,
    field_types,
    first_key,
    leaves,
    members_by_tag,
    open_sections,
    tag,
    unwrapped,
)
from torchtitan_lite.config.wording import description, remedy

T = TypeVar("T")
_Table = dict[str, Any]

_DEEPEST = 32


class Afresh(dict[str, Any]):
    """A table that replaces what earlier layers say of it, where others are merged."""


def overlay(low: Any, high: Any, depth: int = 0) -> Any:
    """`high` laid over `low`: tables merge key by key at every depth, anything else is replaced."""
    # What is nested deeper than a key may be is refused later, and must not exhaust the stack here.
    if not (isinstance(low, dict) and isinstance(high, dict)) or isinstance(high, Afresh) or depth > _DEEPEST:
        return high
    merged = {**low, **{name: overlay(low.get(name), value, depth + 1) for name, value in high.items()}}
    return Afresh(merged) if isinstance(low, Afresh) else merged


def validate(cls: type[T], layers: list[_Table]) -> tuple[T, list[Problem]]:
    """Merge `layers` from left to right over the defaults of `cls`.

    Returns the configuration, with the default in place of each wrong value, and the problems.
    """
    reading = _Reading(cls)
    config = reading.section(cls, layers, "", cls())
    return config, list({str(problem): problem for problem in reading.problems}.values())


def check(annotation: Any, value: object, key: str) -> tuple[Any, list[Problem]]:
    """One value as its type has it (a pair becomes a tuple), and what is wrong with it."""
    unfit = list(_unfit(value, key))
    if unfit:
        return None, unfit
    tp, notes = unwrapped(annotation)
    try:
        result = _adapter(tp).validate_json(json.dumps(value), strict=True)
    except ValueError:
        return None, [Problem(key, value, f"is not {description(tp)}", remedy(tp, value))]
    if isinstance(result, float) and not math.isfinite(result):
        return None, [Problem(key, value, "is not a finite number", "write a smaller number")]
    for note in notes:
        if isinstance(note, Available) and result not in note.values:
            available = " or ".join(map(literal, note.values))
            return None, [Problem(key, value, "is not available yet", f"use {available}")]
    return result, []


def unknown_key(root: type, known: list[str], key: str, name: str, value: object) -> Problem:
    """A key below `key` that is none of `known`; it may belong to another section of `root`."""
    rule = "is not a known key" if key else "is not a known section"
    elsewhere = [leaf for leaf in leaves(root) if leaf.rpartition(".")[2] == name]
    found = not isinstance(value, dict) and 0 < len(elsewhere) <= (1 if key else 3)
    remedy = f"did you mean {' or '.join(map(literal, elsewhere))}?" if found else near(name, known)
    return Problem(dotted(key, name), value, rule, remedy)


class _Reading:
    """The problems met so far, while layers become values."""

    def __init__(self, root: type) -> None:
        self.root = root
        self.problems: list[Problem] = []

    def value(self, annotation: Any, layers: list[Any], key: str, default: Any) -> Any:
        """What `layers`, each the value that one layer gives to `key`, come to."""
        if members_by_tag(annotation):
            return self.member(annotation, layers, key, default)
        if classes(annotation):
            return self.section(type(default), self.tables(annotation, layers, key), key, default)
        if get_origin(unwrapped(annotation)[0]) is dict:
            layers = _merged([default, *layers])
        for layer in layers:
            result, problems = check(annotation, layer, key)
            self.problems += problems
            default = default if problems else result
        return default

    def section(self, cls: type[T], tables: list[_Table], key: str, default: T, union: Any = None) -> T:
        """An instance of the dataclass `cls`; `union` is the tagged union that it was chosen from."""
        known = field_types(cls)
        for table in tables:
            for name, value in table.items():
                if name not in known:
                    self.problems.append(self.unknown(cls, key, name, value, union))
        given = {}
        for name, annotation in known.items():
            layers = [table[name] for table in tables if name in table]
            if layers:
                given[name] = self.value(annotation, layers, dotted(key, name), getattr(default, name))
        return dataclasses.replace(default, **given)  # pyright: ignore[reportArgumentType]

    def member(self, annotation: Any, layers: list[Any], key: str, default: Any) -> Any:
        """The chosen member of a tagged union."""
        members, by = members_by_tag(annotation), tag(annotation)
        chosen, said = default, []  # the tables that the chosen member was read from
        for name, tables in _runs(self.tables(annotation, layers, key), by):
            name = getattr(default, by) if name is None else name
            if not isinstance(name, str) or name not in members:
                rule = f"is not a known {by}"
                self.problems.append(Problem(f"{key}.{by}", name, rule, near(name, members)))
                continue
            member = members[name]
            kept = [] if isinstance(tables[0], Afresh) else _shared(said, type(chosen), member)
            start = default if member is type(default) else member()
            said = [*kept, *self.without_default(tables, by, type(default), member, key)]
            chosen = self.section(member, said, key, start, union=annotation)
        return chosen

    def without_default(
        self, tables: list[_Table], by: str, default: type, member: type, key: str
    ) -> list[_Table]:
        """The tables of a run, less what layers before the one that names `member` say of the default member.

        These layers name no member. A key that the default alone has is checked, and goes with it.
        """
        own = field_types(default).keys() - field_types(member).keys()
        n_before = next((i for i, table in enumerate(tables) if by in table), 0)
        before = [{name: table[name] for name in table if name in own} for table in tables[:n_before]]
        self.section(default, before, key, default())
        rest = [{name: table[name] for name in table if name not in own} for table in tables[:n_before]]
        return [*rest, *tables[n_before:]]

    def tables(self, annotation: Any, layers: list[Any], key: str) -> list[_Table]:
        """Those of `layers` that are tables; the others are problems."""
        for layer in layers:
            if not isinstance(layer, dict):
                first = first_key(annotation)
                value = literal(layer) if layer in list(members_by_tag(annotation)) else "..."
                self.problems.append(Problem(key, layer, "is not a table", f"write {key}.{first} = {value}"))
        return [layer for layer in layers if isinstance(layer, dict)]

    def unknown(self, cls: type, key: str, name: str, value: object, union: Any) -> Problem:
        owners = [owner for owner, member in members_by_tag(union).items() if name in field_types(member)]
        if not owners:
            problem = unknown_key(self.root, list(field_types(cls)), key, name, value)
            if not isinstance(value, dict) or key not in open_sections(self.root):
                return problem
            remedy = f"{problem.remedy.rstrip('?')}, or name the plugin that has it in job.plugins"
            return dataclasses.replace(problem, remedy=remedy)
        by = tag(union)
        belongs = " or ".join(map(literal, owners))
        rule = f'belongs to {by} {belongs}, and {key}.{by} is "{getattr(cls(), by)}"'
        return Problem(f"{key}.{name}", value, rule, f'leave it out, or set {key}.{by} = "{owners[0]}"')


def _shared(tables: list[_Table], old: type, new: type) -> list[_Table]:
    """What `tables` say of the keys that two members of a tagged union have in common, with one type."""
    if old is new:
        return tables
    types = field_types(new)
    shared = {name for name, annotation in field_types(old).items() if types.get(name) == annotation}
    return [{name: value for name, value in table.items() if name in shared} for table in tables]


def _runs(tables: list[_Table], by: str) -> list[tuple[Any, list[_Table]]]:
    """Neighbouring tables of one member, which the key `by` names.

    A table that names none goes with the one before it, else with the next.
    """
    runs: list[tuple[Any, list[_Table]]] = []
    for table in tables:
        last_name, last = runs[-1] if runs else (None, [])
        name = table.get(by, last_name)
        if last and not isinstance(table, Afresh) and last_name in (None, name):
            runs[-1] = (name, [*last, table])
        else:
            runs.append((name, [table]))
    return runs


def _merged(layers: list[Any]) -> list[Any]:
    """Free tables laid over each other, key by key, at every depth; a null takes its key back."""
    tables = [layer for layer in layers if isinstance(layer, dict)]
    over = functools.reduce(overlay, tables)
    return [*(layer for layer in layers if not isinstance(layer, dict)), _without_nulls(over)]


def _without_nulls(table: _Table, depth: int = 0) -> _Table:
    if depth > _DEEPEST:
        return table
    return {
        name: _without_nulls(value, depth + 1) if isinstance(value, dict) else value
        for name, value in table.items()
        if value is not None
    }


def _unfit(value: object, key: str, depth: int = 0) -> Iterator[Problem]:
    """What no key takes, because neither a TOML file nor a 64-bit machine can hold it."""
    if depth > _DEEPEST:
        yield Problem(key, MISSING, f"is nested more than {_DEEPEST} levels deep", "write a flatter table")
    elif isinstance(value, dict):
        for name, child in value.items():
            yield from _unfit(name, key)
            yield from _unfit_child(child, dotted(key, name), depth)
    elif isinstance(value, list):
        for child in value:
            yield from _unfit_child(child, key, depth)
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(key, value, "is not a finite number", "write a finite number")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield Problem(key, value, "does not fit in 64 bits", "write a smaller number")
    elif isinstance(value, str) and not _is_text(value):
        yield Problem(key, value, "holds a character that a text file cannot", "take the character out")
    elif not isinstance(value, bool | int | float | str | None):
        yield Problem(key, value, "is a date or a time, which no key takes", "put it in quotes")


def _unfit_child(value: object, key: str, depth: int) -> Iterator[Problem]:
    if value is None:
        yield Problem(key, None, "cannot be written in a TOML file", "leave the key out")
    else:
        yield from _unfit(value, key, depth + 1)


def _is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


@functools.cache
def _adapter(tp: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(tp)
