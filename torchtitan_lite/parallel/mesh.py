"""How the ranks of a run are arranged, and how long they wait for each other."""

from dataclasses import dataclass
from typing import Annotated

from torchtitan_lite.config.load import Available


@dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
    """How many ranks share the work, and along which axis. So far a run is one rank."""

    data_parallel_replicate_degree: Annotated[int, Available(1)] = 1
    """Groups of ranks that each hold the whole model and see different samples. Only 1 so far."""
    data_parallel_shard_degree: Annotated[int, Available(-1, 1)] = -1
    """Ranks that share one copy of the weights and see different samples. -1: all ranks that are left."""
    tensor_parallel_degree: Annotated[int, Available(1)] = 1
    """Ranks that share each matrix. Only 1 so far."""
    context_parallel_degree: Annotated[int, Available(1)] = 1
    """Ranks that share each sequence. Only 1 so far."""


@dataclass(frozen=True, kw_only=True)
class CommConfig:
    """How long a rank waits for the others before the run counts as hung."""

    init_timeout_seconds: Annotated[int, Available(300)] = 300
    """Seconds until the first step is done."""
    train_timeout_seconds: Annotated[int, Available(100)] = 100
    """Seconds for every later step."""
