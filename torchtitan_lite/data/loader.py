"""Batches in the run's order, and the held-out ones in their own."""

from collections.abc import Iterator

import numpy as np

from torchtitan_lite.data.batch import IGNORE, Batch, Samples
from torchtitan_lite.data.order import sample_at


class Loader:
    """An endless iterator over this rank's batches.

    All ranks together take the next `n_ranks * local_batch_size` samples of one order, which depends on the
    seed alone; rank r has the r-th share. `consumed_samples`, counted over all ranks, is the whole state.
    """

    def __init__(
        self,
        samples: Samples,
        seed: int,
        local_batch_size: int,
        rank: int = 0,
        n_ranks: int = 1,
        consumed_samples: int = 0,
    ) -> None:
        assert 0 <= rank < n_ranks and local_batch_size > 0 and consumed_samples >= 0
        self.samples, self.seed, self.local_batch_size = samples, seed, local_batch_size
        self.rank, self.n_ranks = rank, n_ranks
        self.consumed_samples = consumed_samples

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        first = self.consumed_samples + self.rank * self.local_batch_size
        places = np.arange(first, first + self.local_batch_size)
        batch = self.samples.batch(sample_at(places, len(self.samples), self.seed).tolist(), places.tolist())
        self.consumed_samples += self.n_ranks * self.local_batch_size
        return batch


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
