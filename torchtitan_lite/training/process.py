"""The settings that a run makes for its whole process: generators, kernels, memory and inductor."""

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


def set_up_process(config: DebugConfig, device: str, *, uses_inductor: bool = False) -> None:
    """Make all settings of the process, for a run on `device`, "cpu" or "cuda".

    Call this function before the first CUDA kernel: cuBLAS reads its environment variable only once.
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
    if uses_inductor:
        _set_up_inductor(device)


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


def _set_up_inductor(device: str) -> None:
    from torch._functorch import config as functorch  # slow to import: only compiled runs need them
    from torch._inductor import config as inductor

    # Let the backward recompute the normalised and gated inputs of a block's products. These elementwise
    # functions of other kept tensors would be a quarter of the memory of a block.
    functorch.ban_recompute_materialized_backward = False
    # Skip the programs that inductor compiles to try out vector instructions: 6 s of 19. torch's own kernels
    # rely on the same answer of the processor.
    has_vectors = device == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if has_vectors and inductor.cpp.vec_isa_ok is None:
        inductor.cpp.vec_isa_ok = True
