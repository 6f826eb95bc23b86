"""Attention: a mask says which keys each query sees, and a backend computes the attention."""

from torchtitan_lite.attention.capabilities import (
    AttentionConfig,
    Capabilities,
    Refusal,
    refusals,
)
from torchtitan_lite.attention.flex import Flex
from torchtitan_lite.attention.layout import LAYOUTS, WithLayout
from torchtitan_lite.attention.mask import PADDING, SEQ_DIM, positions_from_cu_seqlens
from torchtitan_lite.attention.reference import reference_attention
from torchtitan_lite.attention.sdpa import Sdpa
from torchtitan_lite.attention.varlen import Varlen

BACKENDS = (Sdpa, Flex, Varlen)
"""The config classes of the attention backends in this package."""

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
    "positions_from_cu_seqlens",
    "reference_attention",
    "refusals",
]
