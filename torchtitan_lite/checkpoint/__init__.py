"""The state of a run on disk, from which it can go on."""

from dataclasses import dataclass
from typing import Annotated

from torchtitan_lite.config.load import Available


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Whether the state of the run is saved. So far it is not."""

    enable: Annotated[bool, Available(False)] = False
    """Save the state of the run. Only false so far."""
    interval: Annotated[int, Available(500)] = 500
    """Steps between two saves. Only 500 so far."""
    load_step: Annotated[int, Available(-1)] = -1
    """Step to go on from. -1: the last one that was saved."""
