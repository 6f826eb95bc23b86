"""The operators under torch.compile and under torch's own checks of custom operators."""

import pytest
import torch
from attention_cases import POSITIONS, QUERIES, REFERENCE, qkv, rows

from torchtitan_lite.attention import Flex, Sdpa, Varlen, operator
from torchtitan_lite.attention.packs import document_packs
from torchtitan_lite.attention.portable import kernels
from torchtitan_lite.attention.portable.kernels import CpuKernel, OneTile, PlainKernel
from torchtitan_lite.attention.portable.tiles import document_tiles
from torchtitan_lite.attention.varlen import VarlenAttention


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    monkeypatch.setitem(operator.EVALUATORS, "reference", REFERENCE)


def document_packs_on_cpu(positions_BS, queries=None, sliding_window=None):
    return document_packs(positions_BS, queries, sliding_window, kernel="reference")


TABLES = {"tiles": document_tiles, "packs": document_packs_on_cpu}


@pytest.mark.parametrize("config", [Sdpa(), Flex(block_size=16), Varlen()], ids=lambda config: config.kind)
def test_a_compiled_attention_is_one_graph_and_gives_the_same_numbers(config):
    torch._dynamo.reset()
    inner = config.build()
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager")
    for name in ("one document", "packed", "padded both sides and packed"):
        mask = config.mask(POSITIONS[name])
        q, k, v = qkv(2, 53, 53, 6, 2)
        eager, traced = inner(q, k, v, mask, 0.37), compiled(q, k, v, mask, 0.37)
        torch.testing.assert_close(traced, eager, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (traced, eager)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("queries", ["all", "two chunks"])
@pytest.mark.parametrize("backend", ["sdpa", "varlen", "varlen kernel"])
def test_packed_batches_with_other_documents_are_not_compiled_again(backend, queries):
    """With two chunks the number of packs changes, too."""
    torch._dynamo.reset()
    make_mask, inner = Sdpa().mask, Sdpa().build()
    if backend == "varlen":
        make_mask, inner = Varlen().mask, Varlen().build()
    if backend == "varlen kernel":
        make_mask, inner = document_packs_on_cpu, VarlenAttention()
    compiled = torch.compile(inner, fullgraph=True, backend="aot_eager")
    batches = [
        [30, 20, 3],
        [17, 3, 2, 31],
        [53],
        [1, 1, 20, 11, 20],
        [1] * 53,
        [15, 15, 15, 8],
        [-53],
        [-3, 20, 10, -20],
        [21, 32],
    ]
    n_queries = 53 if queries == "all" else 27
    with torch._dynamo.config.patch(error_on_recompile=True):
        for documents in batches:
            mask = make_mask(rows(documents), QUERIES[queries])
            q, k, v = qkv(1, n_queries, 53, 6, 2)
            torch.testing.assert_close(compiled(q, k, v, mask), inner(q, k, v, mask))


@pytest.mark.parametrize("n", [64, 256, 300, 767, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cpu_kernel_in_blocks_equals_one_call(dtype, n, monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, n, h, 16, generator=g).to(dtype).transpose(1, 2) for h in (4, 2, 2, 4))
    found = CpuKernel().forward(q, k, v, OneTile(True, None, 0.37))
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "_is_medium", lambda q: False)
        out, lse = CpuKernel().forward(q, k, v, OneTile(True, None, 0.37))
        theirs = CpuKernel().backward(dout, q, k, v, out, lse, OneTile(True, None, 0.37))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, (out, lse), rtol=tolerance, atol=tolerance)
    ours = CpuKernel().backward(dout, q, k, v, out, lse, OneTile(True, None, 0.37))
    dout, q, k, v, out, lse = (x.double() for x in (dout, q, k, v, out, lse))
    exact = PlainKernel().backward(dout, q, k, v, out, lse, OneTile(True, None, 0.37))
    for found, other, truth in zip(ours, theirs, exact, strict=True):
        assert found.dtype == dtype and found.transpose(1, 2).is_contiguous()
        assert (found - truth).norm() <= 1.05 * (other - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("queries", ["all", "two chunks"])
@pytest.mark.parametrize("positions", ["packed", "padded both sides and packed"])
@pytest.mark.parametrize("table", TABLES)
def test_the_operator_passes_torchs_checks(table, positions, queries):
    calls = TABLES[table](POSITIONS[positions], QUERIES[queries], 7)
    q, k, v = qkv(2, calls.shape[1], 53, 6, 2)
    given = calls.evaluator, calls.table, calls.data, calls.window, 0.37
    torch.library.opcheck(operator.forward, (q, k, v, *given))


@pytest.mark.parametrize(
    "causal, masked, n, m",  # a tile is causal or masked, never both
    [
        (True, False, 19, 19),
        (True, False, 257, 257),
        (True, False, 600, 600),
        (False, False, 19, 31),
        (False, False, 1, 31),
        (False, True, 19, 31),
        (False, True, 1, 31),
    ],
)
def test_the_cpu_kernel_equals_the_plain_one_forward_and_backward(causal, masked, n, m):
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, s, 12, generator=g, dtype=torch.float64) for h, s in ((6, n), (2, m), (2, m))
    )
    mask = torch.zeros(n, m, dtype=torch.float64) if masked else None
    if mask is not None:
        mask[torch.rand(n, m, generator=g) < 0.5] = float("-inf")
        mask[:, 0] = 0
    found, how = [], OneTile(causal, mask, 0.37)
    for kernel in (CpuKernel(), PlainKernel(block=7)):
        out, lse = kernel.forward(q, k, v, how)
        grads = kernel.backward(torch.ones_like(out), q, k, v, out, lse, how)
        found.append((out, lse, *grads))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("documents", [[53], [300], [800], [300, 53], [20, 33]], ids=str)
@pytest.mark.parametrize("layout", ["bshd", "sbhd", "bhsd", "features apart"])
def test_the_fake_operator_has_the_layouts_of_the_real_one(table, layout, documents):
    """inductor asserts the strides of an operator's results."""
    change = {
        "bshd": lambda x: x,
        "sbhd": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        "bhsd": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "features apart": lambda x: x.mT.contiguous().mT,
    }[layout]
    calls = TABLES[table](rows(documents, documents))
    q, k, v, dout = (
        x.detach()
        for x in (*qkv(2, sum(documents), sum(documents), 6, 2), *qkv(2, sum(documents), 1, 6, 2)[:1])
    )
    q, k, v, dout = map(change, (q, k, v, dout))
    given = q, k, v, calls.evaluator, calls.table, calls.data, None, 0.37
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in given]
        fake_out = operator.forward(*fake)
        fake_grads = operator.backward(mode.from_tensor(dout), *fake[:3], *fake_out, *fake[3:])
    out = operator.forward(*given)
    grads = operator.backward(dout, *given[:3], *out, *given[3:])
    for made, told in zip((*out, *grads), (*fake_out, *fake_grads), strict=True):
        assert (made.stride(), made.dtype) == (told.stride(), told.dtype)
