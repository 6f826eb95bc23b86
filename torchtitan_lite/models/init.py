"""Initial weights: a function of (seed, name, element), whatever the device, the order or the mesh."""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchtitan_lite.models.normal import Box, fill_normal
from torchtitan_lite.models.parameters import Parameter

if TYPE_CHECKING:
    from torchtitan_lite.models.decoder import Decoder

_STD = 0.02


def _whole(parameter: Tensor) -> tuple[Tensor, Box]:
    return parameter.detach(), [(0, n) for n in parameter.shape]


@torch.no_grad()
def init_weights(model: "Decoder", seed: int, shard: Callable[[Tensor], tuple[Tensor, Box]] = _whole) -> None:
    """Draw every parameter of a decoder in place, whatever its device and dtype.

    `shard(parameter)` gives this rank's part of it, in the parameter's memory, and where that part lies.
    """
    config = model.config
    for name, parameter in model.named_parameters():
        out, box = shard(parameter)
        _fill(out, config.rows[name], name, parameter.shape, box, config.n_layers, seed)


def initial_weight(row: Parameter, name: str, shape: torch.Size, n_layers: int, seed: int) -> Tensor:
    """One whole parameter, float32 on the CPU."""
    whole = torch.empty(shape, dtype=torch.float32, device="cpu")
    _fill(whole, row, name, shape, [(0, n) for n in shape], n_layers, seed)
    return whole


def _fill(
    out: Tensor, row: Parameter, name: str, shape: torch.Size, box: Box, n_layers: int, seed: int
) -> None:
    """Fill a part of a parameter: with ones or zeros, else from a normal distribution of deviation 0.02.

    What adds to the residual stream, twice in a block, gets 0.02 / sqrt(2 * n_layers), so that the variance
    of the stream does not grow with depth (Radford et al. 2019, Language Models are Unsupervised Multitask
    Learners, section 2.3).
    """
    if row.init in ("ones", "zeros"):
        out.fill_(1 if row.init == "ones" else 0)
        return
    std = _STD / (2 * n_layers) ** 0.5 if row.init == "residual" else _STD
    # A cryptographic hash: Python's own changes between processes, and nearby seeds must not be related.
    key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8])
    fill_normal(out, key, shape, box, std)
