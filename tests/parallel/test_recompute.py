"""Recompute changes no gradient, keeps what its mode says, and compiles without graph breaks."""

from collections import Counter

import exchange_cases as cases
import pytest
import torch
from exchange_cases import Pass

from torchtitan_lite.attention import Flex, Sdpa, Varlen
from torchtitan_lite.models.decoder import Decoder
from torchtitan_lite.parallel import apply, recompute
from torchtitan_lite.parallel.apply import CompileConfig
from torchtitan_lite.parallel.mesh import Degrees
from torchtitan_lite.parallel.recompute import ActivationCheckpointConfig, Kept, apply_recompute

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
    """One rank's pass, without recompute."""
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
def test_gradients_are_those_without_recompute(alone: Pass, mode: str, attention: str) -> None:
    found = cases.run_pass(MODES[mode], EAGER, config=CONFIGS[attention])
    if attention == "sdpa":
        assert all(torch.equal(found.gradients[name], alone.gradients[name]) for name in alone.gradients)
    assert_same(found, alone)


ATTENTION = "attend"
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


@pytest.mark.parametrize("attention", CONFIGS)
def test_choosing_by_modules_is_choosing_by_operators(
    alone: Pass, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """Choosing by operators, which is slow, is the reference for choosing by modules."""
    mode, config = MODES["selective, op"], CONFIGS[attention]
    fast = cases.run_pass(mode, EAGER, config=config)
    by_operator = lambda blocks, config, **_: apply_recompute(blocks, config, by_operator=True)
    monkeypatch.setattr(apply, "apply_recompute", by_operator)
    slow = cases.run_pass(mode, EAGER, config=config)
    assert torch.equal(fast.loss, slow.loss)
    for name, gradient in slow.gradients.items():
        assert torch.equal(fast.gradients[name], gradient), name
    for name in ("mm", ATTENTION, "silu", "_fused_rms_norm"):
        assert Counter(fast.backward_calls)[name] == Counter(slow.backward_calls)[name], name


def test_only_the_operators_of_attention_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, policy = [], recompute._keep_attention
    monkeypatch.setattr(recompute, "_keep_attention", lambda *a, **k: seen.append(a[1]) or policy(*a, **k))
    calls = cases.run_pass(MODES["selective, op"], EAGER).forward_calls
    assert 0 < len(seen) <= 2 * calls.count(ATTENTION)  # in either forward


def losses(model: Decoder, *shifts: int) -> list[torch.Tensor]:
    """The losses of a forward for each of `shifts`, by which the tokens are shifted."""
    positions_BS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    mask, tokens_BS = model.config.attention.mask(positions_BS), cases.TOKENS_BS
    return [model(tokens_BS.roll(n, 1), positions_BS, mask, tokens_BS)[0] for n in shifts]


def test_only_products_that_a_gradient_needs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradient needs a block's last product, so keeping it would waste memory."""
    made: list[Kept] = []
    init = Kept.__init__
    monkeypatch.setattr(Kept, "__init__", lambda self, keeper: made.append(self) or init(self, keeper))
    model = cases.small_model("qwen3", n_layers=1)
    apply_recompute(model.blocks, MODES["selective, op"])
    (loss,) = losses(model, 0)
    names = ("attention.wq.weight", "attention.wv.weight", "ffn.w1.weight")
    widths = [model.blocks[0].get_parameter(name).shape[0] for name in names]
    (kept,) = made
    assert [result.shape[-1] for result in kept.results] == widths
    assert all(result.grad_fn is None for result in kept.results), "a kept result holds no graph"
    loss.backward()
    assert not kept.results, "every one was used"


def test_a_second_backward_is_refused() -> None:
    model = cases.small_model("qwen3", n_layers=1)
    apply_recompute(model.blocks, MODES["selective, op"])
    (loss,) = losses(model, 0)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="this block was differentiated before"):
        loss.backward()


def test_several_forwards_may_come_before_their_backwards() -> None:
    model, plain = (cases.small_model("qwen3") for _ in range(2))
    apply_recompute(model.blocks, MODES["selective, op"])
    first, second = losses(model, 0, 3)
    with torch.no_grad():
        assert torch.equal(losses(model, 3)[0], second), "as in a validation"
    first.backward()
    second.backward()
    for loss in losses(plain, 0, 3):
        loss.backward()
    for wanted, found in zip(plain.parameters(), model.parameters(), strict=True):
        assert wanted.grad is not None and found.grad is not None
        assert torch.equal(found.grad, wanted.grad)


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
def test_blocks_with_exchanges_are_compiled_whole_too(ranks, alone: Pass, shares: str, mode: str) -> None:
    degrees, method = SHARES[shares]
    found = ranks(2).run(cases.run_pass, MODES[mode], COMPILED, degrees, method)
    for each in found:
        assert (each.n_graphs, each.graph_breaks) == (1, [])
    assert_same_in_shares(found, alone, degrees)


@pytest.mark.parametrize("shares", SHARES)
def test_blocks_with_exchanges_keep_the_same_results_when_eager(ranks, alone: Pass, shares: str) -> None:
    degrees, method = SHARES[shares]
    found = ranks(2).run(cases.run_pass, MODES["selective, op"], EAGER, degrees, method)
    assert_same_in_shares(found, alone, degrees)


def assert_same_in_shares(found: list[Pass], alone: Pass, degrees: Degrees) -> None:
    for each in found:
        # The ranks of a tensor-parallel group have the same loss, those of a sequence terms of it.
        loss = each.loss if degrees.tensor == 2 else found[0].loss + found[1].loss
        assert_same(each._replace(loss=loss), alone)
