"""Work in a thread, however long it takes, while the main thread gives signs of life."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import torch

T = TypeVar("T")

_PERIOD = 0.5
"""Seconds between two signs of life."""


def in_thread(act: Callable[[], T]) -> Future[T]:
    """Run `act` in a thread of its own, on this thread's GPU. The end of the process does not wait for it."""
    done: Future[T] = Future()
    # A new thread has GPU 0 as its current device, and would take memory there.
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)
            done.set_result(act())
        except BaseException as error:  # noqa: BLE001 - raised again by `result`
            done.set_exception(error)

    threading.Thread(target=run, name="background", daemon=True).start()
    return done


def result(working: Future[T], alive: Callable[[], None]) -> T:
    """Wait for the work, call `alive` meanwhile, and return or raise the work's result."""
    while not wait([working], _PERIOD).done:
        alive()
    return working.result()


def patiently(act: Callable[[], T], alive: Callable[[], None]) -> T:
    """Run `act` in a thread and return or raise its result; `alive` is called meanwhile."""
    return result(in_thread(act), alive)
