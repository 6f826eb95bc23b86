"""Attention does not copy, repeat heads, make anything quadratic, or keep more than it needs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchtitan_lite.attention import Flex, Sdpa, Varlen, WithLayout, operator
from torchtitan_lite.attention.portable.tiles import FULL, document_tiles
from torchtitan_lite.attention.sdpa import attend_whole_rows

COPIES = {
    "clone",
    "copy_",
    "contiguous",
    "_to_copy",
    "cat",
    "stack",
    "index",
    "index_select",
    "constant_pad_nd",
}
REPEATS = {"repeat", "repeat_interleave", "expand", "tile"}


class Recorder(TorchDispatchMode):
    """Records every operator that ran: its name, and the shapes and bytes of its outputs."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.made: list[tuple[str, torch.Size, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.append(name)
        self.made += [(name, x.shape, x.nbytes) for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        return out


def tensors(batch, seq_len, heads=8, kv_heads=2, head_dim=16, n_queries=None):
    shapes = [(n_queries or seq_len, heads), (seq_len, kv_heads), (seq_len, kv_heads)]
    return [torch.randn(batch, *shape, head_dim, requires_grad=True) for shape in shapes]


def one_document(batch, seq_len):
    return torch.arange(seq_len).repeat(batch, 1)


def record(inner, q, k, v, mask):
    upstream = torch.randn_like(q)
    with Recorder() as recorder, Inner():
        out = inner(q, k, v, mask, scale=0.37)
        torch.autograd.grad(out, (q, k, v), upstream)
    return recorder


def whole_rows(q, k, v, mask, scale):
    """The call on a GPU if every row is one document."""
    return attend_whole_rows(q, k, v, scale)


@pytest.mark.parametrize("inner", [Sdpa().build(), whole_rows], ids=["cpu", "cuda"])
def test_the_fused_path_neither_copies_nor_repeats_forward_or_backward(inner):
    q, k, v = tensors(2, 256)
    recorder = record(inner, q, k, v, Sdpa().mask(one_document(2, 256)))
    assert not (COPIES | REPEATS) & set(recorder.names), recorder.names
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in recorder.names


@pytest.mark.parametrize("layout", ["bshd", "sbhd", "thd"])
def test_other_layouts_are_views_forward_and_backward(layout):
    q, k, v = (x.detach() for x in tensors(1 if layout == "thd" else 2, 64))
    change = {"bshd": lambda x: x, "sbhd": lambda x: x.transpose(0, 1).contiguous(), "thd": lambda x: x[0]}
    mask = Sdpa().mask(one_document(len(q), 64))
    expected = Sdpa().build()(q, k, v, mask)
    q, k, v = (change[layout](x).requires_grad_() for x in (q, k, v))
    inner = WithLayout(Sdpa().build(), layout)
    recorder = record(inner, q, k, v, mask)
    assert not (COPIES | REPEATS) & set(recorder.names), recorder.names
    torch.testing.assert_close(inner(q, k, v, mask), change[layout](expected))


class Inner(TorchDispatchMode):
    """Runs the operator as plain Python, so that a recorder sees the calls inside."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        opened = {
            torch.ops.torchtitan_lite.attend.default: operator.forward,
            torch.ops.torchtitan_lite.attend_backward.default: operator.backward,
        }
        if func in opened:
            return opened[func]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


PACKED = torch.cat([torch.arange(n) for n in (1000, 1, 2000, 95, 1000)])[None]
PADDED = torch.cat([torch.full((96,), -1), torch.arange(4000)])[None]
CASES = {
    "one document": (one_document(1, 4096), None),
    "packed": (PACKED, None),
    "padded": (PADDED, None),
    "short queries": (PACKED, ((500, 600), (3000, 3700))),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", [Sdpa(), Flex(), Varlen()], ids=lambda config: config.kind)
def test_nothing_is_quadratic_and_no_tensor_of_query_heads_comes_from_keys(config, case):
    positions_BS, queries = CASES[case]
    n_queries = 4096 if queries is None else sum(stop - start for start, stop in queries)
    q, k, v = tensors(1, 4096, n_queries=n_queries)
    with Recorder() as masking:
        mask = config.mask(positions_BS, queries=queries)
    with Recorder() as recorder, Inner():
        out = config.build()(q, k, v, mask, scale=0.37)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    largest = max(masking.made + recorder.made, key=lambda made: made[2])
    assert largest[2] <= 4 * 4096 * 8 * 16, f"larger than q of all tokens: {largest}"
    assert max(made[1].numel() for made in masking.made + recorder.made) < 4096 * 4096 / 8
    assert not REPEATS & set(recorder.names)
    assert any("flash_attention_for_cpu_backward" in name for name in recorder.names)
    # A tensor with the length of the keys and the heads of the queries was made by repeating keys.
    if n_queries != 4096:
        assert not [made for made in recorder.made if {4096, 8, 16} <= set(made[1])]


def test_the_block_mask_of_flex_is_not_quadratic():
    with Recorder() as recorder:
        Flex().mask(PACKED, device="meta")
    assert max(made[2] for made in recorder.made) <= 4 * PACKED.nbytes


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Adds up the storages that autograd keeps."""

    def __init__(self):
        self.storages: dict[int, int] = {}
        super().__init__(self._pack, lambda x: x)

    def _pack(self, x):
        storage = x.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return x

    @property
    def n_bytes(self):
        return sum(self.storages.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", [Sdpa(), Flex(), Varlen()], ids=lambda config: config.kind)
def test_what_autograd_keeps_is_q_k_v_the_output_and_its_log_sum_exp(config, case):
    positions_BS, queries = CASES[case]
    n_queries = 4096 if queries is None else sum(stop - start for start, stop in queries)
    q, k, v = tensors(1, 4096, n_queries=n_queries)
    mask = config.mask(positions_BS, queries=queries)
    saved = Saved()
    with saved:
        out = config.build()(q, k, v, mask)
    lse_bytes = 4 * n_queries * 8
    assert saved.n_bytes == q.nbytes + k.nbytes + v.nbytes + out.nbytes + lse_bytes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", [Sdpa(), Flex(), Varlen()], ids=lambda config: config.kind)
def test_memory_falls_with_the_number_of_key_heads(config, case):
    positions_BS, queries = CASES[case]
    n_queries = 4096 if queries is None else sum(stop - start for start, stop in queries)

    def peak(kv_heads):
        q, k, v = tensors(1, 4096, kv_heads=kv_heads, n_queries=n_queries)
        with Recorder() as recorder:  # the operators from outside: their results live until the backward ends
            out = config.build()(q, k, v, config.mask(positions_BS, queries=queries))
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        outputs = ("flash_attention_for_cpu", "attend", "backward")
        made = sum(made[2] for made in recorder.made if any(word in made[0] for word in outputs))
        return q.nbytes + k.nbytes + v.nbytes + made

    # Only keys, values and their gradients grow with the number of key heads.
    one_head = 4 * 4096 * 16
    assert peak(8) - peak(2) == 4 * 6 * one_head


def test_the_work_on_packed_documents_is_the_sum_of_their_squares():
    def area(positions_BS):
        *edges, kinds = document_tiles(positions_BS).table[:, :7].unbind(1)
        row0, row1, q0, q1, k0, k1 = edges
        cells = (row1 - row0) * (q1 - q0) * (k1 - k0)
        return int(torch.where(kinds == FULL, cells, (cells + (row1 - row0) * (q1 - q0)) // 2).sum())

    lengths = (1000, 1, 2000, 95, 1000)
    assert area(PACKED) == sum(n * (n + 1) // 2 for n in lengths)
    assert area(one_document(3, 100)) == 3 * 100 * 101 // 2


def test_rows_with_the_same_documents_share_their_kernel_calls():
    same = torch.cat([torch.arange(n) for n in (20, 44)]).repeat(5, 1)
    assert len(document_tiles(same).table) == 2
    assert len(document_tiles(torch.cat([same, one_document(2, 64)])).table) == 3
