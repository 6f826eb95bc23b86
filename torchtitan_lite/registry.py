"""Registries of all that a configuration chooses by name. Each registry is called a door.

Our own members and those of plugins register in the same way. A plugin is a module that `job.plugins` names.
It is imported before the flags are read, and registers:

    @optimizers.register
    @dataclass(frozen=True, kw_only=True)
    class Lion:
        name: Literal["Lion"] = "Lion"
        lr: float = 1e-4
        ...

docs/configuration.md says what each door needs of a member. Doors tell pydantic how to read their sections.
"""

import dataclasses
import functools
import importlib
import keyword
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic_core import core_schema

from torchtitan_lite.config.problem import ConfigError, Problem

Member = TypeVar("Member")
_Wrong = Iterator[tuple[str, str]]
"""The rules that a member breaks, each with its remedy."""

_KEY = "job.plugins"
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_importing: list[str] = []
"""The plugins that are being imported. Each one is imported by the plugin before it in the list."""
_registering: set[str] = set()
"""The modules that have registered a member."""


class Door:
    """A registry: the members of one kind, by the names that a key of the configuration can choose."""

    def __init__(
        self, what: str, *, tag: str, needs: tuple[str, ...], reserved: tuple[str, ...] = ()
    ) -> None:
        self.what, self.tag, self.needs, self.reserved = what, tag, needs, reserved
        self.members: dict[str, Any] = {}

    def register(self, member: Member) -> Member:
        """Add `member`, and return `member`. For members that are classes, this is a class decorator.

        Raises ConfigError if the member lacks an attribute, or if its name is unfit or taken.
        """
        wrong = list(self._wrong(member)) or list(self._wrong_name(member))
        if wrong:
            module = _importing[-1] if _importing else getattr(member, "__module__", "?")
            raise ConfigError([Problem(_KEY, module, rule, remedy) for rule, remedy in wrong])
        self.members[self.name_of(member)] = member
        _registering.update([*_importing, getattr(member, "__module__", "")])
        return member

    def name_of(self, member: object) -> Any:
        """Return the name of `member`, or None if it has none."""
        return getattr(member, self.tag, None)

    def _wrong(self, member: object) -> _Wrong:
        """Yield the rules that `member` breaks, except those for its name."""
        if lacking := [name for name in (self.tag, *self.needs) if _lacks(member, name)]:
            yield (
                f"registers a {self.what} that lacks {' and '.join(lacking)}",
                f"every {self.what} has {', '.join((self.tag, *self.needs))}",
            )

    def _wrong_name(self, member: object) -> _Wrong:
        name = self.name_of(member)
        called = f'registers the {self.what} "{name}", which'
        if not isinstance(name, str) or not _WORD.fullmatch(name) or keyword.iskeyword(name):
            yield f"{called} is no word of letters, digits and _", "choose another name"
        elif name in self.reserved or not _is_same(self.members.get(name, member), member):
            yield f"{called} exists", "choose another name"


class _ClassDoor(Door):
    """A door whose members are frozen dataclasses: each field is an option.

    Only the field `tag` is no option: it holds the name of the member.
    """

    def name_of(self, member: object) -> Any:
        annotation = get_type_hints(member).get(self.tag)
        names = get_args(annotation) if get_origin(annotation) is Literal else ()
        return names[0] if len(names) == 1 and getattr(member, self.tag, None) == names[0] else None

    def _wrong(self, member: object) -> _Wrong:
        called = f"registers the {self.what} {getattr(member, '__qualname__', member)}, which"
        # A class that inherits from a dataclass, without the decorator, has no fields of its own.
        if not (isinstance(member, type) and "__dataclass_params__" in vars(member)):
            yield f"{called} is no dataclass", "write @dataclass(frozen=True, kw_only=True) below .register"
            return
        if not vars(member)["__dataclass_params__"].frozen:
            yield f"{called} is not frozen", "write @dataclass(frozen=True, kw_only=True)"
        if self.name_of(member) is None:
            yield f"{called} has no tag", f'give it the field {self.tag}: Literal["NAME"] = "NAME"'
        unset, options = dataclasses.MISSING, fields(member)
        if bare := [option.name for option in options if option.default is option.default_factory is unset]:
            yield f"{called} has no default for {' and '.join(bare)}", "give every option a default"
        hints = get_type_hints(member)
        for option in options:
            if type(None) in get_args(hints[option.name]) and option.default is not None:
                # TOML has no null: a written file leaves None out, and reads back as the default.
                yield f"{called} has another default than None for {option.name}", "have None be the default"
        names = {option.name for option in options}
        if lacking := [name for name in self.needs if name not in names and _lacks(member, name)]:
            yield f"{called} lacks {' and '.join(lacking)}", f"every {self.what} has {', '.join(self.needs)}"


class Choice(_ClassDoor):
    """A door for a section that is one of the members. The tag in the section names the member.

    The section is annotated `Annotated[..., door]`. Its default must be the member that was registered first.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return the schema of a union of the members, chosen by the tag. Allow None if `source` does."""
        members = {name: handler.generate_schema(member) for name, member in self.members.items()}
        schema = core_schema.tagged_union_schema(members, discriminator=self.tag)
        return core_schema.nullable_schema(schema) if type(None) in get_args(source) else schema


