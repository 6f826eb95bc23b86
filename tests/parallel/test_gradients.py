"""The norm of gradients in shards, and the sum of gradients of which each rank has a term."""

import exchange_cases as cases
import pytest
import torch
from exchange_cases import PLACEMENTS
from torch import nn

from torchtitan_lite.parallel.gradients import scale, squared_norm


@pytest.mark.parametrize("names", [[name] for name in PLACEMENTS] + [list(PLACEMENTS)], ids=" and ".join)
def test_the_ranks_terms_add_up_to_the_norm_of_the_whole_gradient(ranks, names: list[str]) -> None:
    wanted = 3.0 + sum(cases.gradient_of(name).square().sum().item() for name in names)
    assert ranks(4).run(cases.squared_norms, names) == [pytest.approx(wanted, rel=1e-12)] * 4


def test_a_norm_of_ten_million_float32_numbers_is_exact_on_a_cpu() -> None:
    """torch would add their squares up in float32, with an error of 4e-4."""
    parameter = nn.Parameter(torch.empty(10_000_000))
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    assert squared_norm([parameter], 1).item() == pytest.approx(parameter.grad.double().square().sum().item())


def test_gradients_are_scaled_in_place() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    gradients = [torch.arange(3.0), torch.ones(2)]
    parameters[0].grad, parameters[1].grad = gradients
    scale(parameters, 0.5)
    assert [gradient.tolist() for gradient in gradients] == [[0.0, 0.5, 1.0], [0.5, 0.5]]
    assert parameters[2].grad is None


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_terms_are_summed_in_one_exchange_and_shards_are_left_alone(ranks, n_ranks: int) -> None:
    total = sum(range(n_ranks))
    for (first, shards, last), sent in ranks(n_ranks).run(cases.summed):
        assert first.tolist() == [total + 3.0 * n_ranks] * 3
        assert last.tolist() == [total + 5.0 * n_ranks] * 5
        assert shards.tolist() == [rank + 4.0 for rank in range(n_ranks) for _ in range(4)]
        assert sent == [("allreduce_", 4 * (3 + 5))]
