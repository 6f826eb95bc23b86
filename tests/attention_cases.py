"""Positions, queries, tensors and the comparison with the reference, for the attention tests."""

from itertools import pairwise

import torch

from torchtitan_lite.attention import reference_attention
from torchtitan_lite.attention.packs import PackEvaluator
from torchtitan_lite.attention.portable.kernels import OneTile, PlainKernel

KEYS, HEAD_DIM = 53, 12  # S, H, G and K differ from each other, so a wrong axis shows
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def rows(*documents: list[int]) -> torch.Tensor:
    """Positions of rows of documents. A negative length -n means n tokens of padding."""
    return torch.stack(
        [torch.cat([torch.arange(n) if n > 0 else torch.full((-n,), -1) for n in row]) for row in documents]
    )


POSITIONS = {
    "one document": rows([53], [53]),
    "packed": rows([1, 20, 1, 31], [17, 36]),
    "packed, equal rows": rows([20, 33], [20, 33]),
    "documents of length 1": rows([1] * 53, [50, 1, 1, 1]),
    "padded right": rows([40, -13], [53]),
    "padded left": rows([-13, 40], [-1, 52]),
    "padded both sides and packed": rows([-3, 1, 30, 9, -10], [-20, 33]),
    "a row of padding alone": rows([-53], [53]),
}
QUERIES = {
    "all": None,
    "the last one": ((52, 53),),
    "the last nine": ((44, 53),),
    "two chunks": ((7, 20), (33, 47)),
    "chunks that touch": ((7, 20), (20, 41)),
    "chunks out of order": ((33, 47), (7, 20)),
}


def qkv(batch, n_queries, n_keys, heads, kv_heads, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, n_queries, heads), (batch, n_keys, kv_heads), (batch, n_keys, kv_heads)]
    return [torch.randn(*s, HEAD_DIM, generator=g, dtype=dtype).requires_grad_() for s in shapes]


def compare(config, positions_BS, queries, window, heads, kv_heads, scale, tolerance, dtype=torch.float64):
    """Assert that a backend (a config, or a pair of a mask function and a module) equals the reference."""
    n_queries = positions_BS.shape[1] if queries is None else sum(stop - start for start, stop in queries)
    q, k, v = qkv(len(positions_BS), n_queries, positions_BS.shape[1], heads, kv_heads, dtype)
    make_mask, inner = config if isinstance(config, tuple) else (config.mask, config.build())
    out = inner(q, k, v, make_mask(positions_BS, queries=queries, sliding_window=window), scale=scale)
    expected = reference_attention(q, k, v, positions_BS, queries, window, scale)
    torch.testing.assert_close(out, expected, **tolerance)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found, wanted = (torch.autograd.grad(x, (q, k, v), upstream) for x in (out, expected))
    for name, a, b in zip("qkv", found, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m, name=name: f"d{name}: {m}")
    return out, found


class DocumentByDocument:
    """A kernel for packs: `PlainKernel` under an explicit mask, one document at a time."""

    def forward(self, q, k, v, how):
        found = [PlainKernel().forward(q_, k_, v_, tile) for q_, k_, v_, tile in _parted(how, q, k, v)]
        outs, lses = zip(*found, strict=True)
        return torch.cat(outs, 2)[0].transpose(0, 1), torch.cat(lses, 2)[0]

    def backward(self, dout, q, k, v, out, lse, how):
        edges = pairwise(how.cu_q_D.tolist())
        parts = []
        for (q_, k_, v_, tile), (q0, q1) in zip(_parted(how, q, k, v), edges, strict=True):
            dout_, out_ = (_heads_first(x[q0:q1]) for x in (dout, out))
            parts.append(PlainKernel().backward(dout_, q_, k_, v_, out_, lse[None, :, q0:q1], tile))
        dq, dk, dv = (torch.cat(part, 2)[0].transpose(0, 1) for part in zip(*parts, strict=True))
        return dq, dk, dv


def _parted(documents, q_THK, k_UGK, v_UGK):
    """The queries, keys and values of each document, and how to compute its attention."""
    edges = zip(*(pairwise(cu_D.tolist()) for cu_D in (documents.cu_q_D, documents.cu_k_D)), strict=True)
    for (q0, q1), (k0, k1) in edges:
        behind = (k1 - k0) - (q1 - q0)  # keys before the first query
        sees = q_THK.new_ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(behind)
        if documents.window is not None:
            sees = sees.triu(behind - documents.window + 1)
        mask = torch.zeros(sees.shape, device=sees.device).masked_fill(~sees, float("-inf"))
        tile = OneTile(False, mask, documents.scale)
        yield _heads_first(q_THK[q0:q1]), _heads_first(k_UGK[k0:k1]), _heads_first(v_UGK[k0:k1]), tile


def _heads_first(x_THK):
    return x_THK.transpose(0, 1)[None]


REFERENCE = PackEvaluator(DocumentByDocument())
"""Evaluates packs on a CPU, where FlashAttention does not run."""
