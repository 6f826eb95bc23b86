"""Samples of a fixed length, cut from a split of the dataset, and batches of samples.

B samples in a batch, S tokens in a sample, T tokens in a split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.data.shards import Split

IGNORE = -100
"""The label of the last token of a document, which has no next token."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The samples of a batch, as int64 tensors on the CPU."""

    tokens_BS: torch.Tensor
    positions_BS: torch.Tensor
    """The distance from the start of the token's document, or of the sample if the document began earlier."""
    labels_BS: torch.Tensor
    """The next token of the same document, or IGNORE if the token is the last of its document."""
    sample_ids: list[int]
    """The places of the samples in the global order, so that the same batch can be made again."""

    def pinned(self) -> "Batch":
        """Return the same batch in pinned memory."""
        parts = {
            name: getattr(self, name).pin_memory() for name in ("tokens_BS", "positions_BS", "labels_BS")
        }
        return replace(self, **parts)


class Samples:
    """The samples of a split: runs of `seq_len` tokens, which may begin and end within a document.

    An incomplete sample at the end is left out. Raises ConfigError if the split is shorter than one sample.
    """

    def __init__(self, split: Split, seq_len: int) -> None:
        if split.n_tokens < seq_len:
            raise ConfigError([_too_small(split, seq_len)])
        self.split = split
        self.seq_len = seq_len

    def __len__(self) -> int:
        return self.split.n_tokens // self.seq_len

    def batch(self, indices: Sequence[int], sample_ids: Sequence[int]) -> Batch:
        """Return the samples at `indices` of the split. `sample_ids` are their places in the global order."""
        rows = [self._row(index) for index in indices]
        tokens, positions, labels = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return Batch(tokens_BS=tokens, positions_BS=positions, labels_BS=labels, sample_ids=list(sample_ids))

    def _row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the tokens, positions and labels of one sample, [S] each."""
        assert 0 <= index < len(self), f"sample {index} of {len(self)}"
        start, stop = index * self.seq_len, (index + 1) * self.seq_len
        tokens = self.split.tokens_T[start : stop + 1].astype(np.int64)
        first, last = np.searchsorted(self.split.offsets, (start, stop), side="right")
        # The places in the sample at which one document ends and the next one starts.
        breaks = self.split.offsets[first:last] - start
        labels = np.append(tokens[1:], IGNORE)[: self.seq_len]
        labels[breaks - 1] = IGNORE
        starts = np.concatenate(([0], breaks[breaks < self.seq_len]))
        lengths = np.diff(starts, append=self.seq_len)
        positions = np.arange(self.seq_len) - np.repeat(starts, lengths)
        return tokens[: self.seq_len], positions, labels


def _too_small(split: Split, seq_len: int) -> Problem:
    rule = f"is more than the {split.n_tokens} tokens of the {split.name} split"
    remedies = ["name more text"]
    if split.name == "validation":
        remedies.insert(0, "hold out more with data.validation_fraction")
    if split.n_tokens:
        remedies.insert(0, f"use at most {split.n_tokens}")
    return Problem("training.seq_len", seq_len, rule, ", or ".join(remedies))
