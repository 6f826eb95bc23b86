"""Context parallel: attention in parts is exact, its work is balanced, and only what is needed is sent."""

import itertools
from functools import partial
from typing import Any

import exchange_cases as cases
import pytest
import torch
from attention_cases import rows
from exchange_cases import Attention
from torch import Tensor

from torchtitan_lite.attention import Flex, Sdpa, Varlen, reference_attention
from torchtitan_lite.attention.mask import explicit_mask
from torchtitan_lite.parallel.context import Chunks, ContextParallel

SEQ_LEN = 56  # eight chunks of seven tokens: no document below begins or ends at the edge of a chunk
POSITIONS = {
    "one document": rows([56], [56]),
    "packed": rows([1, 19, 1, 35], [17, 39]),
    "padded": rows([-3, 1, 30, 9, -13], [-20, 36]),
    "a row of padding alone": rows([-56], [5, 51]),
}
METHODS: dict[str, tuple[Any, bool]] = {
    "allgather, headtail": ("allgather", True),
    "allgather, none": ("allgather", False),
    "ulysses": ("ulysses", False),
}
CONFIGS = {"sdpa": Sdpa(), "flex": Flex(block_size=16), "varlen": Varlen()}
assert_equal = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def tokens_of(rank: int, n_ranks: int, balanced: bool, seq_len: int = SEQ_LEN) -> list[int]:
    """The tokens of rank r: one stretch or, if balanced, the chunks r and 2n - 1 - r."""
    size = seq_len // (2 * n_ranks if balanced else n_ranks)
    chunks = (rank, 2 * n_ranks - 1 - rank) if balanced else (rank,)
    return [token for chunk in chunks for token in range(chunk * size, (chunk + 1) * size)]


