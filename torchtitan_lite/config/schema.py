"""Read the annotations of configuration dataclasses.

A section is a dataclass. A choice is a section that can be one of several dataclasses, its members. A tag
such as `kind` names the chosen member. A choice is annotated `Annotated[..., door]`, where `door` is a
`Choice` of the registry. Every other annotation is a value.
"""

import dataclasses
import functools
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from torchtitan_lite.registry import Choice, Door, Sections


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Return the name and the annotation of each field of a dataclass, in order."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def note(annotation: Any, wanted: type) -> Any:
    """Return the note of class `wanted` in `Annotated[type, note]`, or None if there is no such note."""
    notes = getattr(annotation, "__metadata__", ())
    return next((note for note in notes if isinstance(note, wanted)), None)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the types in a union, with their notes. An annotation that is no union is the only type."""
    tp = _without_notes(annotation)
    return get_args(tp) if get_origin(tp) in (Union, types.UnionType) else (annotation,)


def plain_types(annotation: Any) -> list[Any]:
    """Return the types in a union, without their notes. An annotation that is no union is the only type."""
    return [_without_notes(option) for option in alternatives(annotation)]


def _without_notes(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def choice_of(annotation: Any) -> Choice | None:
    """Return the `Choice` in `Annotated[type, choice]`, or None for any other annotation."""
    return note(annotation, Choice)


def classes(annotation: Any) -> list[type]:
    """Return the dataclasses that a table with this annotation may become. A value has none."""
    if choice := choice_of(annotation):
        return list(choice.members.values())
    if sections := note(annotation, Sections):
        return [sections.section]
    return [tp for tp in plain_types(annotation) if dataclasses.is_dataclass(tp) and isinstance(tp, type)]


def is_open(annotation: Any) -> bool:
    """Return True if plugins may add options to a section with this annotation."""
    children = (child for owner in classes(annotation) for child in field_types(owner).values())
    return note(annotation, Door) is not None or any(map(is_open, children))


def first_key(annotation: Any) -> str:
    """Return a key of a section, to show as an example."""
    if choice := choice_of(annotation):
        return choice.tag
    types = field_types(classes(annotation)[0])
    return next((name for name, child in types.items() if not is_fixed(child)), "KEY")


def is_fixed(annotation: Any) -> bool:
    """Return True if a key takes only one value, as the tag of a member does."""
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def at(cls: type, path: list[str]) -> Any:
    """Return the annotation of the key at `path`.

    If several members of a choice have the key, return a union. If no class has the key, return None.
    """
    found: list[Any] = [cls]
    for name in path:
        owners = [owner for annotation in found for owner in classes(annotation)]
        found = [field_types(owner)[name] for owner in owners if name in field_types(owner)]
    if not found:
        return None
    return found[0] if len(found) == 1 else Union[tuple(found)]  # noqa: UP007 (a union of a computed list)


def leaves(annotation: Any, key: str = "") -> list[str]:
    """Return the dotted keys of all values below `annotation`."""
    owners = classes(annotation)
    if not owners:
        return [key]
    children = {name: child for owner in owners for name, child in field_types(owner).items()}
    prefix = f"{key}." if key else ""
    return [leaf for name, child in children.items() for leaf in leaves(child, prefix + name)]
