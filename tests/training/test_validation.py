"""The mean loss over held-out tokens."""

import math

import pytest
import torch
from torch import nn

from torchtitan_lite.training.validation import mean_loss


def test_every_token_has_the_same_weight_however_the_batches_are_cut() -> None:
    losses = [torch.arange(8.0), torch.tensor([100.0])]
    assert mean_loss(nn.Identity(), lambda x: (x.sum(), torch.tensor(len(x))), losses) == pytest.approx(
        128 / 9
    )


def test_the_model_is_in_eval_mode_without_gradients_and_is_restored() -> None:
    model = nn.Dropout()
    seen = []

    def loss_of(batch):
        seen.append((model.training, torch.is_grad_enabled()))
        return torch.tensor(1.0), torch.tensor(1)

    mean_loss(model, loss_of, [0, 1])
    assert seen == [(False, False)] * 2
    assert model.training and torch.is_grad_enabled()


def test_the_model_is_back_in_training_mode_after_a_failure() -> None:
    model = nn.Dropout()
    with pytest.raises(ZeroDivisionError):
        mean_loss(model, lambda batch: 1 / 0, [0])  # pyright: ignore[reportArgumentType]
    assert model.training


def test_without_a_valid_token_there_is_no_mean() -> None:
    assert math.isnan(mean_loss(nn.Identity(), lambda _: (torch.tensor(0.0), torch.tensor(0)), [0]))


def test_many_small_losses_are_summed_in_float64() -> None:
    batches = [torch.tensor(1e8), *[torch.tensor(1.0)] * 64]
    mean = mean_loss(nn.Identity(), lambda x: (x, torch.tensor(1)), batches)
    assert mean == pytest.approx((1e8 + 64) / 65, rel=1e-12)
