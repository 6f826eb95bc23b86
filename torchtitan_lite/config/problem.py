"""Problems in the input of the user: one line per problem."""

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MISSING = type("Missing", (), {"__repr__": lambda self: "MISSING"})()
"""The value of a problem that has none, such as a flag without its value."""

_LONGEST_VALUE = 120


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `key = value rule: remedy`, always on one line."""

    key: str
    value: object
    rule: str
    remedy: str
    reads: tuple[str, ...] = ()
    """The other keys, or sections, that the check compared the value with."""

    def __str__(self) -> str:
        shown = "" if self.value is MISSING else f" = {literal(self.value)}"
        return printable(f"{self.key}{shown} {self.rule}: {self.remedy}")


@dataclass(frozen=True)
class Remedy:
    """The remedy for a value out of range: a note beside pydantic's `Field` in an annotation."""

    text: str


class ConfigError(Exception):
    """Everything that is wrong with the user's input, one line per problem.

    `config` is the configuration that was read, without the wrong values; None in a dry run.
    """

    def __init__(self, problems: Sequence[Problem], config: object = None) -> None:
        super().__init__(problems, config)
        self.problems = tuple(problems)
        self.config = config

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def of_sound_keys(found: Iterable[Problem], refused: Iterable[Problem]) -> list[Problem]:
    """The problems in `found` whose check used no key of a problem in `refused`.

    Another value stood in for a refused one, so a check that used it says nothing about the user's input.
    """
    keys = [problem.key for problem in refused]
    return [
        problem
        for problem in found
        if not any(_overlap(used, key) for used in (problem.key, *problem.reads) for key in keys)
    ]


def _overlap(one: str, other: str) -> bool:
    """True if the keys are the same, or if one is a section that holds the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def near(name: object, choices: Iterable[object]) -> str:
    """The remedy for a name that is not among `choices`: the closest of them, otherwise all of them."""
    known = {_fold(choice): literal(choice) for choice in choices}
    if not known:
        return "leave it out"
    for close in difflib.get_close_matches(_fold(name), known, n=1):
        return f"did you mean {known[close]}?"
    return f"{'choose one of' if len(known) > 1 else 'use'} {', '.join(known.values())}"


def either(choices: Iterable[object]) -> str:
    """The choices in words: "1, 2 or 4"."""
    words = list(map(str, choices))
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def literal(value: object) -> str:
    """`value` as a TOML or JSON file has it, cut short if it is very long."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return "..."
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def dotted(key: str, name: object) -> str:
    """`name` below `key`, in quotes if TOML needs them."""
    bare = isinstance(name, str) and name and all(c.isascii() and (c.isalnum() or c in "-_") for c in name)
    part = name if bare else literal(name)
    return f"{key}.{part}" if key else str(part)


def _fold(name: object) -> str:
    return str(name).lower().replace("-", "_")


def printable(text: str) -> str:
    """`text` on one line: line separators and control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
