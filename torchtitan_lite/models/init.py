"""Initial weights as a function of seed, parameter name and element, equal on every device and mesh.

R rows, P pairs of neighbouring columns, C columns.

The generator is counter-based: splitmix64 turns the place of a pair into 64 bits
(https://prng.di.unimi.it/splitmix64.c), 32 bits for each of the two columns. One of the 32 bits is the sign.
The other 31 bits are the probability that a normal number is at least as far from zero. A table of straight
lines, 256 for every power of two, gives the number that has this probability.

To draw a number takes integer arithmetic, one look-up, and one product and one sum of float32. Every device
rounds these in the same way, so the numbers are equal bit for bit on every device, mesh and number of
threads. Logarithms and cosines would not be equal.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchtitan_lite.models.decoder import Decoder

Box = list[tuple[int, int]]
"""A part of a tensor, as its start and its length in each dim."""

# https://prng.di.unimi.it/splitmix64.c, as signed numbers: torch multiplies them modulo 2**64 too.
_GOLDEN, _MIX1, _MIX2 = (
    number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
_SIGN = -(2**31)
_LINE_BITS = 8
"""The base-2 logarithm of the number of lines for every power of two of the probability."""
_REST_BITS = 23 - _LINE_BITS
"""The number of bits of a float32's fraction that give the place on a line."""
_ONE = 127 << _LINE_BITS
"""The index of the line that starts at 1.0, if lines are counted from float32's exponent 0."""
_MOST = {"cpu": 1 << 16, "cuda": 1 << 24}
"""The count of numbers drawn at a time: few enough for a processor's cache, enough to keep a GPU busy."""
_STD = 0.02


def _all_of(parameter: Tensor) -> tuple[Tensor, Box]:
    return parameter.detach(), [(0, n) for n in parameter.shape]


@torch.no_grad()
def init_weights(
    model: "Decoder", seed: int, shard: Callable[[Tensor], tuple[Tensor, Box]] = _all_of
) -> None:
    """Fill every parameter in place with its initial values: normal numbers, ones or zeros.

    A normal parameter has the standard deviation 0.02. Parameters that add to the residual stream, twice in a
    block, have 0.02 / sqrt(2 * n_layers), so that the variance of the stream does not grow with depth
    (Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3).

    Args:
        shard: returns a view of this rank's shard of a parameter, and the place of the shard in each dim.
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


@torch.no_grad()
def fill_normal(out: Tensor, key: int, shape: torch.Size, box: Box, std: float) -> None:
    """Fill `out`, the part `box` of a tensor of `shape`, with normal numbers of standard deviation `std`.

    Args:
        key: a number of 64 bits; another key gives unrelated numbers.
    """
    if out.numel() == 0:
        return
    start, n_columns = box[-1]
    n_pairs = (start + n_columns + 1) // 2 - start // 2
    row_R = _rows(shape, box, out.device)
    is_direct = out.dtype == torch.float32 and out.is_contiguous()
    drawn = out if is_direct else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    flat_RC = drawn.view(len(row_R), n_columns)
    pair_P = torch.arange(start // 2, start // 2 + n_pairs, device=out.device)
    step = max(1, _MOST.get(out.device.type, 1 << 16) // (2 * n_pairs))
    for first in range(0, len(row_R), step):
        # Every row has a whole number of pairs, so no pair belongs to two rows.
        place_RP = row_R[first : first + step, None] * -(-shape[-1] // 2) + pair_P
        normal_RC = _normal(_splitmix(place_RP, key)).view(len(place_RP), -1)
        torch.mul(normal_RC[:, start % 2 :][:, :n_columns], std, out=flat_RC[first : first + step])
    if not is_direct:
        out.copy_(drawn)


def _rows(shape: torch.Size, box: Box, device: torch.device) -> Tensor:
    """Return the index of each row of the box in the whole tensor, with all dims but the last flattened."""
    row = torch.zeros(1, dtype=torch.int64, device=device)
    for dim, (start, n) in enumerate(box[:-1]):
        index = torch.arange(start, start + n, device=device) * prod(shape[dim + 1 : -1])
        row = (row[:, None] + index).flatten()
    return row


def _splitmix(place: Tensor, key: int) -> Tensor:
    """Return the output of splitmix64, seeded with `key`, for each `place`. Overwrite `place`."""
    x = place.add_(1).mul_(_GOLDEN).add_((key + 2**63) % 2**64 - 2**63)
    for bits, factor in ((30, _MIX1), (27, _MIX2), (31, 1)):
        # The mask removes the copies of the sign bit that torch shifts in from the left.
        x ^= (x >> bits) & ((1 << (64 - bits)) - 1)
        if factor != 1:
            x *= factor
    return x


def _normal(bits: Tensor) -> Tensor:
    """Return two float32 normal numbers for every int64 of random bits."""
    half = bits.view(torch.int32)
    # An integer from 1 to 2**31, where 2**31 stands for the probability 1.
    probability = (half & ~_SIGN | 1).float().view(torch.int32)
    line = (probability >> _REST_BITS) - _ONE
    rest = (probability & ((1 << _REST_BITS) - 1)).float()
    start, slope = _lines(bits.device)
    size = rest.mul_(slope.index_select(0, line.flatten()).view_as(rest))
    size += start.index_select(0, line.flatten()).view_as(rest)
    return (size.view(torch.int32) ^ (half & _SIGN)).view(torch.float32)


@cache
def _lines(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the start and the slope of each line. The lines approximate the inverse normal tail function."""
    with torch.device("cpu"):
        fraction = torch.arange(2**_LINE_BITS, dtype=torch.float64) / 2**_LINE_BITS
        nodes = torch.cat([2.0**power * (1 + fraction) for power in range(31)])
        nodes = torch.cat([nodes, torch.tensor([2.0**31, 2.0**31], dtype=torch.float64)])
        size = -torch.special.ndtri(nodes / 2**32)
        start, slope = size[:-1], (size[1:] - size[:-1]) / 2**_REST_BITS
        return start.float().to(device), slope.float().to(device)
