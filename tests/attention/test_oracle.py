"""Every backend against the explicit-mask reference, on outputs and on every gradient."""

import numpy as np
import pytest
import torch
from attention_cases import EXACT, KEYS, POSITIONS, QUERIES, DocumentByDocument, compare, qkv, rows

from torchtitan_lite import attention
from torchtitan_lite.attention import Flex, Sdpa, WithLayout, flex, operator, reference_attention
from torchtitan_lite.attention.mask import explicit_mask
from torchtitan_lite.attention.packs import PackEvaluator, document_packs
from torchtitan_lite.attention.sdpa import attend_whole_rows
from torchtitan_lite.attention.varlen import VarlenAttention

BACKENDS = {
    backend.kind: Flex(block_size=16) if backend is Flex else backend()
    for backend in attention.BACKENDS
    if any("cpu" in can.devices for can in backend.supports)
}
WINDOWS = (None, 1, 7, 60)


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_equals_the_reference_for_every_mask(backend, positions, queries):
    for window in WINDOWS if queries in ("all", "two chunks") else (None, 7):
        compare(BACKENDS[backend], POSITIONS[positions], QUERIES[queries], window, 6, 2, 0.37, EXACT)


@pytest.mark.parametrize(
    "heads, kv_heads", [(h, g) for h in (1, 2, 4, 8) for g in (1, 2, 4, 8) if h % g == 0]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_ratio_of_heads_equals_the_reference_in_float32(backend, heads, kv_heads):
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    for positions in ("one document", "packed", "padded both sides and packed"):
        for window in (None, 7):
            case = POSITIONS[positions], None, window, heads, kv_heads, 0.37, tolerance, torch.float32
            compare(BACKENDS[backend], *case)


@pytest.mark.parametrize("heads, kv_heads", [(6, 6), (6, 2), (4, 1)])
def test_the_one_call_of_rows_of_one_document_equals_the_reference(heads, kv_heads):
    def inner(q, k, v, mask, scale):
        return attend_whole_rows(q, k, v, scale)

    case = POSITIONS["one document"], None, None, heads, kv_heads, 0.37, EXACT
    compare((Sdpa().mask, inner), *case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_scale_is_one_over_the_root_of_the_head_dim_unless_given(backend):
    compare(BACKENDS[backend], POSITIONS["packed"], None, None, 6, 2, None, EXACT)


@pytest.mark.parametrize("window", [100, 128, 129, 200])
@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_longer_than_a_tile_equal_the_reference(backend, window):
    positions_BS = rows([10, 389], [399])
    for queries in (None, ((130, 399),)):
        compare(BACKENDS[backend], positions_BS, queries, window, 2, 1, 0.37, EXACT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_rows_are_exact_zeros_with_zero_gradients(backend):
    positions_BS = POSITIONS["padded both sides and packed"]
    out, grads = compare(BACKENDS[backend], positions_BS, None, None, 6, 2, 0.37, EXACT)
    for x in (out, *grads):
        assert torch.equal(x[positions_BS < 0], torch.zeros_like(x[positions_BS < 0]))
        assert (x[positions_BS >= 0] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_as_close_to_the_reference_as_its_precision_allows(backend):
    tolerance = {"rtol": 2e-2, "atol": 3e-2}
    for name, queries in (("packed", None), ("packed", ((7, 20), (33, 47))), ("one document", None)):
        compare(BACKENDS[backend], POSITIONS[name], queries, None, 6, 2, 0.37, tolerance, torch.bfloat16)


@pytest.mark.parametrize("positions", ["one document", "packed", "padded both sides and packed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_any_strides_equal_the_reference(backend, positions):
    config, positions_BS = BACKENDS[backend], POSITIONS[positions]
    g = torch.Generator().manual_seed(0)
    fused = torch.randn(2, KEYS, 10 * 12, generator=g, dtype=torch.float64)
    features_first = torch.randn(12, 10, 2, KEYS, generator=g, dtype=torch.float64).permute(2, 3, 1, 0)
    for whole in (fused.unflatten(-1, (10, 12)), features_first):
        q, k, v = (x.requires_grad_() for x in whole.split([6, 2, 2], dim=2))
        out = config.build()(q, k, v, config.mask(positions_BS), scale=0.37)
        expected = reference_attention(q, k, v, positions_BS, scale=0.37)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        for upstream in (torch.ones(()).double().expand_as(out), whole[:, :, 2:8].square()):
            found, wanted = (
                torch.autograd.grad(x, (q, k, v), upstream, retain_graph=True) for x in (out, expected)
            )
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


class Checked(DocumentByDocument):
    """A kernel for packs that checks its arguments."""

    def __init__(self):
        self.seen = []

    def forward(self, q, k, v, how):
        self.check(q, k, how)
        self.seen += [x.untyped_storage().data_ptr() for x in (q, k, v)]
        return super().forward(q, k, v, how)

    def backward(self, dout, q, k, v, out, lse, how):
        self.check(q, k, how)
        return super().backward(dout, q, k, v, out, lse, how)

    def check(self, q, k, documents):
        cu_q_D, cu_k_D, max_q, max_k, *_ = documents
        for x, cu_D, longest in ((q, cu_q_D, max_q), (k, cu_k_D, max_k)):
            assert cu_D.dtype == torch.int32 and cu_D.is_contiguous()
            assert (cu_D[0], cu_D[-1]) == (0, len(x))
            assert longest == cu_D.diff().max()
            assert (cu_D.diff() > 0).all(), "empty documents never reach a kernel"


@pytest.fixture
def checked(monkeypatch):
    kernel = Checked()
    monkeypatch.setitem(operator.EVALUATORS, "checked", PackEvaluator(kernel))
    return kernel


def packs_on_cpu(positions_BS, queries=None, sliding_window=None):
    return document_packs(positions_BS, queries, sliding_window, kernel="checked")


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_packs_give_the_numbers_of_the_reference(checked, positions, queries):
    for window in WINDOWS:
        backend = packs_on_cpu, VarlenAttention()
        compare(backend, POSITIONS[positions], QUERIES[queries], window, 6, 2, 0.37, EXACT)


@pytest.mark.parametrize("positions", ["packed", "padded both sides and packed", "a row of padding alone"])
def test_rows_that_do_not_follow_each_other_reach_the_varlen_kernel_as_views(checked, positions):
    positions_BS = POSITIONS[positions]
    mask = packs_on_cpu(positions_BS, None, 7)
    q, k, v = (x.detach().transpose(0, 1).contiguous().requires_grad_() for x in qkv(2, KEYS, KEYS, 6, 2))
    out = WithLayout(VarlenAttention(), "sbhd")(q, k, v, mask, scale=0.37)
    assert set(checked.seen) == {x.untyped_storage().data_ptr() for x in (q, k, v)}
    q_BSHK, k_BSGK, v_BSGK = (x.transpose(0, 1) for x in (q, k, v))
    expected = reference_attention(q_BSHK, k_BSGK, v_BSGK, positions_BS, None, 7, 0.37)
    torch.testing.assert_close(out.transpose(0, 1), expected, rtol=1e-10, atol=1e-10)
    found, wanted = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_a_batch_without_padding_is_one_varlen_call_and_a_chunk_of_a_row_is_one(checked):
    for positions_BS, queries, calls in (
        (POSITIONS["packed"], None, 1),
        (rows([1, 20, 1, 31]), ((7, 20), (33, 47)), 2),
    ):
        checked.seen.clear()
        n_queries = KEYS if queries is None else 27
        tensors = qkv(len(positions_BS), n_queries, KEYS, 6, 2)
        VarlenAttention()(*tensors, packs_on_cpu(positions_BS, queries))
        assert len(checked.seen) == 3 * calls


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_block_mask_is_the_explicit_mask(positions, queries):
    positions_BS = POSITIONS[positions]
    for window in WINDOWS:
        expected_BQS = explicit_mask(positions_BS, QUERIES[queries], window)
        for blocks in ((16, 16), (32, 16), (16, 32), (64, 64)):
            block_mask = flex.build_block_mask(
                positions_BS, QUERIES[queries], window, blocks, torch.device("cpu")
            )
            assert torch.equal(seen_by_blocks(block_mask), expected_BQS)


def seen_by_blocks(block_mask):
    """The keys that each query sees [B, Q, S], from the lists of blocks: only partial blocks are masked."""
    (batch, _, n_queries, seq_len), (size_q, size_k) = block_mask.shape, block_mask.BLOCK_SIZE
    seen_BQS = torch.zeros(batch, n_queries, seq_len, dtype=torch.bool)
    lists = (
        (True, block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
        (False, block_mask.kv_num_blocks, block_mask.kv_indices),
    )
    for is_full, counts_B1M, indices_B1MN in lists:
        for row, block_q in np.ndindex(batch, counts_B1M.shape[2]):
            q = torch.arange(block_q * size_q, min((block_q + 1) * size_q, n_queries))
            for block_k in indices_B1MN[row, 0, block_q, : counts_B1M[row, 0, block_q]].tolist():
                k = torch.arange(block_k * size_k, min((block_k + 1) * size_k, seq_len))
                block = seen_BQS[row, q[0] : q[-1] + 1, k[0] : k[-1] + 1]
                assert not block.any(), "no block is listed twice"
                block |= is_full or block_mask.mask_mod(torch.tensor(row), torch.tensor(0), q[:, None], k)
    return seen_BQS


# torch evaluates a block mask on a CPU too, forward only and S x S, and warns of it.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_block_mask_gives_the_numbers_of_the_reference(monkeypatch):
    positions_BS, chosen = POSITIONS["packed"], QUERIES["two chunks"]
    inner = Flex().build()
    monkeypatch.setattr(inner, "flex_attention", flex.flex_attention)
    q, k, v = (x.detach() for x in qkv(2, 27, KEYS, 6, 2))
    block_mask = flex.build_block_mask(positions_BS, chosen, 7, (16, 16), torch.device("cpu"))
    out = inner(q, k, v, flex.FlexMask(block_mask, (2, 27, KEYS)), scale=0.37)
    expected = reference_attention(q, k, v, positions_BS, chosen, 7, 0.37)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
