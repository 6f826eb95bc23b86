"""The interface of optimizers, and AdamW, which decays all parameters except vectors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from torchtitan_lite.config.problem import Remedy
from torchtitan_lite.registry import optimizers


class OptimizerConfig(Protocol):
    """The options of a registered optimizer. `lr` is the peak learning rate. `build` makes the optimizer.

    `build` gets the parameters by name, and by the same names the group of each parameter: "matrix",
    "embedding", "head", "vector", "router" or "expert".

    The class may have `numbers_per_weight`, the float32 numbers that its optimizer keeps for each weight. The
    run then prints the memory that it expects.
    """

    @property
    def name(self) -> str: ...

    @property
    def lr(self) -> float: ...

    def build(
        self, parameters: Mapping[str, nn.Parameter], groups: Mapping[str, str]
    ) -> torch.optim.Optimizer: ...


@optimizers.register
@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""

    name: Literal["AdamW"] = "AdamW"
    """AdamW: Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""
    lr: Annotated[float, Field(gt=0, examples=[8e-4])] = 8e-4
    """Peak learning rate. The schedule scales it."""
    beta1: Annotated[float, Field(ge=0, lt=1, examples=[0.9])] = 0.9
    """Decay rate of the running mean of the gradient."""
    beta2: Annotated[float, Field(ge=0, lt=1, examples=[0.95])] = 0.95
    """Decay rate of the running mean of the squared gradient."""
    eps: Annotated[float, Field(gt=0, examples=[1e-8])] = 1e-8
    """Number that is added to the denominator of the update."""
    weight_decay: Annotated[float, Field(ge=0), Remedy("use 0 for none")] = 0.1
    """Weight decay of all parameters except vectors, such as norm weights, which are never decayed."""
    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """fused: one kernel for all weights; foreach: batched operations; for-loop: one weight at a time."""

    numbers_per_weight: ClassVar[int] = 2
    """The float32 numbers that the optimizer keeps for each weight: running means of gradient and square."""

    def build(
        self, parameters: Mapping[str, nn.Parameter], groups: Mapping[str, str]
    ) -> torch.optim.Optimizer:
        """Return AdamW with two parameter groups: vectors without decay, and all other parameters."""
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
    """An AdamW that updates each rank's shards as plain tensors.

    The update is elementwise, and gradients are sharded like their weights, so each rank can update its own
    shards. DTensor would add Python time for each tensor. The device would be idle in this time, because the
    host has just waited for the device, to read the loss and the norm.
    """

    def _init_group(self, group: Any, *lists: list[Tensor]) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        from torch.distributed.tensor import DTensor  # slow to import, and not needed for --dry-run

        has_complex = super()._init_group(group, *lists)
        for tensors in lists:  # weights, gradients and their state
            tensors[:] = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
        return has_complex


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, groups: Mapping[str, str]
) -> torch.optim.Optimizer:
    """Return the optimizer of all `parameters` that require gradients. `groups` has the group of each.

    Each of the optimizer's parameter groups has an "initial_lr", which the schedule scales.
    """
    optimizer = config.build({name: p for name, p in parameters.items() if p.requires_grad}, groups)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


@torch.no_grad()
def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's state of every weight, so that a checkpoint can be loaded into it.

    A step with a learning rate of 0 creates the state and changes no weight. The rates stay 0 until the
    schedule sets them before the next step.
    """
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
