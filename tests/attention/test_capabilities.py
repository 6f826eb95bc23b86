"""The capabilities: every cell of the table either runs and is right, or is refused."""

import itertools

import pytest
import torch
from attention_cases import POSITIONS, compare, rows

from torchtitan_lite.attention import (
    Flex,
    Sdpa,
    Varlen,
    capabilities,
    flex,
    reference_attention,
    refusals,
    varlen,
)

FLASH = {"BACKEND": "FLASH"}
CONFIGS = {
    "sdpa": Sdpa(),
    "flex": Flex(),
    "flex_64": Flex(block_size=64),
    "flex_flash": Flex(block_size=(128, 128), kernel_options=FLASH),
    "varlen_auto": Varlen(),
    "varlen_fa4": Varlen(kernel="fa4"),
    "varlen_fa3": Varlen(kernel="fa3"),
    "varlen_flash_attn": Varlen(kernel="flash_attn"),
    "varlen_torch": Varlen(kernel="torch"),
    "varlen_documents": Varlen(kernel="documents"),
}
DTYPES = {name: getattr(torch, name) for name in capabilities.FLOATS}
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 4e-2, "float16": 1e-2}


def refused(config, device="cpu", dtype=torch.float32, **shape):
    shape = {"head_dim": 64, "n_heads": 8, "n_kv_heads": 2, "sliding_window": None} | shape
    return refusals(config, device=device, dtype=dtype, **shape)


@pytest.mark.parametrize("name, dtype", list(itertools.product(CONFIGS, DTYPES)))
def test_on_a_cpu_every_cell_runs_right_or_is_refused_with_a_remedy(name, dtype):
    found = refused(CONFIGS[name], "cpu", DTYPES[dtype], head_dim=12)
    only_cuda = name in ("flex_flash", "varlen_fa4", "varlen_fa3", "varlen_flash_attn", "varlen_torch")
    assert bool(found) == only_cuda
    if found:
        assert all(refusal.rule and refusal.remedy for refusal in found)
        assert {"kernel", "kernel_options"} & {refusal.field for refusal in found}
        return
    tolerance = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    compare(CONFIGS[name], POSITIONS["packed"], None, 7, 6, 2, 0.37, tolerance, DTYPES[dtype])


# Documents of a row, the queries and the window. A row of one document is one call of torch's fastest kernel.
# No kernel has tiles that divide 500 tokens. The two chunks are a rank's under context parallel of two ranks.
ON_A_GPU = {
    "packed": ([1, 300, 211], None, None),
    "packed, window": ([1, 300, 211], None, 100),
    "one document": ([512], None, None),
    "one document of 500 tokens": ([500], None, None),
    "one document of 100 tokens": ([100], None, None),
    "one document, window": ([500], None, 100),
    "padded": ([-12, 300, 200], None, None),
    "two chunks": ([1, 300, 211], ((0, 128), (384, 512)), None),
    "the last one": ([500], ((499, 500),), None),
}
GPU_TOLERANCES = {"float64": 1e-10, "float32": 5e-3, "bfloat16": 2e-2, "float16": 5e-3}


@pytest.mark.gpu
@pytest.mark.parametrize("name, dtype", list(itertools.product(CONFIGS, DTYPES)))
def test_on_a_gpu_every_cell_runs_right_or_is_refused_with_a_remedy(name, dtype):
    config = CONFIGS[name]
    found = refused(config, "cuda", DTYPES[dtype], n_heads=4)
    if found:
        assert all(refusal.rule and refusal.remedy for refusal in found)
        return
    torch.compiler.reset()  # compiled code of other tests counts against this test's limit
    inner = config.build()
    errors = {}
    # For blocks of 64 torch tries dozens of kernels for each shape: all shapes would take minutes.
    cases = {"packed": ON_A_GPU["packed"]} if name == "flex_64" else ON_A_GPU
    for case, (documents, queries, window) in cases.items():
        positions_BS = rows(documents, documents)
        mask = config.mask(positions_BS, queries=queries, sliding_window=window, device="cuda")
        errors[case] = gpu_error(inner, mask, DTYPES[dtype], positions_BS, queries, window)
    assert all(error < GPU_TOLERANCES[dtype] for error in errors.values()), errors


