"""The table in which a model describes its parameters. The first row that matches a parameter's name counts.

Tensor parallel, initialisation, optimizers, Hugging Face names, the sizes that a mesh must divide, the
counts of parameters and the printed plan read this table. None of them has its own list of parameters.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from torchtitan_lite.config.load import MISSING, ConfigError, Problem

Group = Literal["matrix", "embedding", "head", "vector", "router", "expert"]
"""The kinds of parameters that an optimizer may treat differently."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A row of the parameter table. It describes every parameter whose name matches `pattern`."""

    pattern: str
    """The name in the model, where * stands for one part of the name: "blocks.*.attention.wo.weight"."""
    shard_dim: int | None = None
    """The dim that tensor parallel shards. None: every rank has the whole parameter."""
    split_by: str | None = None
    """The config field whose value the ranks divide along `shard_dim`, such as "n_heads"."""
    init: Literal["normal", "residual", "ones", "zeros"] = "normal"
    """The initial values. residual: normal, narrower in deeper models, to add to the residual stream."""
    group: Group = "matrix"
    hub: str | None = None
    """The name on the Hugging Face Hub, with {} for each * of the pattern. None: no name there."""

    def __post_init__(self) -> None:
        has_both = (self.shard_dim is None) == (self.split_by is None)
        assert has_both, f"{self.pattern}: shard_dim and split_by belong together"
        wildcards = self.pattern.count("*")
        assert self.hub is None or self.hub.count("{}") == wildcards, f"{self.hub} needs {wildcards} of {{}}"

    def hub_name(self, name: str) -> str | None:
        """Return the name on the Hub, if any, of the parameter `name`, which must match the pattern."""
        found = _expression(self.pattern).fullmatch(name)
        assert found is not None, f"{name} is no {self.pattern}"
        return None if self.hub is None else self.hub.format(*found.groups())


class Table(tuple[Parameter, ...]):
    """The parameter table of a model: its rows, in the order in which they are tried."""

    def row(self, name: str) -> Parameter | None:
        """Return the first row whose pattern matches `name`, or None."""
        return next((row for row in self if _expression(row.pattern).fullmatch(name)), None)

    def rows_of(self, names: Iterable[str], owner: str) -> dict[str, Parameter]:
        """Return the row of every name. Raise ConfigError, which names `owner`, if a name has no row."""
        found = {name: self.row(name) for name in names}
        lacking = dict.fromkeys(_with_wildcards(name) for name, row in found.items() if row is None)
        if lacking:
            remedy = f"add a Parameter with a pattern that matches to {owner}.parameters"
            rule = f"of {owner} has no row in its table of parameters"
            raise ConfigError([Problem(f"parameter {name}", MISSING, rule, remedy) for name in lacking])
        return {name: row for name, row in found.items() if row is not None}

    def hub_name(self, name: str) -> str:
        """Return the name on the Hub of the parameter `name`, which must have a name there."""
        row = self.row(name)
        theirs = None if row is None else row.hub_name(name)
        assert theirs is not None, f"{name} has no name on the Hub"
        return theirs

    def of_group(self, group: Group) -> Parameter:
        """Return the first row whose group is `group`."""
        return next(row for row in self if row.group == group)

    @property
    def splits(self) -> list[str]:
        """The config fields whose values the tensor-parallel degree must divide."""
        return list(dict.fromkeys(row.split_by for row in self if row.split_by))


def hub_names(rows: Mapping[str, Parameter]) -> dict[str, str]:
    """Return the name in this package of each parameter, by its name on the Hub."""
    return {theirs: name for name, row in rows.items() if (theirs := row.hub_name(name)) is not None}


@cache
def _expression(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"([^.]+)"))


def _with_wildcards(name: str) -> str:
    """Return `name` with * for every number, so that one error line serves all layers of a parameter."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
