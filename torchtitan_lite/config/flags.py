"""The command line, as one more layer of nested tables.

`--training.seq-len 128` sets what `seq_len = 128` below `[training]` would set. Text is taken as it stands
where the key holds a string; everything else is read as JSON, or as a number of TOML or Python, and what is
neither is left for the validation. Of a flag given twice the last wins, but free tables merge.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from torchtitan_lite.config.problem import MISSING, Problem
from torchtitan_lite.config.schema import (
    alternatives,
    at,
    classes,
    field_types,
    first_key,
    members_by_tag,
    tag,
)
from torchtitan_lite.config.validation import Afresh, overlay, unknown_key

_MOST_RANKS = 2**31
"""What torch counts ranks in is a C int."""


@dataclass
class Flags:
    """What the command line says of a configuration of class `cls`."""

    cls: type
    layer: dict[str, Any] = field(default_factory=dict)
    """Nested tables, as a file would give them."""
    files: list[str] = field(default_factory=list)
    """Arguments of --config, in order."""
    dry_run: bool = False
    world_size: int | None = None
    """The number of ranks that a dry run is checked for; None: that of the launcher."""
    help: bool = False
    problems: list[Problem] = field(default_factory=list)

    def report(self, key: str, value: object, rule: str, remedy: str) -> None:
        self.problems.append(Problem(key, value, rule, remedy))

    def put(self, path: list[str], value: object) -> None:
        *tables, name = path
        table = self.layer
        for part in tables:
            table = table.setdefault(part, {})
        table[name] = overlay(table.get(name), value)


def read_flags(cls: type, argv: Sequence[str]) -> Flags:
    """Read `argv`, the arguments after the program's name."""
    flags = Flags(cls)
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            flags.help = True
        elif word.startswith("--") and word != "--":
            name, equals, inline = word[2:].partition("=")
            words = [inline] if equals else _before_next_flag(rest)
            used = _read_flag(flags, name, words)
            rest = rest if equals else rest[used:]
        else:
            remedy = "write --section.key VALUE, and text with spaces in quotes"
            flags.report("argument", word, "belongs to no flag", remedy)
    if flags.world_size is not None and not flags.dry_run:
        remedy = "start that many ranks with torchrun"
        flags.report("--world-size", flags.world_size, "is for --dry-run", remedy)
    return flags


def _before_next_flag(words: list[str]) -> list[str]:
    ends = (i for i, word in enumerate(words) if word.startswith("--") or word == "-h")
    return words[: next(ends, len(words))]


def _read_flag(flags: Flags, name: str, words: list[str]) -> int:
    """Set what `--name` sets, and return how many of `words`, which follow it, belong to it."""
    path = name.replace("-", "_").split(".")
    if path == ["config"]:
        if not words or not words[0]:
            flags.report("--config", MISSING, "has no value", "write --config FILE.toml")
        flags.files += filter(None, words[:1])
        return len(words[:1])
    if path == ["dry_run"]:
        value, used = _value(bool, words)
        if isinstance(value, bool):
            flags.dry_run = value
        else:
            flags.report("--dry-run", value, "is not true or false", "write --dry-run alone")
        return used
    if path == ["world_size"]:
        return _read_world_size(flags, words)
    annotation = at(flags.cls, path)
    positive = [*path[:-1], path[-1].removeprefix("no_")]
    if annotation is None and positive != path and bool in alternatives(at(flags.cls, positive)):
        return _read_negation(flags, positive, name, words)
    if members_by_tag(annotation) and tag(annotation) == "kind":
        path, annotation = [*path, "kind"], at(flags.cls, [*path, "kind"])
    if annotation is None or classes(annotation):
        flags.problems.append(_refusal(flags.cls, path, _json(words[0]) if words else MISSING))
        return len(words[:1])
    value, used = _value(annotation, words)
    if value == {}:
        value = Afresh()
    if value is MISSING:
        flags.report(".".join(path), MISSING, "has no value", f"write --{name}=VALUE")
    else:
        flags.put(path, value)
    return used


def _read_world_size(flags: Flags, words: list[str]) -> int:
    value, used = _value(int, words)
    if type(value) is int and 0 < value < _MOST_RANKS:
        flags.world_size = value
    else:
        rule = "has no value" if value is MISSING else "is not a number of ranks"
        flags.report("--world-size", value, rule, "write --world-size 8 or the like")
    return used


def _read_negation(flags: Flags, path: list[str], name: str, words: list[str]) -> int:
    if words:
        flags.report(f"--{name}", words[0], "takes no value", f"write --{name} alone")
    else:
        flags.put(path, False)
    return len(words[:1])


def _refusal(cls: type, path: list[str], value: object) -> Problem:
    """What is wrong with a flag that sets no key: it names a section, a part of a value, or nothing."""
    depth = max(n for n in range(len(path) + 1) if at(cls, path[:n]) is not None)
    key, rest = ".".join(path[:depth]), path[depth:]
    owners = classes(at(cls, path[:depth]))
    if not rest:
        remedy = f"write --{key}.{first_key(at(cls, path))} VALUE"
        return Problem(key, value, "is a section, and a flag sets one key", remedy)
    if not owners:
        return Problem(".".join(path), value, f"is inside {key}", f"write --{key} VALUE, a table as JSON")
    for name in reversed(rest[1:]):
        value = {name: None if value is MISSING else value}
    known = [name for owner in owners for name in field_types(owner)]
    return unknown_key(cls, list(dict.fromkeys(known)), key, rest[0], value)


def _value(annotation: Any, words: list[str]) -> tuple[object, int]:
    """The value that `words` write, and how many of them it takes; MISSING where there is none."""
    options = alternatives(annotation)
    if not words:
        return (True if bool in options else MISSING), 0
    sequences = [tp for tp in options if get_origin(tp) in (tuple, list)]
    if sequences and len(words) > 1:
        element = get_args(sequences[0])[0]
        return [_scalar(element, word) for word in words], len(words)
    if sequences and get_args(sequences[0])[0] is str:
        texts = _json(words[0])
        return (texts if isinstance(texts, list) else [words[0]]), 1
    return _scalar(annotation, words[0]), 1


def _scalar(annotation: Any, word: str) -> object:
    options = set(alternatives(annotation))
    if type(None) in options and word in ("None", "none", "null"):
        return None
    if bool in options and word.lower() in ("true", "false"):
        return word.lower() == "true"
    is_text = all(tp is str or get_origin(tp) is Literal for tp in options - {type(None)})
    value = word if is_text else _json(word)
    return _number(word) if value is word and options & {int, float} else value


def _number(word: str) -> object:
    """A number that JSON has no form for, as TOML or Python write it: +5, 1_000, .5; else the word itself."""
    if re.fullmatch(r"[+-]?[\d.][\w.+-]*", word, re.ASCII):
        try:
            return int(word, 0)
        except ValueError:
            pass
        try:
            return value if math.isfinite(value := float(word)) else word
        except ValueError:
            pass
    return word


def _json(word: str) -> object:
    try:
        return json.loads(word)
    except (ValueError, RecursionError):
        return word
