"""The loss on held-out text: its settings, its measurement and its result."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from torchtitan_lite.config.problem import Remedy


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The settings of validation: whether, how often, and on how much held-out text."""

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
    """The mean loss in nats per token."""
    nats_per_byte: float
    unigram_entropy: float
    """The loss, in nats per byte, of a model that knows only the byte frequencies of the held-out text."""


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    loss_of: Callable[[Any], tuple[Tensor, Tensor]],
    batches: Iterable[Any],
    over_ranks: Callable[[Tensor], Tensor] = lambda x: x,
) -> float:
    """Return the mean loss over all tokens of `batches` that have a label, in nats per token.

    Every token has the same weight, whatever the sizes of the batches. Without a label the mean is NaN.

    Args:
        model: the model, which is in eval mode during the call.
        loss_of: returns the summed loss of a batch, and the number of its labels.
        over_ranks: returns the sum of a tensor [loss, count] over all ranks.
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
