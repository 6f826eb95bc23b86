"""The check that the loss and the gradient norm are finite."""

import math

import pytest

from torchtitan_lite.training.finite import NonFinite, check_finite


@pytest.mark.parametrize(
    ("loss", "grad_norm", "wrong"),
    [(math.nan, 1.0, "the loss of step 7 is nan"), (2.0, math.inf, "the gradient norm of step 7 is inf")],
)
def test_a_number_that_is_not_finite_is_refused_with_step_value_and_samples(loss, grad_norm, wrong) -> None:
    with pytest.raises(NonFinite, match=rf"^{wrong}: .* ids are 24, 25$"):
        check_finite(step=7, loss=loss, grad_norm=grad_norm, sample_ids=[24, 25])


def test_finite_numbers_pass() -> None:
    check_finite(step=1, loss=0.0, grad_norm=1e30, sample_ids=[])
