"""Initial weights are a function of seed, parameter name and element."""

import pytest
import torch

from torchtitan_lite.models.decoder import Decoder
from torchtitan_lite.models.init import init_weights
from torchtitan_lite.models.registry import resolve

SMALL = {"n_layers": 3, "dim": 64, "ffn_dim": 96, "vocab_size": 300}


def small_model(family: str = "llama3", seed: int = 0) -> Decoder:
    model = resolve(family, "debugmodel", overrides=SMALL).build()
    init_weights(model, seed)
    return model


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_a_model_from_the_meta_device_has_the_weights_of_a_model_built_directly(family: str):
    config = resolve(family, "debugmodel", overrides=SMALL)
    with torch.device("meta"):
        model = config.build()
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    init_weights(model, seed=0)
    assert_same(weights(model), weights(config.build()))


def test_neither_the_order_nor_the_rest_of_the_model_matters():
    expected = weights(small_model())
    part = small_model()
    part.head = None
    part._modules = dict(reversed(part._modules.items()))
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.fill_(7.0)
    init_weights(part, seed=0)
    found = weights(part)
    assert next(iter(found)) == "norm.weight", "the order was meant to change"
    assert_same(found, {name: value for name, value in expected.items() if name in found})


def test_the_depth_is_that_of_the_config_and_not_of_the_blocks_at_hand():
    whole, part = small_model(), small_model()
    part.blocks = part.blocks[:1]
    init_weights(part, seed=0)
    found, expected = weights(part), weights(whole)
    assert_same(found, {name: expected[name] for name in found})


def test_the_number_of_threads_does_not_matter():
    threads = torch.get_num_threads()
    drawn = []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            drawn.append(weights(small_model()))
    finally:
        torch.set_num_threads(threads)
    assert_same(*drawn)


def test_the_random_state_of_the_caller_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    small_model()
    assert torch.equal(torch.rand(3), expected)


def test_other_names_and_other_seeds_give_other_weights():
    names = ("blocks.0.ffn.w1.weight", "blocks.1.ffn.w1.weight", "blocks.0.ffn.w3.weight")
    drawn = [small_model(seed=seed).get_parameter(name).flatten() for name in names for seed in (0, 1)]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert correlation.abs().max() < 0.1


def test_weights_stay_the_same_from_release_to_release():
    first = small_model().embedding.weight[0, :3]
    expected = torch.tensor([0.003365172306075692, 0.01813359186053276, -0.021590406075119972])
    assert torch.equal(first, expected)


def test_standard_deviations_are_as_stated():
    model = resolve("llama3", "debugmodel").build()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        residual = name.endswith(("attention.wo.weight", "ffn.w2.weight"))
        expected = 0.02 / (2 * 6) ** 0.5 if residual else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
        assert abs(parameter.mean().item()) < 4 * expected / parameter.numel() ** 0.5, name


def test_parameters_of_another_dtype_get_the_same_weights_rounded():
    model = small_model("qwen3")
    expected = weights(model)
    model.bfloat16()
    init_weights(model, seed=0)
    assert_same(weights(model), {name: value.bfloat16() for name, value in expected.items()})
