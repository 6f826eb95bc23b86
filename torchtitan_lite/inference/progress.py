"""The progress of a long command, on standard error: a bar on a terminal, otherwise a line now and then."""

import sys
from collections.abc import Iterable, Iterator
from time import monotonic
from typing import TypeVar

from tqdm import tqdm

from torchtitan_lite.launch.end import say

_SECONDS = 30.0
"""The time from one line to the next where standard error is no terminal."""

T = TypeVar("T")


def shown(batches: Iterable[T], n_batches: int, what: str) -> Iterator[T]:
    """Yield `batches`, and show how many of the `n_batches` are done. `what` is the name of the work."""
    if sys.stderr.isatty():
        yield from tqdm(batches, desc=what, total=n_batches, unit="batch", dynamic_ncols=True, leave=False)
        return
    last = monotonic()
    for n_done, batch in enumerate(batches):
        if n_done and monotonic() - last >= _SECONDS:
            say(f"{what}: {n_done:,} of {n_batches:,} batches")
            last = monotonic()
        yield batch
