"""Batches in the run's order, and the held-out ones in their own."""

import atexit
import itertools
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from torchtitan_lite.data.batch import IGNORE, Batch, Samples
from torchtitan_lite.data.order import sample_at

# Enough for the micro-batches of a step, which are asked for at once, to be there.
_BATCHES_AHEAD = 4
_SENT_TO_ALL = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_Message = tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]


class Loader:
    """An endless iterator over this rank's batches.

    All ranks together take the next `n_ranks * local_batch_size` samples of one order, which depends on the
    seed alone; rank r has the r-th share. `consumed_samples`, counted over all ranks, is the whole state.
    With `n_workers` that many processes prepare batches ahead, from the first `next` until `close`.
    """

    def __init__(
        self,
        samples: Samples,
        seed: int,
        local_batch_size: int,
        rank: int = 0,
        n_ranks: int = 1,
        consumed_samples: int = 0,
        n_workers: int = 0,
    ) -> None:
        assert 0 <= rank < n_ranks and local_batch_size > 0 and consumed_samples >= 0 and n_workers >= 0
        self.share = _Share(samples, seed, local_batch_size, rank)
        self.n_consumed_each = n_ranks * local_batch_size
        self.consumed_samples = consumed_samples
        self.n_workers = n_workers
        self._ahead: Iterator[_Message] | None = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        batch = self._from_workers() if self.n_workers else self.share.batch(self.consumed_samples)
        self.consumed_samples += self.n_consumed_each
        return batch

    def close(self) -> None:
        """Stop the workers; a later `next` would start new ones."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            # Torch does so when nothing refers to it any more, but an exception's traceback may.
            ahead._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]

    def _from_workers(self) -> Batch:
        if self._ahead is None:
            self._ahead = self._start()
            _STARTED.add(self)
        batch = _unpacked(next(self._ahead))
        first = batch.sample_ids[0]
        assert first == self.share.places(self.consumed_samples)[0], f"the workers are at sample {first}"
        return batch

    def _start(self) -> Iterator[_Message]:
        loader = DataLoader(
            self.share,
            batch_size=None,
            sampler=itertools.count(self.consumed_samples, self.n_consumed_each),
            num_workers=self.n_workers,
            prefetch_factor=_BATCHES_AHEAD,
            collate_fn=_unchanged,
            worker_init_fn=_end_with_parent,
            multiprocessing_context=_Spawn(),
            # Not the run's own, which would then be another with workers than without.
            generator=torch.Generator(),
        )
        # Python's own helper, too, must outlive the signals; its start lets them through again.
        with _signals_blocked():
            resource_tracker.ensure_running()
        with _signals_blocked():
            return iter(loader)


_STARTED: "weakref.WeakSet[Loader]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before Python would kill the workers, which torch would report as an error."""
    for loader in list(_STARTED):
        loader.close()


@dataclass(frozen=True)
class _Share(torch.utils.data.Dataset[_Message]):
    """What one rank has of every global batch."""

    samples: Samples
    seed: int
    local_batch_size: int
    rank: int

    def places(self, consumed_samples: int) -> np.ndarray:
        """The share's places in the order when that many samples, over all ranks, came before."""
        first = consumed_samples + self.rank * self.local_batch_size
        return np.arange(first, first + self.local_batch_size)

    def batch(self, consumed_samples: int) -> Batch:
        """The share when that many samples came before."""
        places = self.places(consumed_samples)
        indices = sample_at(places, len(self.samples), self.seed)
        return self.samples.batch(indices.tolist(), places.tolist())

    def __getitem__(self, consumed_samples: int) -> _Message:
        return _packed(self.batch(consumed_samples))


def _packed(batch: Batch) -> _Message:
    """A batch as a worker sends it, through a pipe.

    As tensors it would go through shared memory: a few MiB in a container, three open files for each batch
    that is alive, and C++ in the sending thread, which aborts a worker that is told to stop meanwhile.
    """
    tokens, positions, labels = (
        tensor.int().numpy() for tensor in (batch.tokens_BS, batch.positions_BS, batch.labels_BS)
    )
    return tokens, positions, labels, batch.sample_ids


def _unpacked(message: _Message) -> Batch:
    tokens, positions, labels = (torch.from_numpy(part).long() for part in message[:3])
    return Batch(tokens_BS=tokens, positions_BS=positions, labels_BS=labels, sample_ids=message[3])


def _unchanged(message: Any) -> Any:
    return message


def _end_with_parent(worker: int) -> None:
    """In a worker: end when the training process does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name=f"parent of worker {worker}", daemon=True).start()


class _Worker(SpawnProcess):
    """A process whose `terminate` kills it: it is deaf to SIGTERM.

    It ends without the interpreter's end, which stops threads wherever they are; one that is inside C++
    aborts the process then, and torch reports that as an error of the run.
    """

    def run(self) -> None:
        super().run()
        os._exit(0)

    @staticmethod
    def _Popen(process_obj):
        popen = SpawnProcess._Popen(process_obj)  # pyright: ignore[reportAttributeAccessIssue]
        # Python's exit would wait for ever.
        popen.terminate = popen.kill
        return popen


class _Spawn(SpawnContext):
    """Starts processes afresh: this one has threads, which a fork would leave behind in any state."""

    Process = _Worker


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started here never get the signals that launchers send to all processes of a run.

    This process gets them afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SENT_TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_order(
    samples: Samples, local_batch_size: int, n_batches: int = -1, rank: int = 0, n_ranks: int = 1
) -> Iterator[Batch]:
    """This rank's share of `n_batches` global batches of `samples`; of all samples with -1.

    They are spread evenly over the split, so that a few stand for all of it, and come in its order. With -1
    none is left out: the last global batch may be short. A rank that it has no sample for gets one whose
    labels are all IGNORE, which counts for nothing and keeps the ranks in step.
    """
    n_global = n_ranks * local_batch_size
    n_samples = len(samples) if n_batches < 0 else min(n_batches * n_global, len(samples))
    for start in range(0, n_samples, n_global):
        first = start + rank * local_batch_size
        places = range(first, min(first + local_batch_size, n_samples))
        share = [place * len(samples) // n_samples for place in places]
        if share:
            yield samples.batch(share, share)
        else:
            filler = samples.batch([start], [])
            filler.labels_BS.fill_(IGNORE)
            yield filler
