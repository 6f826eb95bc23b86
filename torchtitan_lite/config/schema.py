"""Reads the annotations of configuration dataclasses.

A section is a dataclass. A choice is a section of several kinds: `Annotated[..., door]` with a `Choice` of
the registry, whose members are told apart by a tag such as `kind`. Every other annotation is a value.
"""

import dataclasses
import functools
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from torchtitan_lite.registry import Choice, Door, Sections


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Name and annotation of each field of a dataclass, in order."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def note(annotation: Any, wanted: type) -> Any:
    """The note of class `wanted` beside the type in `Annotated[type, note]`; None without one."""
    notes = getattr(annotation, "__metadata__", ())
    return next((note for note in notes if isinstance(note, wanted)), None)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, with their notes; any other type is its own only member."""
    tp = _without_notes(annotation)
    return get_args(tp) if get_origin(tp) in (Union, types.UnionType) else (annotation,)


def plain_types(annotation: Any) -> list[Any]:
    """The members of a union, without their notes."""
    return [_without_notes(option) for option in alternatives(annotation)]


def _without_notes(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def choice_of(annotation: Any) -> Choice | None:
    """The choice beside a type; None for every other annotation."""
    return note(annotation, Choice)


def classes(annotation: Any) -> list[type]:
    """The dataclasses that a table under this annotation may become; empty for a value."""
    if choice := choice_of(annotation):
        return list(choice.members.values())
    if sections := note(annotation, Sections):
        return [sections.section]
    return [tp for tp in plain_types(annotation) if dataclasses.is_dataclass(tp) and isinstance(tp, type)]


def is_open(annotation: Any) -> bool:
    """True for a section that plugins may add options to."""
    children = (child for owner in classes(annotation) for child in field_types(owner).values())
    return note(annotation, Door) is not None or any(map(is_open, children))


def first_key(annotation: Any) -> str:
    """A key of a section, for an example."""
    if choice := choice_of(annotation):
        return choice.tag
    types = field_types(classes(annotation)[0])
    return next((name for name, child in types.items() if not is_fixed(child)), "KEY")


def is_fixed(annotation: Any) -> bool:
    """True if a key takes one value only, as the tag of a member does."""
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def at(cls: type, path: list[str]) -> Any:
    """The annotation of the key at `path`; a union if several members have the key, None without it."""
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
