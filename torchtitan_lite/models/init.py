"""Initial weights: a function of (seed, parameter name), whatever the device, the order or the mesh."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

_STD = 0.02
_RESIDUAL_OUTPUTS = (".attention.wo.weight", ".ffn.w2.weight")


@torch.no_grad()
def init_weights(
    model: nn.Module, seed: int, place: Callable[[Tensor, Tensor], object] = Tensor.copy_
) -> None:
    """Draw every parameter of a decoder in place, whatever its device and dtype.

    `place(parameter, whole)` puts a whole weight, or this rank's shard of it, into the parameter.
    """
    n_layers = len(list(model.get_submodule("blocks").children()))
    for name, parameter in model.named_parameters():
        place(parameter, initial_weight(name, parameter.shape, n_layers, seed))


def initial_weight(name: str, shape: torch.Size, n_layers: int, seed: int) -> Tensor:
    """One whole parameter, float32 on the CPU: ones for a norm, else normal with standard deviation 0.02.

    The two projections of a block that add to the residual stream get 0.02 / sqrt(2 * n_layers), so that its
    variance does not grow with depth (Radford et al. 2019, Language Models are Unsupervised Multitask
    Learners, section 2.3).
    """
    if len(shape) == 1:
        return torch.ones(shape, device="cpu")
    std = _STD / (2 * n_layers) ** 0.5 if name.endswith(_RESIDUAL_OUTPUTS) else _STD
    # A cryptographic hash: Python's own changes between processes, and nearby seeds must not be related.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8]) >> 1)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(std=std, generator=generator)
