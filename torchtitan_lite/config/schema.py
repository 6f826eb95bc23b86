"""What a configuration dataclass says of its keys: their types, and the members of a tagged union.

A tagged union is closed, as `Plain | Tiled`, or open, as `Annotated[..., door]`: its members are those that a
door of the registry has at the time of asking.
"""

import dataclasses
import functools
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from torchtitan_lite.registry import Choice, Sections


class Available:
    """Marks a field of which only these values work so far: `Annotated[int, Available(1)]`."""

    def __init__(self, *values: object) -> None:
        self.values = values


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Name and annotation of each field of a dataclass, in order."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def unwrapped(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """The type inside `Annotated`, and the notes beside it."""
    if get_origin(annotation) is Annotated:
        return annotation.__origin__, annotation.__metadata__
    return annotation, ()


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; a type that is none is its own only member."""
    tp, _ = unwrapped(annotation)
    return get_args(tp) if get_origin(tp) in (Union, types.UnionType) else (tp,)


def classes(annotation: Any) -> list[type]:
    """The dataclasses that a table under this annotation may become."""
    if (choice := _note(annotation, Choice)) is not None:
        return list(choice.members.values())
    if (sections := _note(annotation, Sections)) is not None:
        return [sections.section]
    return [tp for tp in alternatives(annotation) if dataclasses.is_dataclass(tp) and isinstance(tp, type)]


def members_by_tag(annotation: Any) -> dict[str, type]:
    """The members of a tagged union by their tag; empty for every other type."""
    if (choice := _note(annotation, Choice)) is not None:
        return choice.members
    members = classes(annotation)
    if len(members) < 2:
        return {}
    return {get_args(field_types(member)["kind"])[0]: member for member in members}


def tag(annotation: Any) -> str:
    """The key that tells the members of a tagged union apart."""
    choice = _note(annotation, Choice)
    return "kind" if choice is None else choice.tag


def open_sections(cls: type) -> set[str]:
    """The sections of `cls` that plugins may add to: an open annotation is in them."""
    return {name for name, annotation in field_types(cls).items() if _is_open(annotation)}


def _is_open(annotation: Any) -> bool:
    if _note(annotation, (Choice, Sections)) is not None:
        return True
    return any(_is_open(child) for owner in classes(annotation) for child in field_types(owner).values())


def _note(annotation: Any, wanted: Any) -> Any:
    """The note of a `wanted` class beside a type; None without one."""
    return next((note for note in unwrapped(annotation)[1] if isinstance(note, wanted)), None)


def first_key(annotation: Any) -> str:
    """A key that a table under this annotation may have, to show how one is written."""
    if members_by_tag(annotation):
        return tag(annotation)
    types = field_types(classes(annotation)[0])
    return next((name for name, child in types.items() if not is_fixed(child)), "KEY")


def is_fixed(annotation: Any) -> bool:
    """Whether a key takes one value alone, as the tag of a member does."""
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def at(cls: type, path: list[str]) -> Any:
    """The annotation of the key at `path`, joined over the members that have it; None where there is none."""
    found: list[Any] = [cls]
    for name in path:
        owners = [owner for annotation in found for owner in classes(annotation)]
        found = [field_types(owner)[name] for owner in owners if name in field_types(owner)]
    if not found:
        return None
    return found[0] if len(found) == 1 else Union[tuple(found)]  # noqa: UP007 (a union of a computed list)


def leaves(annotation: Any, key: str = "") -> list[str]:
    """The dotted keys of all values below `annotation`."""
    owners = classes(annotation)
    if not owners:
        return [key]
    children = {name: child for owner in owners for name, child in field_types(owner).items()}
    prefix = f"{key}." if key else ""
    return [leaf for name, child in children.items() for leaf in leaves(child, prefix + name)]