def gpu_error(inner, mask, dtype, positions_BS, queries, window):
    """The largest relative error of the output and of the gradients of q, k and v; NaN if there is a NaN."""
    g = torch.Generator("cuda").manual_seed(0)
    n_keys = positions_BS.shape[1]
    n_queries = sum(stop - start for start, stop in queries or ((0, n_keys),))
    q, k, v = (
        torch.randn(2, n, heads, 64, generator=g, device="cuda", dtype=dtype).requires_grad_()
        for n, heads in ((n_queries, 4), (n_keys, 2), (n_keys, 2))
    )
    out = inner(q, k, v, mask, scale=0.2)
    expected = reference_attention(q, k, v, positions_BS.cuda(), queries, window, 0.2)
    found, wanted = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, expected))
    pairs = zip((out, *found), (expected, *wanted), strict=True)
    return torch.stack([(a - b).norm() / b.norm() for a, b in pairs]).max().item()


@pytest.mark.parametrize("name", ["varlen_auto", "varlen_torch", "flex_flash"])
def test_half_precision_kernels_refuse_float32_on_cuda(name):
    (refusal,) = [refusal for refusal in refused(CONFIGS[name], "cuda") if refusal.field == "dtype"]
    assert refusal.value == "float32"
    assert "bfloat16" in refusal.remedy


@pytest.mark.parametrize(
    "shape, field", [({"n_heads": 6, "n_kv_heads": 4}, "n_heads"), ({"head_dim": 272}, "head_dim")]
)
def test_shapes_that_a_kernel_cannot_take_are_refused(shape, field):
    config = Varlen(kernel="torch")
    assert field in {refusal.field for refusal in refused(config, "cuda", torch.bfloat16, **shape)}
    assert refused(config, "cuda", torch.bfloat16) == []


@pytest.mark.parametrize(
    "options, device, field",
    [
        ({"block_size": 16}, "cuda", "block_size"),
        ({"kernel_options": {"fwd_BLOCK_X": 64}}, "cuda", "kernel_options.fwd_BLOCK_X"),
        ({"kernel_options": {"BLOCK_M": "abc"}}, "cuda", "kernel_options.BLOCK_M"),
        ({"kernel_options": {"USE_TMA": 1}}, "cuda", "kernel_options.USE_TMA"),
        ({"block_size": 100}, "cpu", "block_size"),
        ({"block_size": 0}, "cuda", "block_size"),
        ({"block_size": (128, 8)}, "cpu", "block_size"),
        ({"block_size": 64, "kernel_options": FLASH}, "cuda", "block_size"),
        ({"kernel_options": FLASH}, "cpu", "kernel_options"),
        ({"kernel_options": {"num_stages": 2}}, "cpu", "kernel_options"),
        ({"kernel_options": {"BACKEND": "FLAHS"}}, "cuda", "kernel_options.BACKEND"),
        ({"kernel_options": {"num_stage": 2}}, "cuda", "kernel_options.num_stage"),
    ],
)
def test_invalid_options_of_flex_are_refused(options, device, field):
    found = refused(Flex(**options), device, torch.bfloat16)
    assert field in {refusal.field for refusal in found}


@pytest.mark.parametrize(
    "options", [{}, {"fwd_BLOCK_M": 64, "bwd_BLOCK_N1": 64, "USE_TMA": True, "BACKEND": "TRITON"}]
)
def test_options_of_flex_that_torch_has_are_accepted(options):
    assert refused(Flex(kernel_options=options), "cuda", torch.bfloat16) == []


