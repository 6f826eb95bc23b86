"""Positions, queries, windows and tensors that do not fit each other are refused. And copies to a GPU."""

import pytest
import torch
from attention_cases import rows

from torchtitan_lite.attention import Flex, Sdpa, Varlen, positions_from_cu_seqlens
from torchtitan_lite.attention.mask import explicit_mask, segments, to_device

CONFIGS = [Sdpa(), Flex(block_size=16), Varlen()]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)


def test_segments_are_the_queries_cut_at_the_documents():
    positions_BS = rows([3, 5, -2], [-1, 9])
    assert segments(positions_BS).tolist() == [[0, 0, 3, 0, 3], [0, 3, 8, 3, 8], [1, 1, 10, 1, 10]]
    # Queries 2..4 are local 0..1, queries 7..10 local 2..4: a document is cut at both ends of a range.
    assert segments(positions_BS, ((2, 4), (7, 10))).tolist() == [
        [0, 0, 1, 0, 3],
        [0, 1, 2, 3, 4],
        [0, 2, 3, 3, 8],
        [1, 0, 2, 1, 4],
        [1, 2, 5, 1, 10],
    ]


def test_the_explicit_mask_is_what_one_would_draw():
    drawn = explicit_mask(rows([2, 3, -1]), sliding_window=2)[0].int().tolist()
    assert drawn == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize(
    "row", [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, -1, 0], [0, 1, -2], [-1, 1, 2], [0, -1, 1], [0, 0, 2]]
)
@each_config
def test_invalid_positions_are_refused(config, row):
    with pytest.raises(ValueError, match=r"positions|padding"):
        config.mask(torch.tensor([row]))


@each_config
def test_positions_of_another_dtype_or_shape_are_refused(config):
    for bad in (torch.arange(3), torch.arange(3)[None].int(), torch.arange(3.0)[None]):
        with pytest.raises(ValueError, match="int64"):
            config.mask(bad)


@pytest.mark.parametrize("queries", [((0, 9),), ((-1, 2),), ((3, 2),), ((0, 3), (2, 4))])
@each_config
def test_invalid_queries_are_refused(config, queries):
    with pytest.raises(ValueError, match="queries"):
        config.mask(torch.arange(8)[None], queries=queries)


@each_config
def test_a_window_that_hides_a_query_from_itself_is_refused(config):
    with pytest.raises(ValueError, match="sliding_window"):
        config.mask(torch.arange(8)[None], sliding_window=0)


@each_config
def test_tensors_that_do_not_fit_the_mask_are_refused(config):
    mask = config.mask(rows([3, 5], [8]))
    inner = config.build()
    for batch, n_queries, n_keys, kv_heads, kv_dim in (
        (1, 8, 8, 2, 4),
        (2, 7, 8, 2, 4),
        (2, 8, 9, 2, 4),
        (2, 8, 8, 3, 4),
        (2, 8, 8, 2, 5),
    ):
        q = torch.randn(batch, n_queries, 4, 4)
        k = v = torch.randn(batch, n_keys, kv_heads, kv_dim)
        with pytest.raises(ValueError, match=r"must be|multiple"):
            inner(q, k, v, mask)


def test_positions_follow_from_cumulative_lengths():
    cu_seqlens = torch.tensor([0, 3, 3, 5], dtype=torch.int32)  # an empty document is no document
    assert positions_from_cu_seqlens(cu_seqlens).tolist() == [[0, 1, 2, 0, 1]]


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
@each_config
def test_a_scale_that_is_not_positive_and_finite_is_refused(config, scale):
    mask = config.mask(torch.arange(8)[None])
    q, k, v = (torch.randn(1, 8, heads, 4) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match="scale"):
        config.build()(q, k, v, mask, scale=scale)


def test_a_copy_to_a_gpu_is_made_from_pinned_memory_and_not_waited_for(monkeypatch):
    x, pinned, calls = torch.ones(3), torch.zeros(3), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append(self) or pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: (self, args, kwargs))
    assert to_device(x, "cuda") == (pinned, (torch.device("cuda"),), {"non_blocking": True})
    assert calls == [x]


def test_what_stays_on_the_cpu_is_neither_pinned_nor_copied():
    x = torch.ones(3)
    assert to_device(x, "cpu") is x
