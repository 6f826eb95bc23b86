"""Presets from tables: the fields that all sizes of a family share, and a row of fields for each size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchtitan_lite.models.decoder import DecoderConfig

_DEBUGMODEL = {"vocab_size": 512, "max_seq_len": 2048}
"""The fields of the debugmodel of every family. It reads bytes and short documents."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: decoders of several sizes under one name."""

    name: str
    """The value of `model.name` that chooses this family."""
    presets: Mapping[str, DecoderConfig]
    """The config of each size: a DecoderConfig or, for another architecture, a subclass of it."""

    def __post_init__(self) -> None:
        """Raise TypeError if a preset is no DecoderConfig or lacks a field that its parameter table names."""
        for size, config in self.presets.items():
            if not isinstance(config, DecoderConfig):
                raise TypeError(f"{self.name} {size} is no DecoderConfig")
            if lacking := [name for name in config.parameters.splits if not hasattr(config, name)]:
                raise TypeError(f"{type(config).__name__} has no field {lacking[0]}, by which a row is split")


def presets(
    family: Mapping[str, Any], columns: Sequence[str], sizes: Mapping[str, Sequence[Any]]
) -> dict[str, DecoderConfig]:
    """Return the config of every size. Each has the fields of the family and the size's row of `columns`."""
    found = {}
    for size, row in sizes.items():
        small = _DEBUGMODEL if size == "debugmodel" else {}
        fields: dict[str, Any] = {**family, **dict(zip(columns, row, strict=True)), **small}
        found[size] = DecoderConfig(**fields)
    return found
