"""Fixed-length samples of a split, and batches of them.

B samples in a batch, S tokens in a sample, T tokens in a split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.data.shards import Split

IGNORE = -100
"""The label of a token that is the last of its document."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples on the CPU, int64."""

    tokens_BS: torch.Tensor
    positions_BS: torch.Tensor
    """Distance from the start of the token's document, or of the sample if the document started earlier."""
    labels_BS: torch.Tensor
    """The next token of the same document; IGNORE after a document's last."""
    sample_ids: list[int]
    """Places of the samples in the global order, so that a batch can be found again."""

    def pinned(self) -> "Batch":
        """The same batch in pinned memory."""
        parts = {
            name: getattr(self, name).pin_memory() for name in ("tokens_BS", "positions_BS", "labels_BS")
        }
        return replace(self, **parts)


class Samples:
    """A split, cut into samples of `seq_len` tokens without regard to documents.

    An incomplete sample at the end is left out. Raises ConfigError if there is no sample.
    """

    def __init__(self, split: Split, seq_len: int) -> None:
        if split.n_tokens < seq_len:
            raise ConfigError([_too_small(split, seq_len)])
        self.split = split
        self.seq_len = seq_len

    def __len__(self) -> int:
        return self.split.n_tokens // self.seq_len

    def batch(self, indices: Sequence[int], sample_ids: Sequence[int]) -> Batch:
        """The samples at `indices` of the split, with their places `sample_ids` in the global order."""
        rows = [self._row(index) for index in indices]
        tokens, positions, labels = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return Batch(tokens_BS=tokens, positions_BS=positions, labels_BS=labels, sample_ids=list(sample_ids))

    def _row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, positions and labels of one sample, [S] each."""
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
