"""Presets as tables: what all sizes of a family share, and a row for each size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchtitan_lite.models.decoder import DecoderConfig

_DEBUGMODEL = {"vocab_size": 512, "max_seq_len": 2048}
"""What makes the debugmodel of a family small besides its row: it reads bytes, and short documents."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one name."""

    name: str
    """What `model.name` chooses it by."""
    presets: Mapping[str, DecoderConfig]
    """The config of each size; a family with a decoder of its own has a subclass of DecoderConfig there."""

    def __post_init__(self) -> None:
        """Raise TypeError where a preset is no DecoderConfig, or its table names a field that it lacks."""
        for size, config in self.presets.items():
            if not isinstance(config, DecoderConfig):
                raise TypeError(f"{self.name} {size} is no DecoderConfig")
            if lacking := [name for name in config.parameters.splits if not hasattr(config, name)]:
                raise TypeError(f"{type(config).__name__} has no field {lacking[0]}, by which a row is split")


def presets(
    family: Mapping[str, Any], columns: Sequence[str], sizes: Mapping[str, Sequence[Any]]
) -> dict[str, DecoderConfig]:
    """The config of every size: the family's fields, and those in `columns` from the size's row."""
    found = {}
    for size, row in sizes.items():
        small = _DEBUGMODEL if size == "debugmodel" else {}
        fields: dict[str, Any] = {**family, **dict(zip(columns, row, strict=True)), **small}
        found[size] = DecoderConfig(**fields)
    return found
