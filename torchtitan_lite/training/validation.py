"""Loss on held-out text."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from torchtitan_lite.config.problem import Remedy


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Whether the model is validated, how often, and on how much text."""

    enable: bool = False
    """Measure the loss on held-out text before the first step, every `freq` steps and at the end."""
    freq: Annotated[int, Field(ge=1)] = 100
    """Steps between two validations."""
    steps: Literal[-1] | Annotated[int, Field(ge=1), Remedy("use -1 for the whole split")] = 10
    """Batches of training.global_batch_size samples per validation. -1: the whole validation split."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The result of a validation."""

    step: int
    loss: float
    """Nats per token."""
    nats_per_byte: float
    unigram_entropy: float
    """Loss in nats per byte of a model that knows only the byte frequencies of the held-out text."""


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    loss_of: Callable[[Any], tuple[Tensor, Tensor]],
    batches: Iterable[Any],
    over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
) -> float:
    """Mean loss over every valid token of `batches`, in nats per token.

    Every token has the same weight, however the batches are cut. Without a valid token the mean is NaN.

    Args:
        model: in eval mode during the call.
        loss_of: gives the sum of the losses of a batch, and the count of its valid tokens.
        over_ranks: sums a tensor [loss, count] over all ranks.
    """
    was_training = model.training
    model.eval()
    try:
        sums, counts = zip(*(loss_of(batch) for batch in batches), strict=True)
    finally:
        model.train(was_training)
    both = [torch.stack(values).double().sum() for values in (sums, counts)]
    total, count = over_ranks(torch.stack(both)).tolist()
    return total / count if count else float("nan")
