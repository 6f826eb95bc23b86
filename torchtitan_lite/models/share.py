"""Which tokens of a sequence are computed here: all, this rank's, or those that are new.

B batch, S sequence.
"""

from typing import Protocol

from torch import Tensor

from torchtitan_lite.attention.mask import Ranges


class Share(Protocol):
    """Which tokens of a sequence are computed here; attention sees the keys of all."""

    def queries(self, seq_len: int) -> Ranges | None:
        """The tokens, as ranges of a sequence's; None: all."""
        ...

    def shard(self, x_BS: Tensor) -> Tensor:
        """What `x_BS` holds of those tokens."""
        ...


class _Whole:
    def queries(self, seq_len: int) -> None:
        return None

    def shard(self, x_BS: Tensor) -> Tensor:
        return x_BS


WHOLE: Share = _Whole()
"""All tokens of a sequence."""
