"""Turn pydantic's errors into problems, the messages for the user.

A message follows from the place of the error, its type, and the annotation of the key:

("training", "steps"), "int_type" -> training.steps = "ten" is not an integer: write a whole number such as 64
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from torchtitan_lite.config.problem import Problem, Remedy, dotted, either, literal, near
from torchtitan_lite.config.schema import (
    alternatives,
    choice_of,
    classes,
    field_types,
    first_key,
    leaves,
    note,
    plain_types,
)
from torchtitan_lite.registry import Sections

Path = tuple[str, ...]

_RANGES = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "too_short")
_LIMITS = {
    "ge": ("at least", "["),
    "gt": ("greater than", "("),
    "le": ("at most", "]"),
    "lt": ("less than", ")"),
    "min_length": ("a list of at least", ""),
}
"""Pydantic's limits by name: the words for a limit that stands alone, and the bracket for a range."""
_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", dict: "a table"}
_REMEDIES = {
    int: "write a whole number such as 64",
    float: "write a number such as 0.1",
    bool: "write true or false",
    str: "put it in quotes",
    dict: """write a table, or on the command line JSON such as '{"key": 1}'""",
}


class WrongValue(NamedTuple):
    """A value that pydantic refused: its path in the table, and the problem to report."""

    path: Path
    problem: Problem
    is_of_another_member: bool = False
    """True if another member of the choice has the key. A later layer may still choose that member."""


class _Place(NamedTuple):
    """A key of the table, and the section that holds the key."""

    path: Path
    section: Any
    """The annotation of the section."""
    owner: type
    """The class of the section."""


def wrong_values(cls: type, table: dict[str, Any], errors: Sequence[Any], key: str) -> list[WrongValue]:
    """Return a WrongValue for each key of `table` that pydantic's `errors` name.

    `table` was validated as a `cls`, and stands at `key` in the user's input.
    """
    types: dict[_Place, set[str]] = {}  # a union has an error for each of its types
    for error in errors:
        types.setdefault(_place(cls, error["loc"]), set()).add(error["type"])
    found = []
    for place, kinds in types.items():
        key_there = functools.reduce(dotted, place.path, key)
        value = functools.reduce(operator.getitem, place.path, table)
        annotation = field_types(place.owner).get(place.path[-1])
        if annotation is None:
            found.append(_unknown_key(cls, place, key_there, value))
        else:
            default = getattr(place.owner, place.path[-1], None)
            found.append(WrongValue(place.path, _wrong_value(annotation, key_there, value, kinds, default)))
    return found


def _place(cls: type, loc: Sequence[int | str]) -> _Place:
    """Return the place in the table that pydantic's `loc` names. Tags and parts of a value are skipped."""
    section, owner, path, rest = cls, cls, [], [str(part) for part in loc]
    while True:
        path.append(rest.pop(0))
        annotation = field_types(owner).get(path[-1])
        if not rest or not classes(annotation):
            return _Place(tuple(path), section, owner)
        choice = choice_of(annotation)
        section, owner = annotation, choice.members[rest.pop(0)] if choice else classes(annotation)[0]


def _wrong_value(annotation: Any, key: str, value: Any, types: set[str], default: object) -> Problem:
    """Return the problem of `value`, which pydantic refused with errors of these `types`."""
    choice = choice_of(annotation)
    if classes(annotation) and not isinstance(value, dict):
        is_member = isinstance(value, str) and choice is not None and value in choice.members
        remedy = f"write {key}.{first_key(annotation)} = {literal(value) if is_member else '...'}"
        return Problem(key, value, "is not a table", remedy)
    if choice:
        tag, name = choice.tag, value[choice.tag]
        return Problem(f"{key}.{tag}", name, f"is not a known {tag}", near(name, choice.members))
    if not types.isdisjoint(_RANGES):
        return Problem(key, value, f"must be {limits(annotation)}", _range_remedy(annotation))
    return Problem(key, value, f"is not {_described(annotation)}", _remedy(annotation, value, default))


def _unknown_key(cls: type, place: _Place, key: str, value: object) -> WrongValue:
    """Return the WrongValue of a key that is not a field of its section's class."""
    name, choice = place.path[-1], choice_of(place.section)
    kinds = [kind for kind, member in choice.members.items() if name in field_types(member)] if choice else []
    if choice and kinds:
        by = f"{key.removesuffix(name)}{choice.tag}"
        chosen = choice.name_of(place.owner)
        rule = f'belongs to {choice.tag} {either(map(literal, kinds))}, and {by} is "{chosen}"'
        remedy = f'leave it out, or set {by} = "{kinds[0]}"'
        return WrongValue(place.path, Problem(key, value, rule, remedy, (by,)), is_of_another_member=True)
    is_section = key == dotted("", name)
    rule = f"is not a known {'section' if is_section and isinstance(value, dict) else 'key'}"
    foreign = getattr(cls, "foreign_keys", {})
    switch = f"{key.removesuffix(name)}{name.removeprefix('no_')}"  # --metrics.no_enable_wandb
    if remedy := foreign.get(key) or foreign.get(switch):
        return WrongValue(place.path, Problem(key, value, rule, remedy))
    elsewhere = [leaf for leaf in leaves(cls) if leaf.rpartition(".")[2] == name]
    if not isinstance(value, dict) and 0 < len(elsewhere) <= (3 if is_section else 1):
        remedy = f"did you mean {either(map(literal, elsewhere))}?"
    else:
        refused = getattr(place.owner, "set_elsewhere", ())
        remedy = near(name, [field for field in field_types(place.owner) if field not in refused])
    if note(place.section, Sections):
        remedy = f"{remedy.rstrip('?')}, or name the plugin that has it in job.plugins"
    return WrongValue(place.path, Problem(key, value, rule, remedy))


