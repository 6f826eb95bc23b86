"""The batches of a rank: training batches in a shuffled order, held-out batches in the order of the text."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from torchtitan_lite.data.batch import IGNORE, Batch, Samples
from torchtitan_lite.data.order import sample_at


class Loader:
    """An endless iterator over this rank's batches.

    At each `next`, all ranks together take the next `n_ranks * local_batch_size` samples of one order, which
    depends on the seed alone. Rank r gets the r-th share. `consumed_samples` counts the samples that all
    ranks have taken, and is the loader's whole state. A thread prepares batches ahead, from the first `next`
    until `close`. If the thread cannot prepare a batch, the `next` for that batch raises the exception.

    Args:
        n_ahead: the number of batches that the thread prepares ahead: the micro-batches of an optimizer step.
        pin: True to put the batches in pinned memory, so that the host does not wait for copies to a GPU.
    """

    def __init__(
        self,
        samples: Samples,
        seed: int,
        local_batch_size: int,
        rank: int = 0,
        n_ranks: int = 1,
        consumed_samples: int = 0,
        *,
        n_ahead: int = 1,
        pin: bool = False,
    ) -> None:
        assert 0 <= rank < n_ranks and local_batch_size > 0 and consumed_samples >= 0 and n_ahead > 0
        self.samples, self.seed, self.local_batch_size, self.rank = samples, seed, local_batch_size, rank
        self.n_consumed_each = n_ranks * local_batch_size
        self.consumed_samples = consumed_samples
        self.n_ahead, self.pin = n_ahead, pin
        self._thread: ThreadPoolExecutor | None = None
        self._prepared: dict[int, Future[Batch]] = {}
        """The prepared batches. The key is the `consumed_samples` at which `next` returns the batch."""

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._thread is None:
            self._thread = self._start_thread()
        for number in range(self.n_ahead + 1):
            consumed = self.consumed_samples + number * self.n_consumed_each
            if consumed not in self._prepared:
                self._prepared[consumed] = self._thread.submit(self._prepare, consumed)
        batch = self._prepared.pop(self.consumed_samples).result()
        self.consumed_samples += self.n_consumed_each
        return batch

    def close(self) -> None:
        """Stop the thread after the batch that it is preparing. A later `next` starts a new thread."""
        if self._thread is not None:
            # Do not wait for the thread: a disk that hangs must not keep an error from being reported.
            self._thread.shutdown(wait=False, cancel_futures=True)
        self._thread, self._prepared = None, {}

    def _start_thread(self) -> ThreadPoolExecutor:
        if not self.pin:
            return ThreadPoolExecutor(1, thread_name_prefix="data")
        # A new thread starts with GPU 0 as its device, and would take memory of that GPU.
        gpu = torch.cuda.current_device()
        return ThreadPoolExecutor(1, "data", initializer=torch.cuda.set_device, initargs=(gpu,))

    def _prepare(self, consumed_samples: int) -> Batch:
        """Return this rank's share of the samples that come after the first `consumed_samples`."""
        first = consumed_samples + self.rank * self.local_batch_size
        places = np.arange(first, first + self.local_batch_size)
        indices = sample_at(places, len(self.samples), self.seed)
        batch = self.samples.batch(indices.tolist(), places.tolist())
        return batch.pinned() if self.pin else batch


def in_order(
    samples: Samples, local_batch_size: int, n_batches: int = -1, rank: int = 0, n_ranks: int = 1
) -> Iterator[Batch]:
    """Yield this rank's share of `n_batches` global batches, in the order of the text. -1 means all samples.

    If `n_batches` do not hold all samples, the samples are spread evenly over the text. With -1 no sample is
    left out, so the last global batch may be short. A rank without a sample in the last global batch gets a
    filler batch, whose labels are all IGNORE. The filler adds nothing to the loss, and keeps the ranks in
    step.
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
