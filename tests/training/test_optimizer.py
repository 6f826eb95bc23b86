"""AdamW: which weights decay, and the same update from every implementation."""

from collections.abc import Iterable

import exchange_cases as cases
import pytest
import torch
from ranks import RanksOf
from torch import Tensor, nn

from torchtitan_lite.training.optimizer import AdamW, build_optimizer


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.RMSNorm(3))


def built(named_parameters: Iterable[tuple[str, nn.Parameter]], config: AdamW) -> torch.optim.Optimizer:
    parameters = dict(named_parameters)
    groups = {name: "vector" if p.ndim < 2 else "matrix" for name, p in parameters.items()}
    return build_optimizer(parameters, config, groups)


def step(model: nn.Module, config: AdamW) -> None:
    optimizer = built(model.named_parameters(), config)
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()


def test_matrices_decay_and_vectors_do_not() -> None:
    model = two_layers()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = built(model.named_parameters(), AdamW(lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        share = 1 - 0.1 * 0.5 if p.ndim >= 2 else 1.0
        torch.testing.assert_close(p.detach(), before[name] * share)


@pytest.mark.parametrize(
    ("group", "share"),
    [("vector", 1.0), *((group, 0.95) for group in ("matrix", "embedding", "head", "router", "expert"))],
)
def test_the_group_of_a_parameter_decides_whether_it_decays(group: str, share: float) -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamW(lr=0.1, weight_decay=0.5).build({"x": parameter}, {"x": group})
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2, 2), share))


def test_one_update_is_adamw_worked_out_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[2.0]]))
    config = AdamW(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.5)
    optimizer = built([("weight", weight)], config)
    for gradient in (3.0, -1.0):
        weight.grad = torch.tensor([[gradient]])
        optimizer.step()
    # First: the means are the gradient itself once their bias is taken out, so the step is lr times its sign.
    after_first = 2.0 * (1 - 0.05) - 0.1
    mean = (0.9 * 0.1 * 3.0 + 0.1 * -1.0) / (1 - 0.9**2)
    square = (0.95 * 0.05 * 9.0 + 0.05 * 1.0) / (1 - 0.95**2)
    assert weight.item() == pytest.approx(after_first * (1 - 0.05) - 0.1 * mean / square**0.5, rel=1e-5)


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_every_implementation_gives_the_update_of_the_loop(implementation) -> None:
    model, reference = two_layers(), two_layers()
    step(model, AdamW(implementation=implementation))
    step(reference, AdamW(implementation="for-loop"))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_the_implementation_that_is_asked_for_is_the_one_that_runs(implementation) -> None:
    optimizer = built(two_layers().named_parameters(), AdamW(implementation=implementation))
    chosen = {name: optimizer.defaults[name] for name in ("fused", "foreach")}
    assert chosen == {"fused": implementation == "fused", "foreach": implementation == "foreach"}


def test_frozen_weights_are_left_out() -> None:
    model = two_layers()
    model[0].requires_grad_(False)
    optimizer = built(model.named_parameters(), AdamW())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


def test_shards_are_updated_as_plain_tensors_to_what_torch_makes_of_them(ranks: RanksOf) -> None:
    for ours, theirs, updated in ranks(2).run(cases.updates, 3):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert Tensor in updated and updated <= {Tensor, nn.Parameter}, "no DTensor among them"
