"""The check that the loss and the gradient norm of a step are finite."""

import math
from collections.abc import Sequence

from torchtitan_lite.launch.end import RunError


class NonFinite(RunError):
    """The loss or the gradient norm of a step is infinite or NaN; the weights have not been updated."""

    outcome = "non-finite"


def check_finite(*, step: int, loss: float, grad_norm: float, sample_ids: Sequence[int]) -> None:
    """Raise NonFinite unless both numbers are finite. `sample_ids`: the step's samples on all ranks."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            raise NonFinite(
                f"the {name} of step {step} is {value}: stopped before the weights were updated; "
                f"the step's global sample ids are {', '.join(map(str, sample_ids))}"
            )
