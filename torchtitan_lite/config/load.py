"""Load the command line, and the files that it names, into a frozen dataclass.

The defaults, the files and the flags are layers of nested tables. Each layer overrides the layers before it.
Files and flags pass the same validation, so all problems are reported at once. Every field of the dataclass
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
    """The configuration that a command line describes."""

    config: T
    dry_run: bool
    """True if the user only asked to see the configuration (--dry-run)."""
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
    of_a_run: bool = True,
) -> Loaded[T]:
    """Load the command line `argv`, and the files that it names, into a `cls`.

    `--help` prints the options, with the values read so far as their defaults, and raises SystemExit(0).
    Raises ConfigError with all problems.

    Args:
        expand: rewrites the layers (files, then flags) before they are merged.
        check: `check(config, world_size, dry_run)` returns the problems between values that are valid alone.
        world_size: the number of ranks, unless --world-size names another number for a dry run.
        plugins: the key that lists the modules to import first. Empty: no key does.
        of_a_run: True if `cls` configures a run, which takes --config, --dry-run and --world-size.
    """
    flags = read_flags(cls, argv, of_a_run=of_a_run)
    tables, unread = [], []
    for path in flags.files:
        table, found = read_toml(path)
        tables.append(table)
        unread += found
    faults = _import_plugins([*tables, flags.keys], plugins, flags.files)
    flags = read_flags(cls, argv, of_a_run=of_a_run)  # read again, because a plugin may have added options
    config, found = validate(cls, expand([*tables, flags.keys, *flags.others]))
    problems = [*unread, *flags.problems, *found]
    world_size = flags.world_size or world_size
    # A file that could not be read may set any value, so checks between values would mislead.
    if not unread and not flags.help:
        problems += of_sound_keys(check(config, world_size, flags.dry_run), problems)
    # If a plugin failed, sections that plugins extend may lack options: drop the problems there.
    unsound = {name for name, annotation in field_types(cls).items() if faults and is_open(annotation)}
    problems = [*faults, *(found for found in problems if found.key.partition(".")[0] not in unsound)]
    if flags.help:
        from torchtitan_lite.config.help import print_help

        print_help(config, prog, of_a_run=of_a_run)
        if problems:
            print(ConfigError(problems), file=sys.stderr)
        raise SystemExit(0)
    if problems:
        raise ConfigError(problems, None if flags.dry_run else config)
    return Loaded(config=config, dry_run=flags.dry_run, world_size=world_size)


def last_said(layers: Sequence[_Table], key: str) -> Any:
    """Return the value of the dotted `key` in the last layer that has the key, or None if no layer has it."""
    path = tuple(key.split("."))
    said = [holder(layer, path).get(path[-1]) for layer in layers]
    return next((value for value in reversed(said) if value is not None), None)


def _import_plugins(layers: list[_Table], key: str, files: list[str]) -> list[Problem]:
    """Import the modules that the value of `key` lists. Return the problems with these modules."""
    names = last_said(layers, key) if key else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []  # validation refuses this value
    return import_plugins(names, [Path(path).parent for path in files if os.path.isfile(path)], key)
