"""Print `--help`: every option, its type, the docstring of its field, and its value so far."""

import ast
import dataclasses
import functools
import inspect
import itertools
import json
import shlex
import shutil
import textwrap
from collections.abc import Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from torchtitan_lite.config.messages import limits
from torchtitan_lite.config.problem import printable
from torchtitan_lite.config.schema import at, choice_of, field_types, is_fixed, leaves, note, plain_types
from torchtitan_lite.registry import Choice, FieldsOf, Lines, Names

_COMMAND = {
    "-h, --help": "Show this help and exit.",
    "--version": "Show the versions of torchtitan_lite, torch and Python, and exit.",
}
_OF_A_RUN = {
    "--config FILE.toml": (
        "Read this file. Several --config merge from left to right; the options below override them."
    ),
    "--dry-run": "Check everything, print the resolved configuration as TOML, and exit.",
    "--world-size N": "With --dry-run: check for this many ranks, without torchrun.",
}
"""The options that are no keys of the configuration, and their help texts. Only a run takes the latter."""


def print_help(config: Any, prog: str, *, of_a_run: bool = True) -> None:
    """Print every option and its value in `config`. Of a choice, print the options of the chosen member.

    --config and the like are printed only if `config` is the configuration `of_a_run`.
    """
    print(f"usage: {prog} [-h] [OPTIONS]\n")
    for line in filter(None, _docstring(type(config)).splitlines()):
        _print(line)
    options = _COMMAND | (_OF_A_RUN if of_a_run else {})
    _print_section(config, key="", annotation=type(config), text="", options=options)


def _print_section(config: Any, key: str, annotation: Any, text: str, options: dict[str, str]) -> None:
    """Print `options` and the options of the section `config`, then the sections inside `config`.

    `annotation` is the annotation of the field that holds the section. `text` describes the section.
    """
    texts = _field_docstrings(type(config))
    choice, options, sections = choice_of(annotation), dict(options), []
    for name, child in field_types(type(config)).items():
        value, path = getattr(config, name), f"{key}.{name}".lstrip(".")
        if dataclasses.is_dataclass(value):
            sections.append((value, path, child, texts.get(name) or _first_paragraph(type(value))))
        elif choice and name == choice.tag:
            options |= _selector(key if name == "kind" else path, choice, value)
        else:
            options[_usage(path, child)] = _described(child, value, texts.get(name, ""), _more(config, child))
    if options:
        print()
        _print(f"{key.replace('_', '-')} options:")
    if options and text:
        _print(text, indent=2)
    for usage, described in options.items():
        _print(usage, indent=2)
        for line in described.splitlines():
            _print(line, indent=8)
    for section in sections:
        _print_section(*section, options={})


def _print(text: str, indent: int = 0) -> None:
    """Print `text`, folded to the width of the terminal."""
    width = max(shutil.get_terminal_size().columns - indent, indent + 1)
    folded = textwrap.fill(" ".join(text.split()), width, break_on_hyphens=False)
    print(textwrap.indent(folded, " " * indent))


def _selector(path: str, choice: Choice, chosen: object) -> dict[str, str]:
    """Return the usage and the help text of the option that chooses a member of `choice`."""
    lines = {name: _first_paragraph(member) for name, member in choice.members.items()}
    described = [f"{name}: {line}" for name, line in lines.items() if line]
    described.append("Each has options of its own; those shown here are the chosen one's.")
    annotation = Literal[tuple(choice.members)]  # pyright: ignore[reportInvalidTypeForm]
    return {_usage(path, annotation): _described(annotation, chosen, " ".join(described))}


def _usage(path: str, annotation: Any) -> str:
    """Return how to write an option, such as `--training.steps INT`."""
    flag = f"--{path.replace('_', '-')}"
    if plain_types(annotation) == [bool]:
        section, dot, name = flag.removeprefix("--").rpartition(".")
        return f"{flag}, --{section}{dot}no-{name}"
    if any(get_origin(tp) is dict for tp in plain_types(annotation)):
        return f"{flag} JSON, {flag}.KEY VALUE"
    return f"{flag} {'|'.join(map(_metavar, plain_types(annotation)))}"


def _metavar(tp: Any) -> str:
    origin, args = get_origin(tp) or tp, get_args(tp)
    if origin in (Literal, NoneType):
        return f"{{{','.join(map(str, args or [None]))}}}"
    if origin in (tuple, list):
        element = _metavar(args[0])
        is_pair = origin is tuple and args[-1] is not ...
        return f"{{{' '.join(map(_metavar, args))}}}" if is_pair else f"[{element} [{element} ...]]"
    return "JSON" if origin is dict else origin.__name__.upper()


def _more(section: Any, annotation: Any) -> list[str]:
    """Return the lines that the notes in `annotation` add to the help text of an option of `section`."""
    found = []
    if fields := note(annotation, FieldsOf):
        cls = fields.class_of(section)
        keys = {key: at(cls, key.split(".")) for key in leaves(cls) if key.split(".")[0] not in fields.but}
        typed = (f"{key} {'|'.join(map(_metavar, plain_types(tp)))}" for key, tp in keys.items())
        found.append(f"Keys: {', '.join(typed)}.")
    return found + (lines.lines_of(section) if (lines := note(annotation, Lines)) else [])


def _described(annotation: Any, value: object, text: str, more: Sequence[str] = ()) -> str:
    """Return the help text of an option: its meaning, its range, the names to choose from, its default.

    The lines of `more` stand before the default, each on a line of its own.
    """
    parts = [text or "The name of this section; nothing else may stand here." * is_fixed(annotation)]
    if range_ := limits(annotation):
        parts.append(f"{range_[0].upper()}{range_[1:]}.")
    if names := note(annotation, Names):
        parts.append(f"Names: {', '.join(names.door.members)}.")
    words = value if isinstance(value, list | tuple) else [value]
    texts = [json.dumps(word) if isinstance(word, dict) else str(word) for word in words]
    lines = [" ".join(" ".join(parts).split()), *more]
    lines[-1] = f"{lines[-1]} (default: {printable(shlex.join(texts))})".lstrip()
    return "\n".join(lines)


def _first_paragraph(cls: type) -> str:
    """Return the first paragraph of a class's docstring."""
    return _docstring(cls).partition("\n\n")[0]


def _docstring(cls: type) -> str:
    """Return a class's own docstring, or "" if the class has none.

    The docstring is read from the source, because `python -OO` drops docstrings. Where there is none,
    dataclass() sets its signature as the docstring.
    """
    if definition := _definition(cls):
        return ast.get_docstring(definition) or ""
    text = inspect.getdoc(cls) or ""
    return "" if text.startswith(f"{cls.__name__}(") else text


def _field_docstrings(cls: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, inherited fields included."""
    found = {}
    for owner in reversed(cls.__mro__):
        definition = _definition(owner)
        for statement, after in itertools.pairwise(definition.body if definition else []):
            match statement, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = text
    return found


@functools.cache
def _definition(cls: type) -> ast.ClassDef | None:
    """Return the definition of a class in its source, or None if the source is in no file."""
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError):
        return None
    return definition if isinstance(definition, ast.ClassDef) else None
