"""Samples: tokens, positions and labels against a slow reference."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.data import IGNORE, Samples, Split


def split_of(documents: list[list[int]], name: str = "train") -> Split:
    """A split in memory; every document ends with its end-of-text token."""
    tokens = [token for document in documents for token in document]
    offsets = np.cumsum([0, *map(len, documents)])
    return Split(
        name=name,  # type: ignore[arg-type]
        n_bytes=len(tokens),
        unigram_entropy=0.0,
        tokens_T=np.array(tokens, "<u2"),
        offsets=offsets,
    )


def slow_reference(documents: list[list[int]], seq_len: int) -> list[list[tuple[int, int, int]]]:
    """(token, position, label) of every token of every sample, one at a time from the definition."""
    stream = [(i, j) for i, document in enumerate(documents) for j in range(len(document))]
    samples = []
    for start in range(0, len(stream) - seq_len + 1, seq_len):
        sample = []
        for place in range(start, start + seq_len):
            i, j = stream[place]
            position = 0
            while place - position > start and stream[place - position][1] > 0:
                position += 1
            label = documents[i][j + 1] if j + 1 < len(documents[i]) else IGNORE
            sample.append((documents[i][j], position, label))
        samples.append(sample)
    return samples


@pytest.mark.parametrize("seed", range(40))
def test_samples_equal_the_slow_reference(seed: int):
    chance = random.Random(seed)
    longest = chance.choice([1, 2, 5, 40])
    documents = [
        [*(chance.randrange(256) for _ in range(chance.randrange(longest))), 256]
        for _ in range(chance.randrange(1, 60))
    ]
    seq_len = chance.randrange(1, min(20, sum(map(len, documents))) + 1)
    samples = Samples(split_of(documents), seq_len)
    expected = slow_reference(documents, seq_len)
    assert len(samples) == len(expected)
    batch = samples.batch(range(len(samples)), range(len(samples)))
    for row, sample in enumerate(expected):
        found = (part[row].tolist() for part in (batch.tokens_BS, batch.positions_BS, batch.labels_BS))
        assert list(zip(*found, strict=True)) == sample, row


def test_a_sample_by_hand():
    samples = Samples(split_of([[1, 2, 3, 256], [256], [4, 5, 6, 7, 256]]), seq_len=5)
    batch = samples.batch([0, 1], [7, 8])
    assert batch.tokens_BS.tolist() == [[1, 2, 3, 256, 256], [4, 5, 6, 7, 256]]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 3, 4]]
    assert batch.labels_BS.tolist() == [[2, 3, 256, IGNORE, IGNORE], [5, 6, 7, 256, IGNORE]]
    assert batch.sample_ids == [7, 8]


def test_a_batch_is_int64_on_the_cpu():
    batch = Samples(split_of([[1, 2, 256]]), seq_len=3).batch([0, 0], [0, 1])
    for part in (batch.tokens_BS, batch.positions_BS, batch.labels_BS):
        assert part.dtype == torch.int64 and part.device.type == "cpu" and part.shape == (2, 3)


def test_every_token_but_the_left_over_ones_is_in_one_sample(tokenized, text_folder: Path):
    split = tokenized(text_folder).train
    samples = Samples(split, 77)
    seen = np.concatenate([samples.batch([i], [i]).tokens_BS.numpy().ravel() for i in range(len(samples))])
    assert np.array_equal(seen, split.tokens_T[: len(seen)])
    assert 0 <= split.n_tokens - len(seen) < 77


def test_no_label_crosses_into_the_next_document(tokenized, text_folder: Path):
    split = tokenized(text_folder).train
    samples = Samples(split, 64)
    batch = samples.batch(range(len(samples)), range(len(samples)))
    after_the_end = batch.labels_BS[batch.tokens_BS == 256]
    assert len(after_the_end) > 100 and (after_the_end == IGNORE).all()
    assert (batch.labels_BS == IGNORE).sum() == len(after_the_end)


@pytest.mark.parametrize(
    ("name", "n_tokens", "remedy"),
    [
        ("train", 5, "use at most 5, or name more text"),
        ("validation", 5, "use at most 5, or hold out more with data.validation_fraction, or name more text"),
        ("validation", 0, "hold out more with data.validation_fraction, or name more text"),
    ],
)
def test_a_split_too_small_for_one_sample_is_an_error_with_a_remedy(name: str, n_tokens: int, remedy: str):
    split = split_of([[1] * n_tokens] if n_tokens else [], name)
    with pytest.raises(ConfigError) as caught:
        Samples(split, 6)
    rule = f"is more than the {n_tokens} tokens of the {name} split"
    assert str(caught.value) == f"training.seq_len = 6 {rule}: {remedy}"


def test_a_split_of_exactly_one_sample_is_enough():
    assert len(Samples(split_of([[1, 2, 256]]), 3)) == 1
