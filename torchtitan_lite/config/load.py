"""Reads the command line, and the files that it names, into a frozen dataclass.

Defaults, files and flags are layers of nested tables, each laid over the one before (`validation`). The flags
pass the same validation as the files, so that all problems are reported at once. Every field of the dataclass
has a default, and a field that may be None has None as its default.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torchtitan_lite.config.flags import read_flags
from torchtitan_lite.config.problem import MISSING, ConfigError, Problem, near, of_sound_keys
from torchtitan_lite.config.schema import field_types, is_open
from torchtitan_lite.config.toml import read_toml
from torchtitan_lite.config.validation import holder, to_toml, validate
from torchtitan_lite.registry import import_plugins

__all__ = ["MISSING", "ConfigError", "Loaded", "Problem", "last_said", "load", "near", "to_toml"]

T = TypeVar("T")
_Table = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Loaded(Generic[T]):
    """The configuration of a command line."""

    config: T
    dry_run: bool
    """Whether the user asked to see the configuration only."""
    world_size: int
    """The number of ranks that the configuration was checked for."""


def load(
    cls: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    expand: Callable[[list[_Table]], list[_Table]] = lambda layers: layers,
    check: Callable[[T, int, bool], list[Problem]] = lambda config, world_size, dry_run: [],
    world_size: int = 1,
    plugins: str = "",
) -> Loaded[T]:
    """Read the command line `argv`, and the files that it names, into a `cls`.

    `expand` may rewrite the layers before they are laid over each other. `check(config, world_size, dry_run)`
    finds what is wrong between values that are right in themselves; a dry run may name another `world_size`
    than this one. `plugins` is the key that names modules to import first. `--help` prints the options, with
    the values read so far as their defaults, and raises SystemExit(0). Raises ConfigError with all problems.
    """
    flags = read_flags(cls, argv)
    tables, unread = [], []
    for path in flags.files:
        table, found = read_toml(path)
        tables.append(table)
        unread += found
    faults = _import_plugins([*tables, flags.keys], plugins, flags.files)
    flags = read_flags(cls, argv)  # again: a plugin may have added options
    config, found = validate(cls, expand([*tables, flags.keys, *flags.others]))
    problems = [*unread, *flags.problems, *found]
    world_size = flags.world_size or world_size
    # A file that could not be read may have held any value.
    if not unread and not flags.help:
        problems += of_sound_keys(check(config, world_size, flags.dry_run), problems)
    # The sections that plugins add to cannot be judged without all plugins.
    unsound = {name for name, annotation in field_types(cls).items() if faults and is_open(annotation)}
    problems = [*faults, *(found for found in problems if found.key.partition(".")[0] not in unsound)]
    if flags.help:
        from torchtitan_lite.config.help import print_help

        print_help(config, prog)
        if problems:
            print(ConfigError(problems), file=sys.stderr)
        raise SystemExit(0)
    if problems:
        raise ConfigError(problems, None if flags.dry_run else config)
    return Loaded(config=config, dry_run=flags.dry_run, world_size=world_size)


def last_said(layers: Sequence[_Table], key: str) -> Any:
    """The value of the dotted `key` in the last layer that has the key; None if no layer has it."""
    path = tuple(key.split("."))
    said = [holder(layer, path).get(path[-1]) for layer in layers]
    return next((value for value in reversed(said) if value is not None), None)


def _import_plugins(layers: list[_Table], key: str, files: list[str]) -> list[Problem]:
    """Import the modules that `key` names; returns what is wrong with them."""
    names = last_said(layers, key) if key else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []  # validation refuses any other value
    return import_plugins(names, [Path(path).parent for path in files if os.path.isfile(path)], key)
