"""The operators under torch.compile and under torch's own checks of custom operators."""

import pytest
import torch
from attention_cases import POSITIONS, QUERIES, qkv

from torchtitan_lite.attention import Flex, Sdpa, Varlen
from torchtitan_lite.attention.tile_kernels import CpuKernel, PlainKernel, attend_tiles
from torchtitan_lite.attention.tiles import document_tiles


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
def test_the_operator_over_tiles_passes_torchs_checks(queries):
    tiles = document_tiles(POSITIONS["padded both sides and packed"], QUERIES[queries], 7)
    q, k, v = qkv(2, tiles.shape[1], 53, 6, 2)
    torch.library.opcheck(attend_tiles, (q, k, v, tiles.table, tiles.masks, 0.37))


@pytest.mark.parametrize(
    "causal, masked, n, m",  # a tile is causal or masked, never both
    [
        (True, False, 19, 19),
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
    found = []
    for kernel in (CpuKernel(), PlainKernel(block=7)):
        out, lse = kernel.forward(q, k, v, causal, mask, 0.37)
        grads = kernel.backward(torch.ones_like(out), q, k, v, out, lse, causal, mask, 0.37)
        found.append((out, lse, *grads))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
