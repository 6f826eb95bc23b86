"""Defaults, TOML files and flags, each laid over the one before, to one frozen dataclass.

Every field of the dataclass, and of those below it, has a default, and one that may be None has None. The
flags are the last layer and pass the same validation as the files, so that all problems are reported at once.
"""

import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torchtitan_lite.config.flags import read_flags
from torchtitan_lite.config.problem import MISSING, ConfigError, Problem, near
from torchtitan_lite.config.schema import Available, open_sections
from torchtitan_lite.config.toml import read_toml, to_toml
from torchtitan_lite.config.validation import Afresh, overlay, validate
from torchtitan_lite.registry import import_plugins

__all__ = [
    "MISSING",
    "Afresh",
    "Available",
    "ConfigError",
    "Loaded",
    "Problem",
    "load",
    "near",
    "of_sound_values",
    "overlay",
    "to_toml",
]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Loaded(Generic[T]):
    """What the command line came to."""

    config: T
    dry_run: bool
    """Whether the user asked to see the configuration alone."""
    files: tuple[str, ...]
    """The files that were read, in order."""
    world_size: int
    """The number of ranks that the configuration was checked for."""


def load(
    cls: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    layer_hook: Callable[[dict[str, Any]], dict[str, Any]] = lambda layer: layer,
    check: Callable[[T, int, bool], list[Problem]] = lambda config, world_size, dry_run: [],
    world_size: int = 1,
    plugins: str = "",
) -> Loaded[T]:
    """Read the command line `argv`, and the files that it names, into a `cls`.

    `layer_hook` may rewrite each layer before it is merged. `check(config, world_size, dry_run)` finds what
    is wrong although each value has its type; a dry run may name another `world_size` than the one given
    here. `plugins` is the key, if there is one, that names modules to import first. Raises ConfigError with
    everything that is wrong. `--help` prints the options, with the values read so far as their defaults, and
    raises SystemExit(0).
    """
    flags = read_flags(cls, argv)
    layers, problems = [], []
    for path in flags.files:
        table, found = read_toml(path)
        layers.append(table)
        problems += found
    unread = bool(problems)
    faults = _import_plugins([*layers, flags.layer], plugins, flags.files)
    flags = read_flags(cls, argv)  # again: a plugin may have added options
    config, found = validate(cls, [layer_hook(layer) for layer in (*layers, flags.layer)])
    problems += [*flags.problems, *found]
    # Without all plugins, nobody knows what is wrong in the sections that plugins add to.
    unsound = open_sections(cls) if faults else ()
    if flags.help:
        _print_help(config, prog, [*faults, *_outside(unsound, problems)])
        raise SystemExit(0)
    world_size = flags.world_size or world_size
    if not unread:
        problems += of_sound_values(check(config, world_size, flags.dry_run), problems)
    if problems := [*faults, *_outside(unsound, problems)]:
        raise ConfigError(problems, config)
    return Loaded(config=config, dry_run=flags.dry_run, files=tuple(flags.files), world_size=world_size)


def _outside(sections: Collection[str], problems: list[Problem]) -> list[Problem]:
    """Those of `problems` whose keys are in none of `sections`."""
    return [problem for problem in problems if problem.key.partition(".")[0] not in sections]


def _import_plugins(layers: list[dict[str, Any]], key: str, files: list[str]) -> list[Problem]:
    """Import the modules that `key` names in the last layer that has it; what is wrong with them."""
    if not key:
        return []
    names: Any = []
    for layer in layers:
        table: Any = layer
        for part in key.split("."):
            table = table.get(part) if isinstance(table, dict) else None
        names = names if table is None else table
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []  # which the validation says
    return import_plugins(names, [Path(path).parent for path in files if os.path.isfile(path)], key)


def of_sound_values(found: list[Problem], earlier: list[Problem]) -> list[Problem]:
    """Those of `found` that mention no key of an `earlier` problem, where a default stood in.

    What mentions a section as `[section]` rests on all of its keys.
    """
    keys = [problem.key for problem in earlier]
    unsound = [re.compile(rf"(?<![\w.-]){re.escape(key)}(?![\w-])") for key in keys]
    unsound += [re.compile(re.escape(f"[{key.rpartition('.')[0]}]")) for key in keys if "." in key]
    return [problem for problem in found if not any(key.search(str(problem)) for key in unsound)]


def _print_help(config: object, prog: str, problems: list[Problem]) -> None:
    from torchtitan_lite.config.help import print_help

    print_help(config, prog)
    if problems:
        print(ConfigError(problems), file=sys.stderr)
