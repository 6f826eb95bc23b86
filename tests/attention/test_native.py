"""The compiled CPU kernel equals the reference, and torch's kernel computes the rest."""

import logging
import os
from functools import partial

import pytest
import torch
from attention_cases import rows

from torchtitan_lite.attention import Sdpa, Varlen, WithLayout, operator, reference_attention
from torchtitan_lite.attention.portable import native
from torchtitan_lite.attention.portable.tiles import document_tiles, is_native

pytestmark = pytest.mark.compiler

POSITIONS = {
    "one token": rows([1], [1]),
    "one document": rows([600], [600]),
    "a block and one more": rows([65], [65]),
    "many key blocks": rows([1100]),
    "packed": rows([1, 63, 64, 65, 300, 1, 31], [511, 13, 1]),
    "packed, equal rows": rows([200, 57], [200, 57]),
    "padded": rows([-3, 1, 250, 9, -10], [-273]),
}
TOLERANCES = {torch.float32: 3e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def kernels(tmp_path_factory, monkeypatch):
    """Compiles a kernel for heads of 48, in a cache of the tests; afterwards torch's kernel is used again."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared / "kernels"))
    native.compile_kernel(48)
    yield
    native.forget_kernels()


def tensors(positions_BS, heads, kv_heads, head_dim, dtype):
    """q, k, v, and the gradient of the output."""
    g = torch.Generator().manual_seed(0)
    shapes = [(*positions_BS.shape, h, head_dim) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, upstream = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), upstream


def results(attend, q, k, v, upstream):
    """The output and the gradients of q, k and v."""
    out = attend(q, k, v)
    return out, *torch.autograd.grad(out, (q, k, v), upstream)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(4, 2, 48), (3, 3, 16), (4, 1, 64)], ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_kernel_equals_the_reference_forward_and_backward(positions, heads, dtype):
    positions_BS, (heads, kv_heads, head_dim) = POSITIONS[positions], heads
    native.compile_kernel(head_dim)
    q, k, v, upstream = tensors(positions_BS, heads, kv_heads, head_dim, dtype)
    mask = Sdpa().mask(positions_BS)
    assert is_native(q, mask.tiles.table)
    found = results(lambda q, k, v: Sdpa().build()(q, k, v, mask, scale=0.3), q, k, v, upstream)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    attend = partial(reference_attention, positions_BS=positions_BS, scale=0.3)
    wanted = results(attend, wide[0], wide[1], wide[2], upstream.double())
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        tolerance = TOLERANCES[dtype] * max(1.0, float(theirs.detach().abs().max()))
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance, msg=lambda m, n=name: n + m)


def test_the_log_sum_exp_is_that_of_torch_and_padding_is_exact_zeros():
    q, k, v, _ = tensors(POSITIONS["padded"], 4, 2, 48, torch.float32)
    tiles = document_tiles(POSITIONS["padded"])
    given = q, k, v, "tiles", tiles.table, tiles.data, None, 0.3
    out, lse = operator.forward(*given)
    native.forget_kernels()
    wanted, wanted_lse = operator.forward(*given)
    torch.testing.assert_close((out, lse), (wanted, wanted_lse), rtol=1e-5, atol=1e-5)
    assert not out[POSITIONS["padded"] < 0].any()


@pytest.mark.parametrize("values", [(1.0, 1 + 2**-7), (1 + 2**-7, 1 + 2**-6)])
def test_a_number_between_two_bfloat16_is_rounded_to_the_even_one(values):
    native.compile_kernel(16)
    q, v = torch.zeros(1, 2, 1, 16), torch.tensor(values).view(1, 2, 1, 1).expand(1, 2, 1, 16).contiguous()
    q, v = q.bfloat16(), v.bfloat16()
    out = Sdpa().build()(q, q, v, Sdpa().mask(rows([2])))
    mean = torch.tensor(sum(values) / 2)
    assert mean.bfloat16() != mean and torch.equal(out[0, 1], mean.bfloat16().expand(1, 16))


def test_large_scores_neither_overflow_nor_lose_a_weight():
    positions_BS = POSITIONS["packed"]
    q, k, v, upstream = (x.detach().requires_grad_() for x in tensors(positions_BS, 4, 2, 48, torch.float32))
    mask = Sdpa().mask(positions_BS)
    found = results(lambda q, k, v: Sdpa().build()(q, k, v, mask, scale=1e3), q, k, v, upstream)
    assert all(part.isfinite().all() for part in found)


NOT_FINITE = {
    "NaN in a key": lambda q, k, v: k[0, 2, 0, 3].fill_(torch.nan),
    "infinity in a key": lambda q, k, v: k[0, 2].copy_(torch.inf * q[0, 2].sign()),
    "NaN in a query": lambda q, k, v: q[0, 3, 0, 0].fill_(torch.nan),
    "infinity in a value": lambda q, k, v: v[0, 5, 0, 0].fill_(torch.inf),
    "a score that overflows": lambda q, k, v: (q[0, 3].mul_(1e25), k[0, 1].mul_(1e25)),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_a_number_that_is_not_finite_shows_where_torchs_kernel_shows_it(case):
    native.compile_kernel(16)
    q, k, v, upstream = (x.detach() for x in tensors(rows([8]), 1, 1, 16, torch.float32))
    NOT_FINITE[case](q, k, v)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    mask, inner = Sdpa().mask(rows([8])), Sdpa().build()
    found = results(lambda q, k, v: inner(q, k, v, mask), q, k, v, upstream)
    native.forget_kernels()
    wanted = results(lambda q, k, v: inner(q, k, v, mask), q, k, v, upstream)
    assert not all(theirs.isfinite().all() for theirs in wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        shown, wanted_shown = (~x.isfinite().all(-1) for x in (ours, theirs))
        if case == "NaN in a query":  # torch's kernel gives that query a finite gradient
            wanted_shown = wanted_shown | (shown & (torch.arange(8) == 3)[None, :, None])
        assert torch.equal(shown, wanted_shown)


def test_torchs_defaults_for_dtype_and_device_change_no_number():
    q, k, v, _ = (x.detach() for x in tensors(POSITIONS["packed"], 4, 2, 48, torch.float32))
    mask, inner = Sdpa().mask(POSITIONS["packed"]), Sdpa().build()
    wanted = inner(q, k, v, mask)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode():
            found = inner(q, k, v, mask)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64])
def test_tensors_of_several_dtypes_are_refused(other):
    q, k, v, _ = tensors(POSITIONS["packed"], 4, 2, 48, torch.float32)
    with pytest.raises(ValueError, match="one dtype"):
        Sdpa().build()(q, k.to(other), v, Sdpa().mask(POSITIONS["packed"]))


@pytest.mark.parametrize("layout", ["sbhd", "sliced", "features apart"])
def test_tensors_of_any_strides_give_the_same_numbers(layout):
    positions_BS = POSITIONS["packed"]
    q, k, v, upstream = tensors(positions_BS, 4, 2, 48, torch.float32)
    mask, inner = Varlen().mask(positions_BS), Varlen().build()
    wanted = results(lambda q, k, v: inner(q, k, v, mask), q, k, v, upstream)
    if layout == "sbhd":
        q, k, v, upstream = (x.detach().transpose(0, 1).contiguous() for x in (q, k, v, upstream))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        adapted = WithLayout(inner, "sbhd")
        found = results(lambda q, k, v: adapted(q, k, v, mask), q, k, v, upstream)
        found = [x.transpose(0, 1) for x in found]
    else:

        def strange(x):
            if layout == "sliced":
                return torch.cat([x, x], 2)[:, :, : x.shape[2]]
            return x.mT.contiguous().mT

        found = results(lambda q, k, v: inner(*map(strange, (q, k, v)), mask), q, k, v, upstream)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_are_the_same_to_the_bit_on_any_number_of_threads():
    positions_BS = POSITIONS["packed"]
    q, k, v, upstream = tensors(positions_BS, 4, 2, 48, torch.float32)
    mask, found = Sdpa().mask(positions_BS), []
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        try:
            found.append(results(lambda q, k, v: Sdpa().build()(q, k, v, mask), q, k, v, upstream))
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "case",
    [
        {"dtype": torch.float64},
        {"dtype": torch.float16},
        {"head_dim": 32},
        {"sliding_window": 7},
        {"queries": ((30, 100),)},
    ],
    ids=str,
)
def test_torchs_kernel_computes_what_the_compiled_one_cannot(case):
    positions_BS = POSITIONS["packed, equal rows"]
    q, *_ = tensors(positions_BS, 4, 2, case.get("head_dim", 48), case.get("dtype", torch.float32))
    tiles = document_tiles(positions_BS, case.get("queries"), case.get("sliding_window"))
    assert not is_native(q, tiles.table)


def test_torchs_kernel_computes_bfloat16_on_a_processor_with_amx(monkeypatch):
    monkeypatch.setattr(native, "has_amx", lambda: True)
    table = document_tiles(POSITIONS["packed"]).table
    for dtype, taken in ((torch.float32, True), (torch.bfloat16, False)):
        q, *_ = tensors(POSITIONS["packed"], 4, 2, 48, dtype)
        assert is_native(q, table) == taken


@pytest.mark.parametrize(("head_dim", "damaged"), [(112, b""), (128, b"no library")])
def test_a_damaged_library_is_made_again(head_dim, damaged, caplog, monkeypatch):
    quickly = ["-O0" if flag == "-O3" else flag for flag in native._COMPILE]
    monkeypatch.setattr(native, "_COMPILE", tuple(quickly))
    library = native._built(head_dim)
    whole = library.read_bytes()
    library.write_bytes(damaged)
    native.compile_kernel(head_dim)
    assert library.read_bytes() == whole and not caplog.text
    q, *_ = tensors(POSITIONS["packed"], 4, 2, head_dim, torch.float32)
    assert is_native(q, document_tiles(POSITIONS["packed"]).table)


def test_a_kernel_that_cannot_be_compiled_is_a_warning_and_torchs_is_used(monkeypatch, caplog):
    monkeypatch.setattr(native, "_COMPILE", ("-fno-such-option",))
    with caplog.at_level(logging.WARNING):
        native.compile_kernel(96)
    assert "torch's kernel" in caplog.text and "no-such-option" in caplog.text
    assert caplog.text.count("\n") == 1 and "b'" not in caplog.text
    q, *_ = tensors(POSITIONS["packed"], 4, 2, 96, torch.float32)
    assert not is_native(q, document_tiles(POSITIONS["packed"]).table)


def test_the_kernel_is_compiled_once_for_all_runs(monkeypatch):
    native.forget_kernels()
    ran = []
    run = native._run
    monkeypatch.setattr(native, "_run", lambda command: ran.append(command) or run(command))
    native.compile_kernel(48)
    assert len(ran) == 1, "the compiler was to be asked for its version alone"
