"""The settings of the whole process, and how the process ends.

Garbage collection, the log, warnings, generators, deterministic kernels, memory and inductor.
"""

import atexit
import contextlib
import ctypes
import gc
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator
from typing import NoReturn

_GC_THRESHOLDS = gc.get_threshold()
_launcher = os.getppid()
"""The process that started this one."""


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Within it, Python collects garbage rarely, until `started`: during a start that saves half a second."""
    global _launcher
    _launcher = os.getppid()  # a fork of a process that had imported this module has another parent
    gc.set_threshold(100_000)
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*_GC_THRESHOLDS)


def started() -> None:
    """Collect garbage as often as usual, but not among the objects that exist now: they stay."""
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def show_log(is_first: bool) -> None:
    """Print the log of this package on standard error, and warnings; on rank 0 alone."""
    if not is_first:
        warnings.simplefilter("ignore")
    log = logging.getLogger("torchtitan_lite")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO if is_first else logging.CRITICAL)


def is_orphan() -> bool:
    """Whether the process that started this one, such as a launcher, has ended."""
    return os.getppid() != _launcher


def end_process(status: int) -> NoReturn:
    """End the process without Python's own clearing up, which aborts if a thread is in torch then."""
    if "RANK" not in os.environ:
        atexit._run_exitfuncs()  # such as those of plugins
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def set_up_process(*, device: str, seed: int, deterministic: bool, uses_inductor: bool) -> None:
    """Set the generators, kernels, memory and inductor for a run on `device`, "cpu" or "cuda".

    Call this function before the first CUDA kernel: cuBLAS reads its environment variable only once.
    """
    import numpy as np  # slow to import, like torch: the start needs neither
    import torch

    # For plugins that draw from the global generators: our own code has its own generators.
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        # Filling new tensors with NaN costs time, and only serves to find reads of uninitialised memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if device == "cpu":
        _keep_freed_memory()
    if uses_inductor:
        has_vectors = device == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        _set_up_inductor(has_vectors)


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


def _set_up_inductor(has_vectors: bool) -> None:
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    # Let the backward recompute the normalised and gated inputs of a block's products. These elementwise
    # functions of other kept tensors would be a quarter of the memory of a block.
    functorch.ban_recompute_materialized_backward = False
    # Skip the programs that inductor compiles to try out vector instructions: 6 s of 19. torch's own kernels
    # rely on the same answer of the processor.
    if has_vectors and inductor.cpp.vec_isa_ok is None:
        inductor.cpp.vec_isa_ok = True
