"""Makes synthetic tokens that a model can learn, as token shards for the trainer's own loader.

N samples, S tokens in a sample, T tokens in all.
"""

from pathlib import Path

import numpy as np
import torch

from torchtitan_lite.data import Shards
from torchtitan_lite.data.shards import Split, SplitName


def walk(vocab_size: int, n_samples: int, seq_len: int, seed: int = 0) -> torch.Tensor:
    """Rows [N, S + 1] of int64: each token is 31 times the one before plus 7, and one in ten is any token."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.empty(n_samples, seq_len + 1, dtype=torch.int64)
    tokens[:, 0] = torch.randint(vocab_size, (n_samples,), generator=generator)
    noise = torch.randint(vocab_size, tokens.shape, generator=generator)
    is_noise = torch.rand(tokens.shape, generator=generator) < 0.1
    for index in range(1, seq_len + 1):
        following = (tokens[:, index - 1] * 31 + 7) % vocab_size
        tokens[:, index] = torch.where(is_noise[:, index], noise[:, index], following)
    return tokens


def lengths_between(shortest: int, longest: int, n_tokens: int, seed: int = 0) -> np.ndarray:
    """Lengths of documents, uniform in [shortest, longest], of `n_tokens` in all; the last may be shorter."""
    drawn = np.random.default_rng(seed).integers(shortest, longest + 1, size=n_tokens // shortest + 1)
    ends = np.minimum(drawn.cumsum(), n_tokens)
    return np.diff(np.unique(ends), prepend=0)


def write_shards(
    folder: Path, vocab_size: int, n_samples: int, seq_len: int, documents: tuple[int, int] | None = None
) -> Shards:
    """Write `n_samples` samples of a walk into `folder`, as one document or as many.

    `documents` are the smallest and the largest length of a document, in tokens. Without `documents` the same
    tokens are one document, so every sample is causal from its first token to its last.
    """
    tokens_T = walk(vocab_size, n_samples, seq_len)[:, :seq_len].flatten().numpy().astype("<u4")
    lengths = lengths_between(*documents, len(tokens_T)) if documents else [len(tokens_T)]
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    tokens_T.tofile(folder / "train.tokens")
    train = _split("train", np.memmap(folder / "train.tokens", "<u4", "r"), offsets)
    return Shards(folder=folder, train=train, validation=_split("validation", tokens_T[:0], offsets[:1]))


def _split(name: SplitName, tokens_T: np.ndarray, offsets: np.ndarray) -> Split:
    return Split(name=name, n_bytes=len(tokens_T), unigram_entropy=0.0, tokens_T=tokens_T, offsets=offsets)
