"""The refusal of numbers that are not finite."""

import math
from collections.abc import Sequence

from torchtitan_lite.launch.end import RunError


class NonFinite(RunError):
    """A loss or gradient norm that is not finite, found before it reached the weights."""

    outcome = "non-finite"

    def __init__(self, *, step: int, name: str, value: float, sample_ids: Sequence[int]) -> None:
        self.step, self.name, self.value, self.sample_ids = step, name, value, list(sample_ids)
        super().__init__(
            f"the {name} of step {step} is {value}: stopped before the weights were updated; "
            f"the step's global sample ids are {', '.join(map(str, sample_ids))}"
        )


def check_finite(*, step: int, loss: float, grad_norm: float, sample_ids: Sequence[int]) -> None:
    """Raise NonFinite unless both numbers are finite."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            raise NonFinite(step=step, name=name, value=value, sample_ids=sample_ids)
