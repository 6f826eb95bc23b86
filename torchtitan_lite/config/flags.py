"""Read the command line into nested tables, like those of a TOML file.

`--training.seq-len 128` sets the same key as `seq_len = 128` below `[training]`. If the key holds a string,
the text of the flag is its value. Otherwise the text is read as JSON, or as a number of TOML or Python. Text
that is neither stays a string, which validation may refuse.

`--model.overrides.n_layers 4` sets one key of a free table, which is a `dict` field. It means the same as
`--model.overrides '{"n_layers": 4}'`. All flags of one free table merge, in the order of the command line.
"""

import itertools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from torchtitan_lite.config.problem import MISSING, Problem
from torchtitan_lite.config.schema import at, choice_of, classes, first_key, note, plain_types
from torchtitan_lite.registry import FieldsOf

_MOST_RANKS = 2**31
"""The bound of --world-size, itself excluded: torch counts ranks in a C int."""
_OF_A_RUN = ("config", "dry_run", "world_size")
"""The flags that set no key. Only the configuration of a run takes them."""
_ANYTHING = bool | int | float | None
"""The annotation for a value in a free table: every word is read as the JSON that it may be."""


@dataclass
class Flags:
    """The values, files and switches of a command line."""

    keys: dict[str, Any] = field(default_factory=dict)
    """The nested tables of the flags that set one key each. If a flag is given twice, the last wins."""
    others: list[dict[str, Any]] = field(default_factory=list)
    """The tables to merge over `keys`: one for each flag of a free table, and one for each unknown key."""
    files: list[str] = field(default_factory=list)
    """The arguments of --config, in order."""
    dry_run: bool = False
    world_size: int | None = None
    """The number of ranks that a dry run checks for. None: the launcher's number."""
    help: bool = False
    problems: list[Problem] = field(default_factory=list)

    def report(self, key: str, value: object, rule: str, remedy: str) -> None:
        self.problems.append(Problem(key, value, rule, remedy))

    def put(self, path: list[str], value: object) -> None:
        """Set the key at `path` to `value`. No other flag may use `path` as a table."""
        *tables, name = path
        table = self.keys
        for part in tables:
            table = table.setdefault(part, {})
        table[name] = value


def read_flags(cls: type, argv: Sequence[str], *, of_a_run: bool = True) -> Flags:
    """Return the flags in `argv`, which lacks the program's name, for the configuration class `cls`.

    --config, --dry-run and --world-size are refused if `cls` is not the configuration `of_a_run`.
    """
    flags = Flags()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            flags.help = True
        elif word.startswith("--") and word != "--":
            name, equals, inline = word[2:].partition("=")
            words = [inline] if equals else list(itertools.takewhile(_is_value, rest))
            command = name.replace("-", "_")
            if command in _OF_A_RUN:
                used = (_read_command if of_a_run else _refuse_command)(flags, command, words)
            else:
                used = _read_flag(flags, cls, name, words)
            rest = rest if equals else rest[used:]
        else:
            option = "--section.key" if of_a_run else "--option"
            remedy = f"write {option} VALUE, and text with spaces in quotes"
            if of_a_run and word.endswith(".toml"):
                remedy = f"write --config {word}"
            flags.report("argument", word, "belongs to no flag", remedy)
    if flags.world_size is not None and not flags.dry_run:
        remedy = "start that many ranks with torchrun"
        flags.report("--world-size", flags.world_size, "is for --dry-run", remedy)
    return flags


def _is_value(word: str) -> bool:
    return not word.startswith("--") and word != "-h"


def _read_flag(flags: Flags, cls: type, name: str, words: list[str]) -> int:
    """Store the flag `--name`. Return how many of `words`, the words after the flag, are its value."""
    path = name.replace("-", "_").split(".")
    if n_outer := next((n for n in range(1, len(path)) if _is_free(at(cls, path[:n]))), 0):
        return _read_entry(flags, name, words, path[:n_outer], at(cls, path[:n_outer]))
    annotation = at(cls, path)
    positive = [*path[:-1], path[-1].removeprefix("no_")]
    if annotation is None and positive != path and bool in plain_types(at(cls, positive)):
        if words:
            flags.report(f"--{name}", words[0], "takes no value", f"write --{name} alone")
        flags.put(positive, False)
        return len(words[:1])
    if (choice := choice_of(annotation)) and choice.tag == "kind":
        path, annotation = [*path, "kind"], at(cls, [*path, "kind"])
    value, used = _value(annotation, words)
    key = ".".join(path)
    if classes(annotation):
        remedy = f"write --{key}.{first_key(annotation)} VALUE"
        flags.report(key, value, "is a section, and a flag sets one key", remedy)
    elif value is MISSING:
        flags.report(key, MISSING, "has no value", f"write --{name}=VALUE")
    elif annotation is None or _is_free(annotation):
        flags.others.append(_table(path, value))
    else:
        flags.put(path, value)
    return used


