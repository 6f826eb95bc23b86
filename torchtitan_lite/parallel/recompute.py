"""Which activations are computed again in the backward pass instead of being kept."""

from dataclasses import dataclass
from typing import Annotated

from torchtitan_lite.config.load import Available


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointConfig:
    """What is recomputed to save memory. So far nothing is."""

    mode: Annotated[str, Available("none")] = "none"
    """none: every activation that the backward pass needs is kept."""