def limits(annotation: Any) -> str:
    """Return the range of a value in words ("in [0, 1)", "-1 or at least 1"). Empty if there is no range."""
    ranges = [_range(option) for option in alternatives(annotation)]
    fixed = [literal(value) for tp in plain_types(annotation) if _is_literal(tp) for value in get_args(tp)]
    return either([*fixed, *filter(None, ranges)]) if any(ranges) else ""


def _range(option: Any) -> str:
    found = _limits(option)
    if len(found) == 2:
        (first, low), (last, high) = sorted(found.items())
        return f"in {_LIMITS[first][1]}{literal(low)}, {literal(high)}{_LIMITS[last][1]}"
    return "".join(f"{_LIMITS[name][0]} {literal(limit)}" for name, limit in found.items())


def _limits(option: Any) -> dict[str, Any]:
    """Return the limits, by name, that a pydantic `Field` in the annotation sets."""
    metadata = getattr(note(option, FieldInfo), "metadata", ())
    return {name: getattr(limit, name) for limit in metadata for name in _LIMITS if hasattr(limit, name)}


def _range_remedy(annotation: Any) -> str:
    """Return the remedy for a value that is out of its range."""
    for option in alternatives(annotation):
        if remedy := note(option, Remedy):
            return remedy.text
        if examples := getattr(note(option, FieldInfo), "examples", None):
            return f"use {literal(examples[0])} or so"
        if "ge" in (found := _limits(option)):
            return f"use {literal(found['ge'])} or more"
    return "use a number in this range"


def _special_number(annotation: Any) -> str | None:
    """Return the remedy that stands in the annotation, or None: for such a key 64 may be wrong."""
    notes = (note(option, Remedy) for option in alternatives(annotation))
    return next((remedy.text for remedy in notes if remedy), None)


def _is_in_range(annotation: Any, number: int) -> bool:
    """Return True if a key with this annotation takes the whole number."""
    try:
        TypeAdapter(annotation).validate_python(number, strict=True)
    except ValidationError:
        return False
    return -(2**63) <= number < 2**63  # what TOML and a tensor can hold


def _is_literal(tp: Any) -> bool:
    return get_origin(tp) is Literal


def _described(annotation: Any) -> str:
    """Return the type of a value in words, such as "an integer or a list of 2 integers"."""
    names = [_name(tp) for tp in plain_types(annotation) if tp is not type(None)]
    return " or ".join(dict.fromkeys(names))


def _remedy(annotation: Any, value: object, default: object) -> str:
    """Return the remedy for a `value` of the wrong type: how to write a value of the annotated type.

    A number that is shown as an example must be one that the key takes. `default` is the default of the key.
    """
    types = plain_types(annotation)
    options = [tp for tp in types if tp is not type(None)]
    optional = ", or leave it out" if len(options) < len(types) else ""
    if optional and value is None:
        return "leave it out"
    if int in options and isinstance(default, int) and not limits(annotation):
        is_pair = any(get_origin(tp) is tuple for tp in options)
        pair = f", or a list such as [{default}, {default}]" * is_pair
        return f"write a whole number such as {default}{pair}{optional}"  # the range is checked elsewhere
    if int in options and isinstance(value, float) and value.is_integer():
        if not _is_in_range(annotation, int(value)):
            return _range_remedy(annotation)
        return f"write {int(value)}{optional}"
    choices = [choice for tp in options if _is_literal(tp) for choice in get_args(tp)]
    if choices and len(options) == 1:
        return near(value, choices) + optional
    main = next(tp for tp in options if not _is_literal(tp) or len(options) == 1)
    if main is int and (special := _special_number(annotation)):
        return special if "leave it out" in special else special + optional
    return _REMEDIES.get(get_origin(main) or main, f"write {_described(annotation)}") + optional


def _name(tp: Any) -> str:
    origin, args = get_origin(tp) or tp, list(get_args(tp))
    if origin is Literal:
        return f"one of {', '.join(map(literal, args))}" if len(args) > 1 else literal(args[0])
    if origin is tuple and args[-1] is not ...:
        return f"a list of {len(args)} {_name(args[0]).split()[-1]}s"
    if origin is dict and args[-1] in (int, float, str):
        return f"a table of {_NAMES[args[-1]].split()[-1]}s"
    return _NAMES.get(origin, "a list")