def in_order(parts: list[Tensor], balanced: bool) -> Tensor:
    """The whole sequence, from each rank's part."""
    n_ranks = len(parts)
    whole = torch.full((len(parts[0]), SEQ_LEN, *parts[0].shape[2:]), torch.nan, dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        whole[:, tokens_of(rank, n_ranks, balanced)] = part
    return whole


def wanted(case: Attention) -> list[Tensor]:
    """The output and the gradients of the reference on the whole sequence."""
    q, k, v, dout = case.tensors()
    out = reference_attention(q, k, v, case.positions_BS, None, case.window, case.scale)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


def found(ranks, n_ranks: int, some: list[Attention]) -> list[list[Tensor]]:
    """For each case the output and the gradients of the whole sequence, from the parts of all ranks."""
    of_ranks = ranks(n_ranks).run(cases.attend, some)
    return [
        [in_order(list(parts), case.balanced) for parts in zip(*(part[:4] for part in of_case), strict=True)]
        for case, of_case in zip(some, zip(*of_ranks, strict=True), strict=True)
    ]


@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("attention", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_attention_in_parts_equals_the_reference_on_the_whole(
    ranks, method: str, attention: str, n_ranks: int
) -> None:
    (name, balanced), n = METHODS[method], n_ranks
    heads = ((4, 4), (6, 2), (3, 1)) if name == "allgather" else ((n, n), (3 * n, n), (4 * n, 2 * n))
    some = [
        Attention(
            method=name,
            balanced=balanced,
            config=CONFIGS[attention],
            positions_BS=positions_BS,
            window=window,
            heads=of_case,
            scale=0.37 if window else None,
        )
        for positions_BS, window, of_case in itertools.product(POSITIONS.values(), (None, 9), heads)
    ]
    for case, tensors in zip(some, found(ranks, n_ranks, some), strict=True):
        for what, ours, theirs in zip(("out", "dq", "dk", "dv"), tensors, wanted(case), strict=True):
            assert_equal(ours, theirs, msg=lambda m, w=what, c=case: f"{w}, {c}: {m}")


@pytest.mark.parametrize("attention", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_exchanged_and_summed_in_bfloat16(ranks, method: str, attention: str) -> None:
    """Four roundings of 2**-8: of the softmax, the result, the sum over ranks, and the reference."""
    name, balanced = METHODS[method]
    case = Attention(
        method=name,
        balanced=balanced,
        config=CONFIGS[attention],
        positions_BS=POSITIONS["packed"],
        heads=(4, 2),
        dtype=torch.bfloat16,
    )
    for ours, theirs in zip(found(ranks, 2, [case])[0], wanted(case), strict=True):
        assert ours.dtype == torch.bfloat16
        difference = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert difference < 4 * 2**-8


@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("method", ["allgather", "ulysses"])
def test_the_bytes_sent_grow_with_the_heads_that_the_method_sends_and_no_others(
    ranks, method: str, n_ranks: int
) -> None:
    positions_BS, all_heads = POSITIONS["packed"], [(4, 4), (8, 4), (16, 4), (8, 8), (16, 8)]
    some = [
        Attention(method=method, balanced=method == "allgather", positions_BS=positions_BS, heads=heads)
        for heads in all_heads
    ]
    for parts in ranks(n_ranks).run(cases.attend, some):
        sent = {heads: part.bytes_sent for heads, part in zip(all_heads, parts, strict=True)}
        assert sent == {
            heads: cases.attention_bytes(method, n_ranks, positions_BS.numel(), heads) for heads in all_heads
        }
        if method == "allgather":
            assert sent[4, 4] == sent[8, 4] == sent[16, 4], "query heads are not sent"
            assert sent[8, 8] == sent[16, 8] == tuple(2 * n for n in sent[8, 4]), "key heads are"


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4, 7])
def test_chunks_put_together_are_the_whole_sequence(n_ranks: int, balanced: bool) -> None:
    chunks = Chunks(n_ranks, balanced)
    n_chunks = (1 + balanced) * n_ranks
    seq_len = 5 * n_chunks
    whole = torch.arange(2 * seq_len).view(2, seq_len)
    assert sorted(chunks.owners) == sorted(list(range(n_ranks)) * (1 + balanced))
    contexts = [ContextParallel(chunks=chunks, rank=rank) for rank in range(n_ranks)]
    parts = [context.shard(whole) for context in contexts]
    assert torch.equal(chunks.join(tuple(parts)), whole)
    for rank, part in enumerate(parts):
        tokens = tokens_of(rank, n_ranks, balanced, seq_len)
        assert torch.equal(part, whole[:, tokens])
        assert [i for start, stop in chunks.ranges(rank, seq_len) for i in range(start, stop)] == tokens
    for part, own in zip(parts, chunks.by_rank(whole).unflatten(0, (n_ranks, -1)), strict=True):
        assert torch.equal(torch.cat(own.unbind(), dim=1), part)


def test_one_rank_has_everything() -> None:
    alone, x = ContextParallel(), POSITIONS["packed"]
    assert alone.shard(x) is x and alone.queries(SEQ_LEN) is None


def test_a_sequence_that_chunks_do_not_divide_is_refused() -> None:
    with pytest.raises(AssertionError, match="57 tokens in 8 chunks"):
        ContextParallel(chunks=Chunks(4, balanced=True)).queries(57)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("method", METHODS)
def test_the_work_of_all_ranks_is_the_number_of_visible_pairs(
    method: str, positions: str, window: int | None
) -> None:
    name, balanced = METHODS[method]
    contexts = [ContextParallel(method=name, chunks=Chunks(4, balanced), rank=rank) for rank in range(4)]
    work = [context.work(POSITIONS[positions], window) for context in contexts]
    assert sum(work) == explicit_mask(POSITIONS[positions], None, window).sum()


@pytest.mark.parametrize("n_ranks", [2, 4, 8])
def test_with_balance_a_single_document_costs_every_rank_the_same(n_ranks: int) -> None:
    positions_BS = rows([16 * n_ranks])

    def max_to_mean(method: Any, balanced: bool) -> float:
        chunks = Chunks(n_ranks, balanced)
        contexts = [ContextParallel(method=method, chunks=chunks, rank=rank) for rank in range(n_ranks)]
        work = [context.work(positions_BS, None) for context in contexts]
        return max(work) * n_ranks / sum(work)

    assert max_to_mean("allgather", balanced=True) == 1
    assert max_to_mean("ulysses", balanced=False) == 1
    unbalanced = max_to_mean("allgather", balanced=False)
    assert unbalanced == pytest.approx(2 - 1 / n_ranks, rel=0.03), "the last of n stretches"


def test_the_block_size_of_flex_reaches_the_mask_of_a_rank(ranks, small_run) -> None:
    flags = ["--model.attention", "flex", "--parallelism.context-parallel-degree", "2"]
    sizes = ["--model.attention.block-size", "16"]
    assert ranks(2).run(cases.block_sizes_of_masks, [*small_run, *flags, *sizes]) == [{(16, 16)}] * 2
