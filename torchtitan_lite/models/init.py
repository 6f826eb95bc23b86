"""Initial weights: a function of seed, parameter name and element, whatever the device, order or mesh."""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchtitan_lite.models.normal import Box, fill_normal

if TYPE_CHECKING:
    from torchtitan_lite.models.decoder import Decoder

_STD = 0.02


def _all_of(parameter: Tensor) -> tuple[Tensor, Box]:
    return parameter.detach(), [(0, n) for n in parameter.shape]


@torch.no_grad()
def init_weights(
    model: "Decoder", seed: int, shard: Callable[[Tensor], tuple[Tensor, Box]] = _all_of
) -> None:
    """Draw every parameter in place, as its row of the table says, whatever its device and dtype.

    A normal parameter has the standard deviation 0.02. Parameters that add to the residual stream, twice in a
    block, have 0.02 / sqrt(2 * n_layers), so that the variance of the stream does not grow with depth
    (Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3).

    Args:
        shard: returns this rank's part of a parameter, in the parameter's memory, and the place of that part.
    """
    rows, n_layers = model.config.rows, model.config.n_layers
    stds = {"normal": _STD, "residual": _STD / (2 * n_layers) ** 0.5}
    for name, parameter in model.named_parameters():
        out, box = shard(parameter)
        init = rows[name].init
        if init in stds:
            # A cryptographic hash: nearby seeds must not be related, and Python's hash differs by process.
            key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8])
            fill_normal(out, key, parameter.shape, box, stds[init])
        else:
            out.fill_(1 if init == "ones" else 0)