def test_a_backend_is_refused_for_what_it_does_not_support():
    class Modest(Sdpa):
        supports = (
            capabilities.Capabilities(
                name="modest",
                devices=("cpu",),
                dtypes=("float32",),
                sliding_window=False,
                deterministic=False,
            ),
        )

    found = refused(Modest(), "cpu", torch.bfloat16, sliding_window=5, deterministic=True)
    assert {refusal.field for refusal in found} == {"dtype", "sliding_window", "deterministic"}
    # On another device nothing else matters.
    (found,) = refused(Modest(), "cuda", torch.bfloat16, sliding_window=5, deterministic=True)
    assert (found.field, found.choices) == ("device", ("cpu",))
    assert refused(Modest()) == []


@pytest.mark.parametrize(
    "name, found",
    [("flex_flash", ["deterministic"]), ("varlen_fa3", []), ("varlen_torch", [])],
)
def test_kernels_without_deterministic_gradients_refuse_the_deterministic_mode(name, found):
    refusals = refused(CONFIGS[name], "cuda", torch.bfloat16, deterministic=True)
    assert [refusal.field for refusal in refusals] == found


def test_a_kernel_that_cannot_run_here_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(capabilities, "_importable", lambda module: False)
    with pytest.raises(ValueError, match="flash-attn-4"):
        Varlen(kernel="fa4").build()
    (refusal,) = refused(Varlen(kernel="fa3"), "cuda", torch.bfloat16)
    assert (refusal.field, refusal.value) == ("kernel", "fa3")
    assert "flash_attn_interface" in refusal.rule
    (refusal,) = refused(Flex(kernel_options=FLASH), "cuda", torch.bfloat16)
    assert "flash-attn-4" in refusal.rule


MODULES = {
    "flash-attn-4": "flash_attn.cute",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn": "flash_attn.bert_padding",
}


@pytest.fixture
def on_a_gpu(monkeypatch):
    """`on_a_gpu(gpu, installed)`: a GPU of this compute capability, and these versions of packages."""

    def pretend(gpu, installed, has_window=True):
        modules = [MODULES[package] for package in installed]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: gpu)
        monkeypatch.setattr(capabilities, "_importable", lambda module: module in modules)
        monkeypatch.setattr(varlen, "version", installed.__getitem__)
        monkeypatch.setattr("torch.nn.attention._fa4._aten_to_fa4_window_size", None, raising=False)
        if not has_window:
            monkeypatch.delattr("torch.nn.attention._fa4._aten_to_fa4_window_size")

    return pretend


FA4, FA3, FA2 = {"flash-attn-4": "4.0.0b18"}, {"flash-attn-3": "3"}, {"flash-attn": "2.7.0.post2"}


@pytest.mark.parametrize(
    "gpu, installed, expected",
    [
        ((9, 0), FA4 | FA3, "fa4"),
        ((9, 0), FA3 | FA2, "fa3"),
        ((10, 0), FA3 | FA2, "flash_attn"),
        ((8, 0), FA4 | FA3, "torch"),
        ((7, 5), FA2, "documents"),
        ((9, 0), {"flash-attn": "2.6.3"}, "torch"),
    ],
)
def test_auto_takes_the_best_kernel_that_is_installed_and_fits_the_gpu(on_a_gpu, gpu, installed, expected):
    on_a_gpu(gpu, installed)
    assert Varlen().resolve("cuda") == expected
    assert Varlen().resolve("cpu") == "documents"


@pytest.mark.parametrize(
    "installed, has_window, rule",
    [
        ("4.0.0b18", False, "causal window"),
        *((version, True, f"flash-attn-4 {version}") for version in ("4.0.0b19", "4.0.0", "4.1.2")),
    ],
)
def test_auto_passes_over_a_fa4_that_torch_cannot_use(on_a_gpu, installed, has_window, rule):
    on_a_gpu((9, 0), {"flash-attn-4": installed}, has_window)
    assert Varlen().resolve("cuda") == "torch"
    (refusal,) = refused(Varlen(kernel="fa4"), "cuda", torch.bfloat16)
    assert rule in refusal.rule and "<4.0.0b19" in refusal.rule


