"""Rotary position embedding, half-rotation layout, with the frequency scaling of Llama 3.1.

B batch, S sequence, H heads (query or key), K head dim, F = K / 2 frequencies.

Features f and f + K/2 of a head are a pair, which is rotated by the angle position * frequency[f]
(https://arxiv.org/abs/2104.09864; Hugging Face checkpoints pair features in the same way).
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from torchtitan_lite.config.load import Problem

Rotation = tuple[Tensor, Tensor]
"""The cosines and sines (cos_BS1F, sin_BS1F) of every token's angles, in float32. All blocks use them."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling that slows the low frequencies, so that a model can use a longer context (Llama 3.1)."""

    factor: Annotated[float, Field(ge=1)] = 8.0
    """Factor by which the lowest frequencies are slowed. 1 changes nothing."""
    low_freq_factor: Annotated[float, Field(gt=0, examples=[1.0])] = 1.0
    """Frequencies that turn fewer times than this in the original context are slowed by the whole factor."""
    high_freq_factor: float = 4.0
    """Frequencies that turn more times than this in the original context are not changed."""
    original_max_seq_len: Annotated[int, Field(ge=1)] = 8192
    """Tokens of context that the model was trained for before the scaling."""

    def problems(self, key: str) -> list[Problem]:
        """Return a problem if high_freq_factor does not exceed low_freq_factor."""
        if self.high_freq_factor > self.low_freq_factor:
            return []
        rule = f"must exceed low_freq_factor = {self.low_freq_factor}"
        remedy, reads = f"use {max(4.0, 2 * self.low_freq_factor)}", (f"{key}.low_freq_factor",)
        return [Problem(f"{key}.high_freq_factor", self.high_freq_factor, rule, remedy, reads)]

    def apply(self, frequency_F: Tensor) -> Tensor:
        """Return the scaled frequencies: low frequencies slowed, high ones kept, those in between blended.

        Source: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py (apply_scaling).
        """
        turns_F = self.original_max_seq_len * frequency_F / (2 * math.pi)
        kept_F = (turns_F - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return torch.lerp(frequency_F / self.factor, frequency_F, kept_F.clamp(0, 1))


def rotation(positions_BS: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None) -> Rotation:
    """Return the cosines and sines of the angles at `positions_BS`. Padding (-1) counts as position 0."""
    # Computed in every forward: a buffer would have no values after construction on the meta device.
    exponent_F = torch.arange(0, head_dim, 2, device=positions_BS.device, dtype=torch.float32) / head_dim
    frequency_F = 1.0 / theta**exponent_F
    if scaling is not None:
        frequency_F = scaling.apply(frequency_F)
    # float32: at long context neighbouring positions have the same angle in bfloat16.
    angle_BS1F = positions_BS.clamp(min=0).float()[:, :, None, None] * frequency_F
    return angle_BS1F.cos(), angle_BS1F.sin()


def rotate(x_BSHK: Tensor, rotation: Rotation) -> Tensor:
    """Rotate `x_BSHK` in float32, and return the result in the dtype of the input."""
    cos_BS1F, sin_BS1F = rotation
    # chunk, not slices: the backward of a slice fills zeros and copies; the backward of chunk concatenates.
    first_BSHF, second_BSHF = x_BSHK.chunk(2, dim=-1)
    turned = (first_BSHF * cos_BS1F - second_BSHF * sin_BS1F, second_BSHF * cos_BS1F + first_BSHF * sin_BS1F)
    return torch.cat(turned, dim=-1).to(x_BSHK.dtype)
