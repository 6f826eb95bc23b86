"""Exchanges of tensors between ranks, as operators that torch.compile can trace, and their gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed import _functional_collectives as collectives

# torch 2.11 has these two functions under other names.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_reduce_scatter = getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor


def all_gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """Concatenate the tensors of all ranks along the first dim.

    Along another dim, torch 2.11 would break the graph of torch.compile.
    """
    return _wait(_all_gather(x.contiguous(), 0, group))


def reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Sum `x` over all ranks. Return this rank's share of the sum along `dim`."""
    return _wait(_reduce_scatter(x, "sum", dim, group))


def all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    """Send part i of `x` along the first dim to rank i. Return the received parts in the order of ranks."""
    return _wait(collectives.all_to_all_single(x, None, None, group))


def _wait(x: Tensor) -> Tensor:
    # An asynchronous tensor is a subclass, whose gradient torch.compile loses if it is a block's input.
    return x.wait() if isinstance(x, collectives.AsyncCollectiveTensor) else x


class Exchange(torch.autograd.Function):
    """An autograd function: `Exchange.apply(x, send, send_gradient, *args)` returns `send(x, *args)`.

    The backward pass returns `send_gradient(gradient of the result, *args)` as the gradient of `x`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: Callable[..., Tensor], send_gradient: Callable[..., Tensor], *args: Any
    ) -> Tensor:
        ctx.send_gradient, ctx.args = send_gradient, args
        return send(x, *args)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.send_gradient(dout, *ctx.args), None, None, *(None for _ in ctx.args)
