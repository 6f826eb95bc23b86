"""What a model says of its own parameters, once: a table, of which the first row that matches a name counts.

Tensor parallel, initialisation, optimizers, the Hugging Face names, the rules of what a mesh must divide, the
counts of parameters and the printed plan read the table. None of them has a list of its own.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from torchtitan_lite.config.load import MISSING, ConfigError, Problem

Group = Literal["matrix", "embedding", "head", "vector", "router", "expert"]
"""What optimizers choose by."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A row: what is true of every parameter whose name matches the pattern."""

    pattern: str
    """The parameter's name in the model, with * for a part of it: "blocks.*.attention.wo.weight"."""
    shard_dim: int | None = None
    """The dim that tensor parallel splits; None: every rank has the whole parameter."""
    split_by: str | None = None
    """The config field that counts what tensor parallel deals out along `shard_dim`, such as "n_heads"."""
    init: Literal["normal", "residual", "ones", "zeros"] = "normal"
    """residual: normal, narrowed by the depth of the model, for what adds to the residual stream."""
    group: Group = "matrix"
    hub: str | None = None
    """The name on the Hugging Face Hub, with {} for each * of the pattern; None: there is none."""

    def __post_init__(self) -> None:
        assert (self.shard_dim is None) == (self.split_by is None), f"{self.pattern}: what is split, by what"
        wildcards = self.pattern.count("*")
        assert self.hub is None or self.hub.count("{}") == wildcards, f"{self.pattern} is not {self.hub}"

    def hub_name(self, name: str) -> str | None:
        """The name on the Hub of the parameter `name`, which matches the pattern."""
        found = _expression(self.pattern).fullmatch(name)
        assert found is not None, f"{name} is no {self.pattern}"
        return None if self.hub is None else self.hub.format(*found.groups())


class Table:
    """The rows of a model, in order."""

    def __init__(self, rows: Iterable[Parameter]) -> None:
        self.rows = tuple(rows)

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self.rows)

    def row(self, name: str) -> Parameter | None:
        """The first row whose pattern matches `name`; None if there is none."""
        return next((row for row in self.rows if _expression(row.pattern).fullmatch(name)), None)

    def rows_of(self, names: Iterable[str], owner: str) -> dict[str, Parameter]:
        """The row of every name. Raises ConfigError, which speaks of `owner`, if a name has no row."""
        found = {name: self.row(name) for name in names}
        lacking = dict.fromkeys(_with_wildcards(name) for name, row in found.items() if row is None)
        if lacking:
            remedy = f"add a Parameter with a pattern that matches to {owner}.parameters"
            rule = f"of {owner} has no row in its table of parameters"
            raise ConfigError([Problem(f"parameter {name}", MISSING, rule, remedy) for name in lacking])
        return {name: row for name, row in found.items() if row is not None}

    def hub_name(self, name: str) -> str:
        """The name on the Hub of the parameter `name`, which has one."""
        row = self.row(name)
        theirs = None if row is None else row.hub_name(name)
        assert theirs is not None, f"{name} has no name on the Hub"
        return theirs

    def of_group(self, group: Group) -> Parameter:
        """The first row of `group`."""
        return next(row for row in self.rows if row.group == group)

    @property
    def splits(self) -> list[str]:
        """The config fields that tensor parallel deals out."""
        return list(dict.fromkeys(row.split_by for row in self.rows if row.split_by))


def hub_names(rows: Mapping[str, Parameter]) -> dict[str, str]:
    """Our name of every parameter that has a name on the Hub, by that name."""
    return {theirs: name for name, row in rows.items() if (theirs := row.hub_name(name)) is not None}


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"([^.]+)"))


def _with_wildcards(name: str) -> str:
    """The name with * for every number, so that all layers read as one."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
