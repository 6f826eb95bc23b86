"""Which activations are computed again in the backward pass instead of being kept."""

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchtitan_lite.config.load import Problem


@dataclass(frozen=True, kw_only=True)
class ActivationCheckpointConfig:
    """What is computed again in the backward pass, to save memory."""

    mode: Literal["none", "selective", "full"] = "none"
    """none: keep all that the backward needs; full: only each block's input; selective: in between."""
    selective_ac_option: str = "op"
    """For selective: "op" keeps attention and every second matmul of a block; "2" is full in every 2nd."""

    def problems(self, key: str) -> list[Problem]:
        """An option that is neither "op" nor a number of blocks."""
        option = self.selective_ac_option
        if re.fullmatch("op|[1-9][0-9]{0,3}", option, re.ASCII):
            return []
        rule = 'is neither "op" nor a number of blocks'
        return [Problem(f"{key}.selective_ac_option", option, rule, 'use "op", or "2" for every 2nd block')]

    def block_problems(self, key: str, n_blocks: int) -> list[Problem]:
        """A choice of blocks that chooses none out of `n_blocks`."""
        option = self.selective_ac_option
        if self.mode != "selective" or option == "op" or self.problems(key) or int(option) <= n_blocks:
            return []
        rule = f"is more than the {n_blocks} blocks of the model, so that nothing would be recomputed"
        return [Problem(f"{key}.selective_ac_option", option, rule, f'use at most "{n_blocks}", or "op"')]

    def described(self) -> str:
        """In words, for the plan."""
        if self.mode != "selective":
            return self.mode
        option = self.selective_ac_option
        return "selective (op)" if option == "op" else f"full in one block out of {option}"


# By name, since most are registered only where their package is.
_ATTENTION = (
    "torchtitan_lite::attend_tiles",
    "torchtitan_lite::attend_runs",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "flex_attention",
)
_MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def apply_recompute(
    blocks: Iterable[nn.Module], config: ActivationCheckpointConfig, *, by_operator: bool = False
) -> None:
    """Make `blocks`, in place, compute again in the backward pass what `config` does not keep.

    Args:
        by_operator: choose what to keep by looking at every operator, as torch.compile can while it traces;
            else by the modules of a block, which says the same and costs an eager step far less.
    """
    every = 1
    if config.mode == "none":
        return
    by_op = config.mode == "selective" and config.selective_ac_option == "op"
    if config.mode == "selective" and not by_op:
        every = int(config.selective_ac_option)
    for number, block in enumerate(blocks, start=1):
        if by_op and by_operator:
            _recompute(block, _keep_attention_and_every_second_matmul)
        elif by_op:
            _recompute(block, Keeper(block).contexts)
        elif number % every == 0:
            _recompute(block, None)


def _recompute(block: nn.Module, contexts: Callable[[], Any] | None) -> None:
    # Nothing in a block is random.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if contexts is not None:
        options["context_fn"] = contexts
    forward = block.forward

    def recomputed(*args: Any) -> Any:
        return checkpoint(forward, *args, **options)

    # The forward is replaced rather than the module wrapped, so that parameters keep their names; and by a
    # function of this file, since torch.compile passes over a forward that is a function of torch itself.
    block.forward = recomputed


def _keep_attention_and_every_second_matmul() -> Any:
    """The contexts of one block's forward and of its second forward, each with a count of its own."""
    n_matmuls = {False: 0, True: 0}

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in _MATMULS:
            n_matmuls[context.is_recompute] += 1
            if n_matmuls[context.is_recompute] % 2 == 0:
                return CheckpointPolicy.PREFER_RECOMPUTE
            return CheckpointPolicy.MUST_SAVE
        return _keep_attention(context, op)

    return create_selective_checkpoint_contexts(policy)


def _keep_attention(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    keep = _qualified(op) in _ATTENTION
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _qualified(op: Any) -> str:
    return op._schema.name if isinstance(op, torch._ops.OpOverload) else str(op)


class Forward:
    """One forward of a block and the second one that follows it: what the first keeps for the second."""

    def __init__(self, n_products: int) -> None:
        self.n_products, self.products = n_products, 0
        self.kept: deque[Tensor] = deque()
        self.is_second = False
        # torch's, which look at each operator under them: here at those of the attention alone.
        self.attention_modes = create_selective_checkpoint_contexts(_keep_attention)

    def begin(self, is_second: bool) -> None:
        """Count from the block's first product again."""
        self.is_second, self.products = is_second, 0

    def keeps_next(self) -> bool:
        """Whether the coming product is kept: every second one, but for the last: no gradient needs it."""
        self.products += 1
        return self.products % 2 == 1 and self.products < self.n_products


class Keeper:
    """Keeps attention and every second matmul of a block for its second forward, by the block's modules.

    A dispatch mode around a whole block calls Python for each of its operators, twice, which takes longer
    than to start their kernels. So only the attention runs under one, and a kept product is a function of
    its own: both forwards save the same for its backward, and the second one multiplies nothing.
    """

    def __init__(self, block: nn.Module) -> None:
        self.now: Forward | None = None
        products = [module for module in block.modules() if isinstance(module, nn.Linear)]
        self.n_products = len(products)
        for module in products:
            setattr(module, "multiply", self.multiply)  # noqa: B010
        inner = block.get_submodule("attention.inner")
        inner.forward = self._attending(inner.forward)

    def contexts(self) -> tuple[Any, Any]:
        """Of one forward and of its second one."""
        forward = Forward(self.n_products)
        return self._during(forward, is_second=False), self._during(forward, is_second=True)

    @contextmanager
    def _during(self, forward: Forward, is_second: bool) -> Iterator[None]:
        forward.begin(is_second)
        self.now = forward
        try:
            yield
        finally:
            self.now = None

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """As F.linear, kept or not."""
        if self.now is None or not self.now.keeps_next():
            return F.linear(x, weight)
        return _KeptProduct.apply(x, weight, self.now)

    def _attending(self, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def kept(*args: Any, **kwargs: Any) -> Tensor:
            if self.now is None:
                return attend(*args, **kwargs)
            with self.now.attention_modes[self.now.is_second]:
                return attend(*args, **kwargs)

        return kept


class _KeptProduct(torch.autograd.Function):
    """F.linear without a bias, with the products of its own backward; a second forward takes what is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward: Forward) -> Tensor:
        ctx.save_for_backward(x, weight)
        if forward.is_second:
            return forward.kept.popleft()
        out = F.linear(x, weight)
        forward.kept.append(out.detach())  # not `out` itself: its graph holds `forward`
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        dout_TF, (needs_dx, needs_dweight, _) = dout.flatten(0, -2), ctx.needs_input_grad
        dx = (dout_TF @ weight).view(x.shape) if needs_dx else None
        dweight = dout_TF.t() @ x.flatten(0, -2) if needs_dweight else None
        return dx, dweight, None
