"""The settings that a run makes for its whole process: generators, deterministic kernels, memory."""

import contextlib
import ctypes
import os
import random
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """Settings that make a run repeatable, and a log that shows it."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights and of the order of the data."""
    deterministic: bool = False
    """Use only deterministic kernels. Slower; repeated runs on one machine give identical losses."""
    log_sample_ids: bool = False
    """Write the global sample ids of every step and rank to sample_ids/rank-R.jsonl in the run's folder."""


def set_up_process(config: DebugConfig, device: str) -> None:
    """Make all settings of the process, for a run on `device`, "cpu" or "cuda".

    Call it before the first CUDA kernel: cuBLAS reads its environment variable only once.
    """
    # For plugins that draw from the global generators: our own code has its own generators.
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    if config.deterministic:
        # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        # Filling new tensors with NaN costs time, and only serves to find reads of uninitialised memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if device == "cpu":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Make glibc keep the memory that a step frees, for the next step. Other C libraries are left alone.

    By default glibc returns much of this memory to the system, which clears each page before it hands the
    page out again: 40,000 pages in a step of the tiny preset. The settings are in mallopt(3). 32 MiB is the
    largest threshold that glibc accepts.
    """
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 << 20)
