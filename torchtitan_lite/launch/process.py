"""Settings of the whole process: garbage collection, the log, warnings, and how the process ends."""

import atexit
import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import NoReturn

_GC_THRESHOLDS = gc.get_threshold()
_LAUNCHER = os.getppid()
"""The process that started this one."""


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Within it, Python collects garbage rarely, until `started`: during a start that saves half a second."""
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
    return os.getppid() != _LAUNCHER


def end_process(status: int) -> NoReturn:
    """End the process without Python's own clearing up, which aborts if a thread is in torch then."""
    if "RANK" not in os.environ:
        atexit._run_exitfuncs()  # such as those of plugins
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
