"""The refusal of numbers that are not finite."""

import math

import pytest

from torchtitan_lite.training.finite import NonFinite, check_finite


@pytest.mark.parametrize(
    ("name", "loss", "norm"), [("loss", math.nan, 1.0), ("gradient norm", 2.0, math.inf)]
)
def test_a_number_that_is_not_finite_is_refused_with_step_value_and_samples(name, loss, norm) -> None:
    with pytest.raises(NonFinite) as caught:
        check_finite(step=7, loss=loss, grad_norm=norm, sample_ids=[24, 25])
    value = loss if name == "loss" else norm
    for part in (f"the {name} of step 7 is {value}", "24, 25"):
        assert part in str(caught.value)
    assert caught.value.sample_ids == [24, 25]


def test_finite_numbers_pass() -> None:
    check_finite(step=1, loss=0.0, grad_norm=1e30, sample_ids=[])
