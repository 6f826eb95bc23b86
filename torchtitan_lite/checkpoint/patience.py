"""Work that takes as long as it takes, in a thread, while the main one gives its signs of life."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

import torch

T = TypeVar("T")

_OFTEN = 0.5
"""Seconds between two signs of life."""


def in_thread(act: Callable[[], T]) -> Future[T]:
    """`act` in a thread of its own, with this one's GPU; the process does not wait for it when it ends."""
    done: Future[T] = Future()
    # A new thread has GPU 0, and would take memory of it for itself.
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run() -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)
            done.set_result(act())
        except BaseException as error:  # noqa: BLE001 - raised again by whoever asks for the result
            done.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return done


def result(working: Future[T], alive: Callable[[], None]) -> T:
    """What comes of it, or the exception; `alive` is called every now and then until it is there."""
    while not wait([working], _OFTEN).done:
        alive()
    return working.result()


def patiently(act: Callable[[], T], alive: Callable[[], None]) -> T:
    """What `act` gives or raises, however long it takes."""
    return result(in_thread(act), alive)
