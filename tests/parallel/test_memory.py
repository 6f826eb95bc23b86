"""A rank holds its share of the state and no more, and as many activations as its recompute mode says."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import parallel_cases as cases
import pytest
import torch
import torch._dynamo

SEQ_LEN, BATCH, DIM = 64, 2, 64
BLOCK_INPUT = SEQ_LEN * BATCH * DIM * 4
"""Bytes of a block's input."""


@pytest.fixture(scope="module")
def words(texts: Path) -> list[str]:
    return cases.run_of(texts, {"training.seq-len": SEQ_LEN, "training.local-batch-size": BATCH})


TWO_LAYERS = ("--model.overrides", '{"n_layers": 2}')


@pytest.mark.parametrize(("mesh", "reshard"), [("fsdp", "default"), ("cp and fsdp", "never")])
def test_a_rank_holds_its_share_of_weights_gradients_and_optimizer(ranks, words, mesh: str, reshard) -> None:
    """Up to a row or two: FSDP pads shards that do not divide."""
    flags = [*TWO_LAYERS, "--parallelism.fsdp-reshard-after-forward", reshard]
    whole = cases.state_bytes([*words, *flags])
    n_parameters = sum(p.numel() for p in cases.new_trainer([*words, *flags]).state.model.parameters())
    assert whole == {
        "parameters": 4 * n_parameters,
        "gradients": 4 * n_parameters,
        "optimizer": 8 * n_parameters,
    }
    for size in (2, 4):
        context = 2 if mesh == "cp and fsdp" else 1
        split = ["--parallelism.context-parallel-degree", str(context)]
        for held in ranks(size).run(cases.state_bytes, [*words, *flags, *split]):
            assert held == {name: pytest.approx(total / size, rel=1e-3) for name, total in whole.items()}


def test_tensor_parallel_splits_all_but_the_norms(ranks, words) -> None:
    whole = cases.state_bytes([*words, *TWO_LAYERS])
    flags = [*TWO_LAYERS, "--parallelism.tensor-parallel-degree", "2"]
    for held in ranks(2).run(cases.state_bytes, [*words, *flags]):
        assert held == {name: pytest.approx(total / 2, rel=0.01) for name, total in whole.items()}


def of_size(n_layers: int) -> tuple[str, str]:
    """Options of a model with `n_layers` blocks."""
    shape = {"n_layers": n_layers, "dim": DIM, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 192}
    return "--model.overrides", json.dumps(shape)


FULL = ("--activation-checkpoint.mode", "full")
SELECTIVE = ("--activation-checkpoint.mode", "selective")
EVERY_SECOND = (*SELECTIVE, "--activation-checkpoint.selective-ac-option", "2")
PerBlock = Callable[..., float]


@pytest.fixture(scope="module")
def per_block(words) -> PerBlock:
    """The memory that each further block keeps for the backward, in units of a block's input."""

    @functools.cache
    def per_block(*recompute: str) -> float:
        two, four, six = (cases.kept_bytes([*words, *of_size(n), *recompute]) for n in (2, 4, 6))
        assert six - four == four - two
        return (four - two) / 2 / BLOCK_INPUT

    return per_block


def test_a_block_keeps_as_much_as_its_recompute_mode_says(per_block: PerBlock) -> None:
    full, selective, everything = per_block(*FULL), per_block(*SELECTIVE), per_block()
    assert full == 1
    assert everything > 10
    assert 1.5 * full < selective < everything / 1.5
    assert per_block(*EVERY_SECOND) == (full + everything) / 2


@pytest.mark.slow
@pytest.mark.compiler
def test_a_compiled_block_keeps_products_and_no_elementwise_functions_of_them(words) -> None:
    def n_bytes(n_layers: int) -> int:
        torch._dynamo.reset()
        trainer = cases.new_trainer([*words, *of_size(n_layers), "--compile.enable"])
        storages = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            if not isinstance(x, torch.nn.Parameter):
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            trainer.stepper.loss_of(next(trainer.state.batches))
        return sum(storages.values())

    # Inputs of both norms 2, q before and after its norm 2, k 1, v 0.5, output of attention 1, w1 3, w3 3.
    a_block = (n_bytes(4) - n_bytes(2)) / 2 / BLOCK_INPUT
    assert 12.5 < a_block < 13, "beside these no more than the norms' factors and the log-sum-exp"


def n_kept_on_a_rank(ranks, words: list[str], n_layers: int, *flags: str) -> int:
    return max(ranks(2).run(cases.kept_bytes, [*words, *of_size(n_layers), *flags]))


@pytest.mark.parametrize(
    ("axis", "share"), [("data-parallel-shard", 1), ("tensor-parallel", 0.5), ("context-parallel", 0.5)]
)
def test_full_recompute_keeps_one_share_of_a_tensor_per_block_on_every_mesh(
    ranks, words, axis: str, share: float
) -> None:
    flags = [f"--parallelism.{axis}-degree", "2", *FULL]
    two, four = (n_kept_on_a_rank(ranks, words, n, *flags) for n in (2, 4))
    assert (four - two) / 2 == share * BLOCK_INPUT


@pytest.mark.parametrize("mesh", [[], ["--parallelism.data-parallel-replicate-degree", "2"]])
def test_accumulation_does_not_reduce_gradients_more_often(ranks, words, mesh: list[str]) -> None:
    size = 4 if mesh else 2
    sums = []
    for n in (1, 2, 3):
        total = ["--training.global-batch-size", str(BATCH * size * n)]
        (counts, *others) = ranks(size).run(cases.exchanges, [*words, *of_size(2), *mesh, *total])
        assert all(other == counts for other in others)
        sums.append({name: counts[name] for name in counts if "reduce" in name})
    assert sums[0]["_reduce_scatter_base_"] == 3, "one for each block, and one for the rest"
    assert sums[1] == sums[2] == sums[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--parallelism.data-parallel-shard-degree", "2"],
        ["--parallelism.context-parallel-degree", "2"],
    ],
)
def test_a_step_sums_its_tokens_and_then_its_loss_and_norm_at_once(ranks, words, flags: list[str]) -> None:
    """One exchange for the gradient norm, whatever its shards, and the loss comes with it."""
    for counts in ranks(2).run(cases.exchanges, [*words, *of_size(2), *flags]):
        assert sum(counts[name] for name in counts if "all_reduce" in name or "allreduce" in name) == 2
