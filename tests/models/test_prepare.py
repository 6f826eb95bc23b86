"""`Decoder.prepare` makes the inputs of a forward for training, evaluation and generation."""

from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from torchtitan_lite.attention import AttentionConfig, Flex, Sdpa, Varlen
from torchtitan_lite.data import IGNORE, Split
from torchtitan_lite.inference.evaluate import evaluate
from torchtitan_lite.inference.generate import Cache, Newest
from torchtitan_lite.models.decoder import Decoder
from torchtitan_lite.models.registry import resolve
from torchtitan_lite.parallel import context
from torchtitan_lite.parallel.context import ContextParallel

CPU = torch.device("cpu")
N_TOKENS = 24


def model_of(attention: AttentionConfig) -> Decoder:
    """A small model with a sliding window. Its weights are large, so a wrong mask changes the loss."""
    sizes = {"n_layers": 2, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 48}
    model = resolve("qwen3", "debugmodel", attention, {**sizes, "sliding_window": 7}).build()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.2)
    return model


@pytest.mark.parametrize("attention", [Sdpa(), Flex(), Varlen()], ids=["sdpa", "flex", "varlen"])
def test_training_evaluation_and_generation_find_the_same_loss(attention: AttentionConfig) -> None:
    model = model_of(attention)
    tokens_BS = torch.randint(1, 500, (1, N_TOKENS))
    positions_BS = torch.arange(N_TOKENS)[None]
    labels_BS = F.pad(tokens_BS[:, 1:], (0, 1), value=IGNORE)
    with torch.no_grad():
        trained, count = model(
            *model.prepare(tokens_BS, positions_BS, labels_BS, share=ContextParallel(), device=CPU)
        )
    assert int(count) == N_TOKENS - 1
    offsets = np.array([0, N_TOKENS])
    tokens_T = tokens_BS[0].numpy()
    split = Split(
        name="validation", n_bytes=N_TOKENS, unigram_entropy=1.0, tokens_T=tokens_T, offsets=offsets
    )
    evaluated = evaluate(model, split, seq_len=N_TOKENS, batch_size=1)
    generated, real = 0.0, torch.ones(1, 1, dtype=torch.bool)
    with Cache(model, 1, N_TOKENS) as cache:
        for at in range(N_TOKENS - 1):
            logits_BV = cache.step(tokens_BS[:, at : at + 1], real)
            generated += float(F.cross_entropy(logits_BV, tokens_BS[:, at + 1]))
    mean = float(trained / count)
    assert mean > 5
    assert evaluated.loss == pytest.approx(mean, rel=1e-6)
    assert generated / int(count) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    ("share", "own"),
    [
        (None, slice(0, 8)),
        (ContextParallel(), slice(0, 8)),
        (ContextParallel(chunks=context.Chunks(2, balanced=True), rank=1), slice(2, 6)),
        (ContextParallel(chunks=context.Chunks(2, balanced=False), rank=1), slice(4, 8)),
        (Newest(3), slice(5, 8)),
    ],
    ids=["whole", "one rank", "head and tail", "second half", "newest"],
)
def test_the_mask_gets_all_positions_and_the_forward_gets_the_tokens_of_the_share(share, own: slice) -> None:
    model = model_of(Sdpa())
    tokens_BS, labels_BS = torch.randint(1, 500, (2, 2, 8))
    positions_BS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]])
    with mock.patch.object(Sdpa, "mask", return_value="the mask") as made:
        found = model.prepare(tokens_BS, positions_BS, labels_BS, share=share, device=CPU)
    tokens, positions, mask, labels = found
    assert mask == "the mask"
    assert torch.equal(tokens, tokens_BS[:, own])
    assert torch.equal(positions, positions_BS[:, own])
    assert labels is not None and torch.equal(labels, labels_BS[:, own])
    (keys,), options = made.call_args
    assert keys is positions_BS
    is_whole = own == slice(0, 8)
    queries = options.pop("queries")
    assert (queries is None) == is_whole
    assert is_whole or [i for start, stop in queries for i in range(start, stop)] == list(range(8))[own]
    assert options == {"sliding_window": 7, "device": CPU}


def test_a_forward_without_labels_is_prepared_without_them() -> None:
    model = model_of(Sdpa())
    positions_BS = torch.arange(8)[None]
    assert model.prepare(positions_BS, positions_BS, device=CPU)[3] is None
