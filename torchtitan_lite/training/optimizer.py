"""Optimizers: what each is told of the parameters, and AdamW with decay on all but vectors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchtitan_lite.registry import optimizers


class OptimizerConfig(Protocol):
    """Which optimizer updates the weights, and how strongly: the options of one that is registered."""

    @property
    def name(self) -> str: ...

    @property
    def lr(self) -> float:
        """Peak learning rate; the schedule scales it."""
        ...

    def build(
        self, parameters: Mapping[str, nn.Parameter], groups: Mapping[str, str]
    ) -> torch.optim.Optimizer:
        """The optimizer of `parameters`, by name. `groups` says which group each of them is in.

        Groups: "matrix", "embedding", "head", "vector", "router" and "expert".
        """
        ...


@optimizers.register
@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""

    name: Literal["AdamW"] = "AdamW"
    """AdamW: Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""
    lr: Annotated[float, Field(gt=0, examples=[8e-4])] = 8e-4
    """Peak learning rate; the schedule scales it."""
    beta1: Annotated[float, Field(ge=0, lt=1, examples=[0.9])] = 0.9
    """Decay rate of the running mean of the gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1, examples=[0.95])] = 0.95
    """Decay rate of the running mean of the squared gradient."""
    eps: Annotated[float, Field(gt=0, examples=[1e-8])] = 1e-8
    """Added to the denominator of the update."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decay of matrices (embeddings included); vectors such as norm weights are never decayed."""
    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """fused: one kernel for all weights; foreach: batched operations; for-loop: one weight at a time."""

    def build(
        self, parameters: Mapping[str, nn.Parameter], groups: Mapping[str, str]
    ) -> torch.optim.Optimizer:
        """AdamW in two groups: vectors, which do not decay, and the rest, which does."""
        decayed = [(name, p) for name, p in parameters.items() if groups[name] != "vector"]
        vectors = [(name, p) for name, p in parameters.items() if groups[name] == "vector"]
        parts = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return LocalAdamW(
            [part for part in parts if part["params"]],
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            fused=self.implementation == "fused",
            foreach=self.implementation == "foreach",
        )


class LocalAdamW(torch.optim.AdamW):
    """AdamW that updates each rank's shards as the plain tensors that they are.

    The update is elementwise, and gradients are sharded like their weights, so the shards can be updated
    directly. Through DTensor each tensor would cost time in Python, while the device is idle: the step's one
    read comes just before.
    """

    def _init_group(self, group: Any, *lists: list[Tensor]) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:  # weights, gradients and the state of each
            tensors[:] = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
        return has_complex


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, groups: Mapping[str, str]
) -> torch.optim.Optimizer:
    """The optimizer of those `parameters` that are trained; `groups` as in `OptimizerConfig.build`."""
    return config.build({name: p for name, p in parameters.items() if p.requires_grad}, groups)


@torch.no_grad()
def fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every weight the state that its first update makes, all zeros; the weights stay as they are."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for key, value in state.items():
            assert isinstance(value, Tensor), f"{key} of the optimizer's state is no tensor"
            value.zero_()
