"""Seeds, and runs that repeat to the bit."""

import os
import random
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """What makes a run repeatable, and shows that it is."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights and of the order of the data."""
    deterministic: bool = False
    """Use deterministic kernels alone: slower; two runs on one machine give the same losses to the bit."""
    log_sample_ids: bool = False
    """Write the global sample ids of every step and rank to sample_ids/rank-R.jsonl in the run's folder."""


def set_determinism(config: DebugConfig) -> None:
    """Seed all generators and, when asked, refuse every kernel whose result depends on timing.

    Must run before the first CUDA kernel: cuBLAS reads its workspace setting once.
    """
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    if not config.deterministic:
        return
    # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Filling every new tensor with NaN finds reads of uninitialised memory; it is no part of repeating a run.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