def test_fa4_on_blackwell_has_head_dims_up_to_128_and_256_alone(on_a_gpu):
    refused_ones = []
    for gpu in ((9, 0), (10, 0)):
        on_a_gpu(gpu, FA4)
        for head_dim in (64, 128, 136, 192, 248, 256):
            found = refused(Varlen(kernel="fa4"), "cuda", torch.bfloat16, head_dim=head_dim)
            refused_ones += [(gpu[0], head_dim, refusal.field) for refusal in found]
    assert refused_ones == [(10, head_dim, "head_dim") for head_dim in (136, 192, 248)]


@pytest.mark.parametrize("kernel, name", [("fa3", "FA3"), ("fa4", "FA4"), ("torch", None)])
def test_a_kernel_that_takes_the_place_of_torchs_is_switched_on_once(monkeypatch, kernel, name):
    switched = []
    monkeypatch.setattr(varlen, "activate_flash_attention_impl", switched.append)
    varlen._ready.cache_clear()
    assert [varlen._ready(Varlen(kernel=kernel), "cuda") for _ in range(3)] == ["torch"] * 3
    varlen._ready.cache_clear()
    assert switched == ([name] if name else [])


@pytest.mark.parametrize("kernel", ["fa4", "fa3", "flash_attn", "torch"])
def test_building_a_named_kernel_without_a_gpu_is_an_error_that_says_so(kernel):
    with pytest.raises(ValueError, match="no CUDA device"):
        Varlen(kernel=kernel).build()


def test_flex_warns_once_on_a_cpu(caplog):
    flex._warn_once_of_the_cpu.cache_clear()
    for _ in range(3):
        Flex().mask(torch.arange(8)[None])
    assert len([record for record in caplog.records if "document by document" in record.message]) == 1


def test_the_mask_of_flex_has_its_block_size():
    for block_size in (64, 128, (64, 128)):
        config = Flex(block_size=block_size)
        mask = config.mask(torch.arange(256)[None], device="meta")
        assert isinstance(mask, flex.FlexMask) and config.blocks == mask.block_mask.BLOCK_SIZE


@pytest.mark.parametrize(
    ("block_size", "options", "tile"),
    [
        (128, {}, None),
        (64, {}, (64, 64)),
        (32, {}, (32, 32)),
        ((32, 128), {}, (32, 64)),
        (32, {"BLOCK_M": 16}, (16, 32)),
        ((128, 128), FLASH, None),
    ],
)
def test_a_block_holds_whole_tiles_of_the_forward_kernel(block_size, options, tile):
    """Autotuning tries no tile below 64, so a smaller block would have no kernel."""
    given = options_given(Flex(block_size=block_size, kernel_options=options), n_queries=2)
    assert (given.get("BLOCK_M"), given.get("BLOCK_N")) == (tile or (None, None))


@pytest.mark.parametrize(
    ("options", "of_one", "of_several"),
    [
        ({}, {}, {"BACKEND": "TRITON"}),
        ({"num_stages": 2}, {"num_stages": 2}, {"BACKEND": "TRITON", "num_stages": 2}),
        (FLASH, FLASH, FLASH),
        *[({"FORCE_USE_FLEX_ATTENTION": True},) * 3],
    ],
)
def test_only_a_single_query_may_use_torchs_decoding_kernel(options, of_one, of_several):
    """Otherwise the kernel raises if the query heads of a key head do not fit a block of the mask."""
    config = Flex(kernel_options=options)
    assert options_given(config, n_queries=1) == of_one
    assert options_given(config, n_queries=2) == options_given(config, n_queries=300) == of_several


def options_given(config, n_queries):
    """The options that FlexAttention's kernel gets."""
    inner, seen = config.build(), []
    inner.flex_attention = lambda q, *_, kernel_options, **__: seen.append(kernel_options) or q
    mask = config.mask(torch.arange(300)[None], queries=((300 - n_queries, 300),), device="meta")
    q, k = (torch.zeros(1, n, 2, 16) for n in (n_queries, 300))
    inner(q, k, k, mask)
    return seen[0]
