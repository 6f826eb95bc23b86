"""Initial weights are a function of seed, parameter name and element; `fill_normal` draws any part alone."""

from statistics import NormalDist

import pytest
import torch

from torchtitan_lite.models.decoder import Decoder
from torchtitan_lite.models.init import fill_normal, init_weights
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


WORD = 2**64
SHAPES = {
    "rows": [37, 12],
    "rows of an odd length": [6, 11],
    "a vector": [29],
    "a stack": [3, 5, 7],
    "one number": [1],
}


def drawn(
    shape: list[int], key: int = 7, box: list[tuple[int, int]] | None = None, **options
) -> torch.Tensor:
    box = box or [(0, n) for n in shape]
    out = torch.empty([n for _, n in box], **options)
    fill_normal(out, key, torch.Size(shape), box, 1.0)
    return out


def splitmix64(key: int, place: int) -> int:
    """The generator in Python's own integers (https://prng.di.unimi.it/splitmix64.c)."""
    x = (key + (place + 1) * 0x9E3779B97F4A7C15) % WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31


def reference(key: int, row: int, column: int, n_columns: int) -> float:
    """One number, from the definition."""
    bits = splitmix64(key, row * ((n_columns + 1) // 2) + column // 2)
    half = bits >> 32 if column % 2 else bits % 2**32
    tail = (half % 2**31 | 1) / 2**32
    size = -NormalDist().inv_cdf(tail)
    return -size if half >> 31 else size


@pytest.mark.parametrize("key", [0, 7, 2**63, WORD - 1])
def test_every_number_is_the_one_of_the_definition(key: int) -> None:
    found = drawn([50, 31], key)
    wanted = torch.tensor([[reference(key, row, column, 31) for column in range(31)] for row in range(50)])
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)


def test_a_place_beyond_32_bits_has_a_number_of_its_own() -> None:
    shape, first = [2**22, 2**13], 2**22 - 3
    found = drawn(shape, 7, [(first, 3), (2**13 - 5, 5)])
    wanted = [
        [reference(7, first + row, 2**13 - 5 + column, 2**13) for column in range(5)] for row in range(3)
    ]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_part_is_that_part_of_the_whole_bit_by_bit(shape: list[int]) -> None:
    whole, chance = drawn(shape), torch.Generator().manual_seed(3)
    for _ in range(20):
        starts = [int(torch.randint(n, (1,), generator=chance)) for n in shape]
        box = [
            (start, int(torch.randint(1, n - start + 1, (1,), generator=chance)))
            for start, n in zip(starts, shape, strict=True)
        ]
        part = whole[tuple(slice(start, start + n) for start, n in box)]
        assert torch.equal(drawn(shape, box=box), part), box


def test_a_tensor_that_is_drawn_in_several_goes_is_the_same(monkeypatch) -> None:
    whole = drawn([100, 40])
    monkeypatch.setattr("torchtitan_lite.models.init._MOST", {"cpu": 130})
    assert torch.equal(drawn([100, 40]), whole)


def test_an_empty_part_is_left_alone() -> None:
    assert drawn([4, 6], box=[(4, 0), (0, 6)]).shape == (0, 6)


def test_other_dtypes_and_strides_get_the_same_numbers_rounded() -> None:
    whole = drawn([8, 6])
    assert torch.equal(drawn([8, 6], dtype=torch.bfloat16), whole.bfloat16())
    turned = torch.empty(6, 8).t()
    fill_normal(turned, 7, turned.shape, [(0, 8), (0, 6)], 1.0)
    assert torch.equal(turned, whole)


def test_the_numbers_are_distributed_normally() -> None:
    n = 1 << 20
    x = drawn([1024, 1024]).flatten().double().sort().values
    # Kolmogorov and Smirnov: by chance the distance of the distributions exceeds 1.63 / sqrt(n) once in 100.
    wanted = torch.special.ndtr(x)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum(steps[1:] - wanted, wanted - steps[:-1]).max().item()
    assert distance < 1.63 / n**0.5
    assert 4.3 < x.abs().max().item() < 6.5, "the tails are there"


def test_neighbours_rows_and_keys_have_nothing_to_do_with_each_other() -> None:
    x = drawn([512, 512])
    pairs = {
        "columns of a pair": (x[:, 0::2], x[:, 1::2]),
        "pairs": (x[:, 1:-1:2], x[:, 2::2]),
        "rows": (x[1:], x[:-1]),
        "keys": (x, drawn([512, 512], key=8)),
    }
    for name, (one, other) in pairs.items():
        correlation = (one * other).mean().item() * one.numel() ** 0.5
        assert abs(correlation) < 4, name
        # The sizes of the numbers are not correlated either.
        sizes = ((one**2 - 1) * (other**2 - 1)).mean().item() / 2 * one.numel() ** 0.5
        assert abs(sizes) < 4, name
