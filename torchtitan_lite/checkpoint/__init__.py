"""The state of a run on disk, from which it can go on."""

from dataclasses import dataclass
from typing import Annotated

from torchtitan_lite.config.load import Available


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Whether the state of the run is saved. So far it is not."""

    enable: Annotated[bool, Available(False)] = False
    """Save the state of the run. Only false so far."""
