"""Attention: a mask says what may attend to what, a backend says how."""

from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, device, nn

from torchtitan_lite.attention.capabilities import Backend, Capabilities, Refusal, markdown_table, refusals
from torchtitan_lite.attention.flex import Flex
from torchtitan_lite.attention.layout import LAYOUTS, WithLayout
from torchtitan_lite.attention.mask import PADDING, SEQ_DIM, Ranges, positions_from_cu_seqlens
from torchtitan_lite.attention.reference import reference_attention
from torchtitan_lite.attention.sdpa import Sdpa
from torchtitan_lite.attention.varlen import Varlen


@runtime_checkable
class AttentionConfig(Backend, Protocol):
    """The attention of a model: a frozen dataclass that is told apart by its `kind`."""

    supports: ClassVar[tuple[Capabilities, ...]]
    """What each of its implementations can run."""

    @property
    def kind(self) -> str: ...

    def build(self) -> nn.Module:
        """The inner attention."""
        ...

    def mask(
        self,
        positions_BS: Tensor,
        queries: Ranges | None = None,
        sliding_window: int | None = None,
        device: device | str | None = None,
    ) -> Any:
        """What may attend to what, for one micro-batch and all layers; see docs/attention.md."""
        ...


BACKENDS = (Sdpa, Flex, Varlen)
"""Our own."""

__all__ = [
    "BACKENDS",
    "LAYOUTS",
    "PADDING",
    "SEQ_DIM",
    "AttentionConfig",
    "Capabilities",
    "Flex",
    "Refusal",
    "Sdpa",
    "Varlen",
    "WithLayout",
    "markdown_table",
    "positions_from_cu_seqlens",
    "reference_attention",
    "refusals",
]
