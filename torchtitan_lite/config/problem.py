"""What is wrong with the user's input, said in one line each."""

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

    def __str__(self) -> str:
        shown = "" if self.value is MISSING else f" = {literal(self.value)}"
        return printable(f"{self.key}{shown} {self.rule}: {self.remedy}")


class ConfigError(Exception):
    """Everything that is wrong with the user's input, one line per problem.

    `config` is what was being read, with defaults in place of what is wrong.
    """

    def __init__(self, problems: Sequence[Problem], config: object = None) -> None:
        super().__init__(problems, config)
        self.problems = tuple(problems)
        self.config = config

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def near(name: object, choices: Iterable[object]) -> str:
    """The remedy for a name that is not among `choices`: the one that was probably meant, or all of them."""
    known = {_fold(choice): literal(choice) for choice in choices}
    if not known:
        return "leave it out"
    for close in difflib.get_close_matches(_fold(name), known, n=1):
        return f"did you mean {known[close]}?"
    return f"{'choose one of' if len(known) > 1 else 'use'} {', '.join(known.values())}"


def literal(value: object) -> str:
    """`value` the way a TOML or JSON file would write it, cut short when it is very long."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return "..."
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def dotted(key: str, name: object) -> str:
    """`name` below `key`, quoted where TOML would quote it."""
    bare = isinstance(name, str) and name and all(c.isascii() and (c.isalnum() or c in "-_") for c in name)
    part = name if bare else literal(name)
    return f"{key}.{part}" if key else str(part)


def _fold(name: object) -> str:
    return str(name).lower().replace("-", "_")


def printable(text: str) -> str:
    """`text` on one line, which a line separator or a stray byte in it must not break in two."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
