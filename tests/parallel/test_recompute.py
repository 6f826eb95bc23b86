"""What is computed again in the backward pass changes no gradient, and compiles as the rest does."""

from collections import Counter

import exchange_cases as cases
import pytest
import torch
from exchange_cases import Pass

from torchtitan_lite.attention import Flex, Sdpa, Varlen
from torchtitan_lite.parallel.apply import CompileConfig
from torchtitan_lite.parallel.mesh import Degrees
from torchtitan_lite.parallel.recompute import ActivationCheckpointConfig

N_LAYERS = 2
EAGER, COMPILED = CompileConfig(), CompileConfig(enable=True, backend="aot_eager")
MODES = {
    "none": ActivationCheckpointConfig(),
    "full": ActivationCheckpointConfig(mode="full"),
    "selective, op": ActivationCheckpointConfig(mode="selective"),
    "selective, 2": ActivationCheckpointConfig(mode="selective", selective_ac_option="2"),
}
AGAIN = [mode for mode in MODES if mode != "none"]
CONFIGS = {"sdpa": Sdpa(), "flex": Flex(), "varlen": Varlen()}


@pytest.fixture(scope="module")
def alone() -> Pass:
    """On one rank, with everything kept."""
    return cases.run_pass(MODES["none"], EAGER)


def assert_same(found: Pass, wanted: Pass) -> None:
    torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-12, atol=1e-12)
    assert found.gradients.keys() == wanted.gradients.keys()
    for name, gradient in found.gradients.items():
        torch.testing.assert_close(
            gradient, wanted.gradients[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("attention", CONFIGS)
@pytest.mark.parametrize("mode", AGAIN)
def test_gradients_are_those_of_keeping_everything(alone: Pass, mode: str, attention: str) -> None:
    found = cases.run_pass(MODES[mode], EAGER, config=CONFIGS[attention])
    if attention == "sdpa":
        assert all(torch.equal(found.gradients[name], alone.gradients[name]) for name in alone.gradients)
    assert_same(found, alone)


ATTENTION = "attend_tiles"
MATMULS_AGAIN = {
    "full": 6,  # of seven: the last one's result is in no gradient
    "selective, op": 3,
    "selective, 2": 3,  # all six of every second block
}
ATTENTION_AGAIN = {"full": 1, "selective, op": 0, "selective, 2": 0.5}


@pytest.mark.parametrize("mode", AGAIN)
def test_a_block_computes_again_what_its_mode_does_not_keep(alone: Pass, mode: str) -> None:
    found = cases.run_pass(MODES[mode], EAGER)
    kept, again = Counter(alone.backward_calls), Counter(found.backward_calls)
    assert Counter(found.forward_calls)[ATTENTION] == N_LAYERS
    assert kept[ATTENTION] == 0
    assert again[ATTENTION] == N_LAYERS * ATTENTION_AGAIN[mode]
    assert again["mm"] - kept["mm"] == N_LAYERS * MATMULS_AGAIN[mode]


@pytest.mark.parametrize("mode", MODES)
def test_blocks_are_compiled_whole_and_share_a_graph(alone: Pass, mode: str) -> None:
    found = cases.run_pass(MODES[mode], COMPILED)
    assert_same(found, alone)
    assert found.graph_breaks == []
    assert found.n_graphs == 1 + (mode == "selective, 2"), "of blocks that keep everything, and that do not"


SHARES = {
    "tp 2": (Degrees(tensor=2), "allgather"),
    "cp 2 allgather": (Degrees(context=2), "allgather"),
    "cp 2 ulysses": (Degrees(context=2), "ulysses"),
}


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("none", marks=pytest.mark.slow),
        pytest.param("full", marks=pytest.mark.slow),
        "selective, op",  # wraps the exchanges too, and looks at each
    ],
)
def test_blocks_in_shares_are_compiled_whole_too(ranks, alone: Pass, shares: str, mode: str) -> None:
    degrees, method = SHARES[shares]
    found = ranks(2).run(cases.run_pass, MODES[mode], COMPILED, degrees, method)
    for each in found:
        assert (each.n_graphs, each.graph_breaks) == (1, [])
        # The ranks of a tensor-parallel group have the same loss, those of a sequence terms of it.
        loss = each.loss if degrees.tensor == 2 else found[0].loss + found[1].loss
        assert_same(each._replace(loss=loss), alone)
