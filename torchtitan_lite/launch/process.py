"""The settings of the whole process, and how the process ends.

The settings are garbage collection, log, warnings, generators, deterministic kernels, memory and inductor.
"""

import atexit
import contextlib
import ctypes
import gc
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import NoReturn

_GC_THRESHOLDS = gc.get_threshold()
_launcher = os.getppid()
"""The id of the process that started this process."""


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """A context manager: Python rarely collects garbage inside, until `started`, to save half a second."""
    global _launcher
    _launcher = os.getppid()  # a fork of a process that had imported this module has another parent
    gc.set_threshold(100_000)
    try:
        yield
    finally:
        # These two move all objects to the oldest generation. Otherwise the old thresholds would make Python
        # collect garbage at once, for a tenth of a second, in a process that may be about to end.
        gc.freeze()
        gc.unfreeze()
        gc.set_threshold(*_GC_THRESHOLDS)


@contextlib.contextmanager
def ending_at_interrupt() -> Iterator[None]:
    """A context manager for imports: the first Ctrl-C inside ends the process with one line.

    A KeyboardInterrupt in the middle of torch's import is lost, or crashes the process. A handler that the
    caller has installed stays.
    """

    def end(*_: object) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with contextlib.suppress(OSError):
                os.write(2, b"interrupted\n")
        os._exit(128 + signal.SIGINT)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def started() -> None:
    """Restore the usual garbage collection, and exempt all objects that exist now."""
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def show_log(is_first: bool) -> None:
    """Print warnings and the log of this package to standard error, on rank 0 only."""
    # tqdm takes time to import, and --help does not need it.
    from torchtitan_lite.launch.log import ConsoleHandler

    if not is_first:
        warnings.simplefilter("ignore")
    log = logging.getLogger("torchtitan_lite")
    if not log.handlers:
        log.addHandler(ConsoleHandler("stderr"))
        log.setLevel(logging.INFO if is_first else logging.CRITICAL)


def is_orphan() -> bool:
    """Return whether the process that started this process, such as a launcher, has ended."""
    return os.getppid() != _launcher


def end_process(status: int) -> NoReturn:
    """End the process without Python's own cleanup, which aborts if a thread is running torch code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process without a traceback
    if "RANK" not in os.environ:
        atexit._run_exitfuncs()  # plugins may have registered some
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def set_up_process(*, device: str, seed: int, deterministic: bool, uses_inductor: bool) -> None:
    """Seed the random generators, and set up kernels, memory and inductor for `device`, "cpu" or "cuda".

    Call this function before the first CUDA kernel: cuBLAS reads its environment variable only once.
    """
    import numpy as np  # numpy and torch are slow to import, and the start needs neither
    import torch

    # Only plugins draw from the global generators. Our own code has its own generators.
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        # Filling new tensors with NaN costs time, and only helps to find reads of uninitialised memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    if device == "cpu":
        _keep_freed_memory()
    if uses_inductor:
        has_vectors = device == "cpu" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
        _set_up_inductor(has_vectors)


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step. Other C libraries keep their settings.

    By default glibc returns much of this memory to the system, and the system clears each page before it is
    used again: 40,000 pages in a step of the tiny preset. mallopt(3) describes the settings. 32 MiB is the
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

    # Let the backward recompute the normalised and gated inputs of a block's products. These inputs
    # are elementwise functions of other kept tensors, and would take a quarter of the memory of a block.
    functorch.ban_recompute_materialized_backward = False
    # Skip the test programs that inductor compiles to try vector instructions. They take 6 s of 19 s, and
    # torch's own kernels rely on the same report of the processor.
    if has_vectors and inductor.cpp.vec_isa_ok is None:
        inductor.cpp.vec_isa_ok = True
