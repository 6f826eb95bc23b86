"""Problems in the user's input. Each problem is reported in one line."""

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MISSING = type("Missing", (), {"__repr__": lambda self: "MISSING"})()
"""The placeholder for an absent value, as in the problem of a flag that lacks its value."""

_LONGEST_VALUE = 120


@dataclass(frozen=True)
class Problem:
    """One problem in the user's input. Its text is always one line: `key = value rule: remedy`."""

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
    """The remedy for a value out of range. It stands in an annotation, beside pydantic's `Field`."""

    text: str


class ConfigError(Exception):
    """An error with all problems in the user's input, one line per problem.

    `config` is the configuration without the wrong values, or None if it is not known, as in a dry run.
    """

    def __init__(self, problems: Sequence[Problem], config: object = None) -> None:
        super().__init__(problems, config)
        self.problems = tuple(problems)
        self.config = config

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def of_sound_keys(found: Iterable[Problem], refused: Iterable[Problem]) -> list[Problem]:
    """Return the problems in `found` whose check used no key of a problem in `refused`.

    A refused value was replaced, so a check of the replacement says nothing about the user's input.
    """
    keys = [problem.key for problem in refused]
    return [
        problem
        for problem in found
        if not any(_overlap(used, key) for used in (problem.key, *problem.reads) for key in keys)
    ]


def _overlap(one: str, other: str) -> bool:
    """Return True if the keys are equal, or if one key is a section that holds the other key."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def near(name: object, choices: Iterable[object]) -> str:
    """Return the remedy for a name that is not in `choices`: the closest choice, or a list of all choices."""
    known = {_fold(choice): literal(choice) for choice in choices}
    if not known:
        return "leave it out"
    for close in difflib.get_close_matches(_fold(name), known, n=1):
        return f"did you mean {known[close]}?"
    return f"{'choose one of' if len(known) > 1 else 'use'} {', '.join(known.values())}"


def either(choices: Iterable[object]) -> str:
    """Return the choices in words, such as "1, 2 or 4"."""
    words = list(map(str, choices))
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def literal(value: object) -> str:
    """Return `value` as TOML or JSON writes it, cut short if it is very long."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return "..."
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def dotted(key: str, name: object) -> str:
    """Return the key `key.name`. The name is in quotes if TOML needs quotes."""
    bare = isinstance(name, str) and name and all(c.isascii() and (c.isalnum() or c in "-_") for c in name)
    part = name if bare else literal(name)
    return f"{key}.{part}" if key else str(part)


def _fold(name: object) -> str:
    return str(name).lower().replace("-", "_")


def printable(text: str) -> str:
    """Return `text` on one line, with line separators and control characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
