"""Tensor parallel: the loss and the gradients of one rank, while each rank has only its share."""

from functools import partial

import exchange_cases as cases
import pytest
import torch
from exchange_cases import SCALE, SMALL, TOKENS_BS, Loss, loss_inputs
from torch import Tensor, nn
from torch.nn import functional as F

from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.models.init import init_weights
from torchtitan_lite.models.layers import Linear
from torchtitan_lite.models.loss import IGNORE, linear_cross_entropy
from torchtitan_lite.models.registry import resolve
from torchtitan_lite.parallel import tensor
from torchtitan_lite.parallel.mesh import Degrees

assert_equal = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
VOCAB, BATCH, SEQ_LEN, DIM = 28, 2, 36, 5
SHARES = {"of the vocabulary": True, "of the tokens": False}
LABELS = {
    "of every share": lambda labels_BS: labels_BS,
    "of the first share alone": lambda labels_BS: labels_BS.clamp(max=VOCAB // 4 - 1),
    "the first and the last of each half": lambda labels_BS: torch.where(
        labels_BS == IGNORE, IGNORE, torch.tensor([0, VOCAB // 2 - 1, VOCAB // 2, VOCAB - 1])[labels_BS % 4]
    ),
    "none in a row": lambda labels_BS: labels_BS.index_fill(0, torch.tensor([1]), IGNORE),
    "none in a rank's tokens": lambda labels_BS: labels_BS.index_fill(1, torch.arange(9), IGNORE),
    "none": lambda labels_BS: torch.full_like(labels_BS, IGNORE),
}


def whole_loss(x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor) -> Loss:
    x_BSD, weight_VD = x_BSD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    value, n_valid = linear_cross_entropy(x_BSD, weight_VD, labels_BS)
    dx_BSD, dweight_VD = torch.autograd.grad(SCALE * value, (x_BSD, weight_VD))
    return Loss(value.detach(), n_valid, dx_BSD, dweight_VD)


@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("shares", SHARES)
def test_the_loss_in_shares_equals_the_whole_loss_and_so_do_its_gradients(
    ranks, shares: str, n_ranks: int
) -> None:
    x_BSD, weight_VD, labels_BS = loss_inputs(BATCH, SEQ_LEN, DIM, VOCAB)
    some = [(x_BSD, weight_VD, choose(labels_BS)) for choose in LABELS.values()]
    for of_rank in ranks(n_ranks).run(cases.losses, SHARES[shares], some):
        for name, case, found in zip(LABELS, some, of_rank, strict=True):
            for part, ours, theirs in zip(Loss._fields, found, whole_loss(*case), strict=True):
                message = f"{part}, labels {name}"
                assert_equal(ours, theirs, msg=lambda m, w=message: f"{w}: {m}")


def test_large_logits_do_not_overflow(ranks) -> None:
    """With the maximum of its own share alone, a rank would overflow on the logits of another share."""
    x_BSD, weight_VD, labels_BS = loss_inputs(BATCH, SEQ_LEN, DIM, VOCAB)
    case = x_BSD, torch.cat([weight_VD[: VOCAB // 2] + 1e4, weight_VD[VOCAB // 2 :]]), labels_BS
    wanted = whole_loss(*case)
    assert all(part.isfinite().all() for part in wanted)
    for (found,) in ranks(2).run(cases.losses, True, [case]):
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)  # logits of 1e4


def test_ranks_exchange_three_numbers_for_each_row_and_never_logits(ranks) -> None:
    vocab, dim = 1000, 4
    x_BSD, weight_VD, labels_BS = loss_inputs(2, 256, dim, vocab)
    n_rows, number = labels_BS.numel(), 8
    rows = n_rows // 16
    assert rows * vocab // 2 > max(x_BSD.numel(), weight_VD.numel()), "logits were meant to be largest"
    for sent, largest in ranks(2).run(cases.watch_loss, x_BSD, weight_VD, labels_BS):
        reduced = [n_bytes for name, n_bytes in sent if name == "allreduce_"]
        maximum, sums = rows * number, 2 * rows * number
        assert reduced == [maximum, sums] * (n_rows // rows)
        others = [(name, n_bytes) for name, n_bytes in sent if name != "allreduce_"]
        tokens = x_BSD.numel() * number
        assert others == [("all_gather_into_tensor", tokens // 2), ("reduce_scatter_tensor", tokens)]
        assert largest == rows * vocab // 2, "the logits of a chunk on a share"


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_an_embedding_by_rows_equals_the_whole_one(ranks, n_ranks: int) -> None:
    weight = cases.small_model("llama3").embedding.weight
    whole_BSD = F.embedding(TOKENS_BS, weight)
    upstream_BSD = torch.randn(whole_BSD.shape, dtype=whole_BSD.dtype)
    (wanted,) = torch.autograd.grad(whole_BSD, weight, upstream_BSD)
    found = ranks(n_ranks).run(cases.look_up, upstream_BSD)
    assert torch.equal(torch.cat([x_BsD for x_BsD, _, _ in found], dim=1), whole_BSD)
    for (_, share, gathered), rows in zip(found, wanted.chunk(n_ranks), strict=True):
        assert_equal(share, rows)
        assert_equal(gathered, wanted)


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_every_parameter_is_split_along_the_dim_of_its_row(ranks, family: str) -> None:
    dims = {name: row.shard_dim for name, row in cases.small_model(family).config.rows.items()}
    for shapes in ranks(2).run(cases.local_shapes, family):
        assert sorted(shapes) == sorted(dims)
        for name, (whole, local) in shapes.items():
            halved, dim = list(whole), dims[name]
            assert (dim is None) == (len(whole) == 1), "norms are whole, and nothing else is"
            if dim is not None:
                halved[dim] //= 2
            assert list(local) == halved, name


def test_a_module_that_cannot_read_its_share_is_refused() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(4))

    class Pair(Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.other = nn.Parameter(torch.ones(4))

    model = cases.small_model("qwen3")
    tensor.check_readers(model)
    model.scale, model.pair = Scale(), Pair()
    with pytest.raises(ConfigError) as refused:
        tensor.check_readers(model)
    scale, pair = str(refused.value).splitlines()
    assert scale.startswith("module scale has a parameter and no weight_for, so tensor parallel cannot give")
    assert pair.startswith(
        "module pair has several parameters, so tensor parallel cannot give each rank its share"
    )


UNEVEN = {**SMALL, "dim": 6, "n_heads": 3, "n_kv_heads": 3, "head_dim": 2, "ffn_dim": 10}
MESHES = {
    "fsdp 2": (Degrees(shard=2), SMALL),
    "tp 2": (Degrees(tensor=2), SMALL),
    "cp 2": (Degrees(context=2), SMALL),
    "fsdp 2 x tp 2": (Degrees(shard=2, tensor=2), SMALL),
    "cp 2 x tp 2": (Degrees(context=2, tensor=2), SMALL),
    "fsdp 2 x cp 2": (Degrees(shard=2, context=2), SMALL),
    "hsdp 2x2": (Degrees(replicate=2, shard=2), SMALL),
    "replicate 2 x cp 2": (Degrees(replicate=2, context=2), SMALL),
    "replicate 2 x tp 2": (Degrees(replicate=2, tensor=2), SMALL),
    "fsdp 4, uneven": (Degrees(shard=4), UNEVEN),
    "fsdp 2 x tp 2, uneven": (Degrees(shard=2, tensor=2), {**SMALL, "ffn_dim": 10, "vocab_size": 42}),
}


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
@pytest.mark.parametrize("mesh", MESHES)
def test_initial_weights_are_those_of_one_rank(ranks, mesh: str, family: str) -> None:
    degrees, overrides = MESHES[mesh]
    model = resolve(family, "debugmodel", overrides=overrides).build()
    init_weights(model, 3)
    wanted = dict(model.named_parameters())
    for found, n_drawn, n_held in ranks(degrees.world).run(cases.initial_weights, family, overrides, degrees):
        assert n_drawn == n_held, "a rank draws its own shards, and nothing else"
        assert found.keys() == wanted.keys()
        assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
