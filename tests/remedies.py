"""Try the remedies of refusals: a remedy that names a value must lead to a configuration that is accepted."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torchtitan_lite.config.job import load_job
from torchtitan_lite.config.load import ConfigError, Problem

Flags = dict[str, list[str]]
"""A command line: the words after each flag, by key."""
Change = dict[str, Any]
"""The values that a remedy proposes, by key. The value of a key that is to be left out is LEFT_OUT."""

LEFT_OUT = object()
KEY = r"[a-z_]+(?:\.\w+)+"
VALUE = r'(?:"[^"]*"|\[[^\]]*\]|\{[^}]*\}|-?\d[\d.e+-]*|true|false)'
VALUES = rf"{VALUE}(?:(?:, | or ){VALUE})*"
_TABLES = ("model.overrides", "model.attention.kernel_options")


def flags_of(line: str) -> Flags:
    """The flags of a command line without quotes."""
    flags: Flags = {}
    for part in f" {line}".split(" --")[1:]:
        name, *words = part.split(" ")
        name, equals, inline = name.partition("=")
        flags[key_of(name)] = [inline] if equals else words
    return flags


def key_of(name: str) -> str:
    key = name.replace("-", "_")
    return {"model.attention": "model.attention.kind", "world_size": "--world-size"}.get(key, key)


def argv_of(flags: Flags) -> list[str]:
    return [word for key, words in flags.items() for word in (f"--{key.removeprefix('--')}", *words)]


def problems_of(flags: Flags) -> tuple[Problem, ...]:
    try:
        load_job(argv_of(flags))
    except ConfigError as error:
        return error.problems
    return ()


def changes_of(problem: Problem) -> Iterator[Change]:
    """Yield the changes that the remedy proposes, one for each alternative."""
    if "is not a known" in problem.rule and (old := re.match(rf"write ({KEY}) instead", problem.remedy)):
        yield {problem.key: LEFT_OUT, old[1]: problem.value}
        return
    for part in re.split(r", or (?=[a-z])", problem.remedy):
        used = re.match(rf"(?:use|write|choose one of) (?:at most )?({VALUES})", part)
        if re.match(r"leave (it|the key) out", part):
            yield {problem.key: LEFT_OUT}
        elif part == "write true or false":
            pass  # this is about the notation: the user knows which
        elif used:
            others = _assignments(part[used.end() :])
            yield from ({problem.key: json.loads(value), **others} for value in re.findall(VALUE, used[1]))
        elif word := re.fullmatch(r"use (\w+)", part):
            yield {problem.key: word[1]}
        elif example := re.search(rf"such as ({VALUE})", part):
            yield {problem.key: json.loads(example[1])}
        elif re.match(rf"(?:set )?{KEY}", part):
            set_there, _, left_out = part.partition(" and leave out ")
            yield {**_assignments(set_there), **dict.fromkeys(re.findall(KEY, left_out), LEFT_OUT)}


def _assignments(text: str) -> Change:
    """The keys in `text`, each with its value, or true for a switch that is to be set."""
    found = re.findall(rf"({KEY})(?: (?:=|to) ({VALUE}))?", text)
    return {key: json.loads(value) if value else True for key, value in found}


def changed(flags: Flags, change: Change) -> Flags:
    """The flags after a change."""
    flags = dict(flags)
    for key, value in change.items():
        table = next((table for table in _TABLES if key.startswith(f"{table}.")), None)
        if table is not None:
            content = json.loads(flags[table][0]) if table in flags else {}
            content.pop(key.removeprefix(f"{table}."), None)
            if value is not LEFT_OUT:
                content[key.removeprefix(f"{table}.")] = value
            key, value = table, content
        flags.pop(key, None)
        if value is not LEFT_OUT:
            flags[key] = [value if isinstance(value, str) else json.dumps(value)]
    return flags


def check_values(flags: Flags) -> int:
    """Try every remedy for `flags`: no value of the remedy may be refused. Return how many were tried.

    The changed configuration may have another problem, such as an option that the new attention lacks.
    """
    tried = [(problem, change) for problem in problems_of(flags) for change in changes_of(problem)]
    for problem, change in tried:
        left = problems_of(changed(flags, change))
        assert not {other.key for other in left} & change.keys(), f"{problem}\nthen {[*map(str, left)]}"
    return len(tried)


def check(flags: Flags) -> int:
    """Try every remedy for `flags`: nothing may be refused but what is refused already.

    Some of the remedies together must leave no problem, unless a remedy names no value. Return how many were
    tried.
    """
    found = problems_of(flags)
    proposed = [[*changes_of(problem)] for problem in found]
    for problem, changes in zip(found, proposed, strict=True):
        known = {other.key for other in found if other is not problem}
        for change in changes:
            left = problems_of(changed(flags, change))
            assert {other.key for other in left} <= known, f"{problem}\nthen {[*map(str, left)]}"
        assert changes or not re.search(rf"\b(use|set) {VALUE}", problem.remedy), f"not tried: {problem}"
    if all(proposed):
        some = itertools.chain(*(itertools.combinations(proposed, n) for n in range(len(found), -1, -1)))
        assert any(problems_of(_all_changed(flags, firsts)) == () for firsts in some), [*map(str, found)]
    return sum(map(len, proposed))


def _all_changed(flags: Flags, proposed: Iterable[list[Change]]) -> Flags:
    for changes in proposed:
        flags = changed(flags, changes[0])
    return flags
