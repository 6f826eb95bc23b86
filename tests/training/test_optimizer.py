"""AdamW: weight decay, and the same update from every implementation."""

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


def step(model: nn.Module, config: AdamW) -> torch.optim.Optimizer:
    optimizer = built(model.named_parameters(), config)
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("group", "share"),
    [("vector", 1.0), *((group, 0.95) for group in ("matrix", "embedding", "head", "router", "expert"))],
)
def test_all_groups_but_vectors_decay(group: str, share: float) -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamW(lr=0.1, weight_decay=0.5).build({"x": parameter}, {"x": group})
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2, 2), share))


def test_updates_are_those_of_adamw_worked_out_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[2.0]]))
    config = AdamW(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.5)
    optimizer = built([("weight", weight)], config)
    for gradient in (3.0, -1.0):
        weight.grad = torch.tensor([[gradient]])
        optimizer.step()
    # First update: the bias-corrected means are the gradient and its square, so the step is lr * sign.
    after_first = 2.0 * (1 - 0.05) - 0.1
    mean = (0.9 * 0.1 * 3.0 + 0.1 * -1.0) / (1 - 0.9**2)
    square = (0.95 * 0.05 * 9.0 + 0.05 * 1.0) / (1 - 0.95**2)
    assert weight.item() == pytest.approx(after_first * (1 - 0.05) - 0.1 * mean / square**0.5, rel=1e-5)


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_every_implementation_gives_the_update_of_the_loop(implementation) -> None:
    model, reference = two_layers(), two_layers()
    optimizer = step(model, AdamW(implementation=implementation))
    assert [name for name in ("fused", "foreach") if optimizer.defaults[name]] == [implementation]
    step(reference, AdamW(implementation="for-loop"))
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_frozen_weights_are_not_optimized() -> None:
    model = two_layers()
    model[0].requires_grad_(False)
    optimizer = built(model.named_parameters(), AdamW())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 3


def test_shards_are_updated_as_plain_tensors_and_like_torch_does(ranks: RanksOf) -> None:
    for ours, theirs, updated in ranks(2).run(cases.updates, 3):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert Tensor in updated and updated <= {Tensor, nn.Parameter}, "a DTensor was updated"