def _read_entry(flags: Flags, name: str, words: list[str], table: list[str], annotation: Any) -> int:
    """Store the flag `--name`, which sets a key inside of the free table at `table`.

    Return how many of `words`, the words after the flag, are its value. Without a value, the key is true.
    """
    keys = name.split(".")[len(table) :]
    if note(annotation, FieldsOf):
        keys = [key.replace("-", "_") for key in keys]
    value = _scalar(_ANYTHING, words[0]) if words else True
    if "" in keys:
        place = ".".join(table)
        flags.report(f"--{name}", value, f"names no key of {place}", f"write --{place}.KEY VALUE")
    else:
        flags.others.append(_table([*table, *keys], value))
    return len(words[:1])


def _refuse_command(flags: Flags, name: str, words: list[str]) -> int:
    """Report a flag that only a run takes. Return how many of `words`, which follow, are its value."""
    value = words[0] if words else MISSING
    flags.report(f"--{name.replace('_', '-')}", value, "is for training", "leave it out")
    return len(words[:1])


def _read_command(flags: Flags, name: str, words: list[str]) -> int:
    """Store --config, --dry-run or --world-size. Return how many of `words`, which follow, are its value."""
    if name == "config":
        if not words or not words[0]:
            flags.report("--config", MISSING, "has no value", "write --config FILE.toml")
        flags.files += filter(None, words[:1])
        return len(words[:1])
    value, used = _value(bool if name == "dry_run" else int, words)
    if name == "dry_run" and isinstance(value, bool):
        flags.dry_run = value
    elif name == "dry_run":
        flags.report("--dry-run", value, "is not true or false", "write --dry-run alone")
    elif type(value) is int and 0 < value < _MOST_RANKS:
        flags.world_size = value
    else:
        rule = "has no value" if value is MISSING else "is not a number of ranks"
        flags.report("--world-size", value, rule, "write --world-size 8 or the like")
    return used


def _table(path: list[str], value: object) -> dict[str, Any]:
    """Return nested tables that hold only `value`, at `path`."""
    *tables, name = path
    found = {name: value}
    for table in reversed(tables):
        found = {table: found}
    return found


def _is_free(annotation: Any) -> bool:
    return any(get_origin(tp) is dict for tp in plain_types(annotation))


def _value(annotation: Any, words: list[str]) -> tuple[object, int]:
    """Return the value that `words` spell, or MISSING without a value, and the number of words it takes."""
    options = plain_types(annotation)
    if not words:
        return (True if bool in options or annotation is None else MISSING), 0
    element = next((get_args(tp)[0] for tp in options if get_origin(tp) in (tuple, list)), None)
    if element in (int, float) and (numbers := _numbers(element, " ".join(words))):
        is_one = len(numbers) == 1 and element in options and not words[0].startswith("[")
        return (numbers[0] if is_one else numbers), len(words)
    if element and len(words) > 1:
        return [_scalar(element, word) for word in words], len(words)
    if element is str:
        texts = _json(words[0])
        return (texts if isinstance(texts, list) else [words[0]]), 1
    return _scalar(annotation, words[0]), 1


def _numbers(element: type, text: str) -> list[object]:
    """Return the numbers in `text`, written "128,64", "128 64" or "[128, 64]". Return [] for other text."""
    inside = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    found = [_scalar(element, word) for word in re.split(r"\s*,\s*|\s+", inside.strip())]
    return found if all(type(number) in (int, float) for number in found) else []


def _scalar(annotation: Any, word: str) -> object:
    options = set(plain_types(annotation))
    if type(None) in options and word in ("None", "none", "null"):
        return None
    if bool in options and word.lower() in ("true", "false"):
        return word.lower() == "true"
    is_text = all(tp is str or _is_choice_of_texts(tp) for tp in options - {type(None)})
    value = word if is_text else _json(word)
    return _number(word) if value is word and options & {int, float} else value


def _is_choice_of_texts(tp: Any) -> bool:
    return get_origin(tp) is Literal and all(isinstance(choice, str) for choice in get_args(tp))


def _number(word: str) -> object:
    """Return the number that `word` spells in TOML or Python (+5, 1_000, .5), or `word` if there is none."""
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