class Sections(_ClassDoor):
    """A door for a section that has a subsection for each member, such as `[hooks.NAME]`.

    The section is annotated `Annotated[Any, door]`.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return the schema of `self.section`."""
        return handler.generate_schema(self.section)

    @property
    def section(self) -> type:
        """A dataclass made for this section: it has a field for each registered class with options."""
        return _section(self.what, tuple(self.members.items()))

    def defaults(self) -> Any:
        """Return the section with the default of every option."""
        return self.section()

    def configured(self, section: object) -> dict[str, Any]:
        """Return an instance of every member, by name, with its options from `section`."""
        return {
            name: getattr(section, name) if hasattr(section, name) else member()
            for name, member in self.members.items()
        }


class FieldsOf:
    """A note on a free table whose keys are fields of a dataclass: `Annotated[dict, FieldsOf(class_of)]`.

    `class_of` returns the dataclass for the section that holds the table. The table has no key for the fields
    in `but`.
    """

    def __init__(self, class_of: Callable[[Any], type], but: tuple[str, ...] = ()) -> None:
        self.class_of, self.but = class_of, but


class Lines:
    """A note on a key: `lines_of` returns more lines of help for the section that holds the key."""

    def __init__(self, lines_of: Callable[[Any], list[str]]) -> None:
        self.lines_of = lines_of


class Names:
    """A note on a string key that takes a door's name, among other texts: `Annotated[str, Names(door)]`."""

    def __init__(self, door: Door) -> None:
        self.door = door


# models/registry.py uses the name "hf" for folders that describe a model.
families = Door("model family", tag="name", needs=("presets",), reserved=("hf",))
"""The model families, `Family` of models/presets.py, for the keys `model.name` and `model.flavor`."""
attentions = Choice(
    "attention backend", tag="kind", needs=("supports", "implementation", "option_refusals", "build", "mask")
)
"""The attention backends, for the section `[model.attention]`."""
datasets = Choice(
    "dataset", tag="dataset", needs=("tokenizer", "cache_folder", "validation_fraction", "open")
)
"""The datasets, for the section `[data]`."""
tokenizers = Sections("tokenizer", tag="name", needs=("build",), reserved=("problems",))
"""The tokenizers, for the key `data.tokenizer` and the sections `[tokenizers.NAME]`."""
optimizers = Choice("optimizer", tag="name", needs=("lr", "build"))
"""The optimizers, for the section `[optimizer]`."""
hooks = Sections("hook", tag="name", needs=("build",), reserved=("problems",))
"""The hooks, which a run calls at fixed points, for the sections `[hooks.NAME]`."""


def classes() -> tuple[type, ...]:
    """Return the members of every door whose members are classes."""
    doors = (attentions, datasets, tokenizers, optimizers, hooks)
    return tuple(member for door in doors for member in door.members.values())


def import_plugins(names: Sequence[str], folders: Iterable[Path], key: str = _KEY) -> list[Problem]:
    """Import the modules `names`, the value of the configuration's `key`, and return the problems.

    Python searches its own path first, then the working directory, then `folders`.
    """
    if names:
        # The folders go at the end of the path, so that no file there hides an installed module. They stay in
        # the path for later imports of the plugins, and for spawned processes.
        places = [str(folder.absolute()) for folder in (Path(), *folders)]
        sys.path += [place for place in dict.fromkeys(places) if place not in sys.path]
    return [problem for name in dict.fromkeys(names) for problem in _import(name, key)]


def _import(name: str, key: str) -> list[Problem]:
    if name.endswith(".py") or not all(part.isidentifier() for part in name.split(".")):
        remedy = 'write it as Python imports it, such as "my_package.module"'
        return [Problem(key, name, "is not the name of a module", remedy)]
    _importing.append(name)
    try:
        importlib.import_module(name)
    except ConfigError as error:
        return [dataclasses.replace(problem, key=key) for problem in error.problems]
    except (Exception, SystemExit) as error:  # noqa: BLE001 (a plugin may raise anything)
        is_absent = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        remedy = "name a module that is installed, in the working directory, or beside a --config file"
        if not is_absent:
            remedy = f'correct it; python -c "import {name}" shows where'
        return [Problem(key, name, f"cannot be imported ({type(error).__name__}: {error})", remedy)]
    finally:
        _importing.pop()
    if name not in _registering:
        place = getattr(sys.modules[name], "__file__", None) or "a part of Python"
        remedy = "name a module that does; if you mean another file of this name, rename it"
        return [Problem(key, name, f"registers nothing ({place})", remedy)]
    return []


def _lacks(member: object, name: str) -> bool:
    return getattr(getattr(member, name, None), "__isabstractmethod__", not hasattr(member, name))


def _is_same(one: Any, other: Any) -> bool:
    """Return True if the members are the same, even if their module was imported twice."""
    if isinstance(one, type) and isinstance(other, type):
        return (one.__module__, one.__qualname__) == (other.__module__, other.__qualname__)
    # A second import makes new classes for an instance's parts too, but their repr is the same.
    return repr(one) == repr(other)


@functools.cache
def _section(what: str, members: tuple[tuple[str, type], ...]) -> type:
    # A member whose only field is its tag has no options, so it gets no section.
    options = [(name, cls, field(default_factory=cls)) for name, cls in members if len(fields(cls)) > 1]

    def problems(self: Any, key: str) -> list[Problem]:
        checked = [name for name, cls, _ in options if hasattr(cls, "problems")]
        return [found for name in checked for found in getattr(self, name).problems(f"{key}.{name}")]

    namespace = {"__doc__": f"The options of each {what}.", "problems": problems}
    return make_dataclass(f"{what.title()}Sections", options, frozen=True, kw_only=True, namespace=namespace)
