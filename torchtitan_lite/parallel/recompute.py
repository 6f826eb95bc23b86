"""Activation checkpointing: the backward pass computes activations again instead of keeping them."""

import re
from collections import deque
from collections.abc import Iterable
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
    """The activations that the backward pass computes again, to save memory."""

    mode: Literal["none", "selective", "full"] = "none"
    """none: keep all activations. full: keep only each block's input. selective: keep some of them."""
    selective_ac_option: str = "op"
    """Mode selective: "op" keeps attention and every 2nd matmul. "2" recomputes every 2nd block in full."""

    def problems(self, key: str, n_blocks: int | None = None) -> list[Problem]:
        """Return a problem if the option is malformed, or is larger than `n_blocks` (None: not known)."""
        name, option = f"{key}.selective_ac_option", self.selective_ac_option
        if not re.fullmatch("op|[1-9][0-9]{0,3}", option, re.ASCII):
            rule, remedy = 'is neither "op" nor a number of blocks', 'use "op"'
            if n_blocks is None or n_blocks >= 2:
                remedy += ', or "2" for every 2nd block'
            return [Problem(name, option, rule, remedy)]
        if self.mode != "selective" or option == "op" or n_blocks is None or int(option) <= n_blocks:
            return []
        rule = f"is more than the {n_blocks} blocks of the model, so that nothing would be recomputed"
        remedy, reads = f'use at most "{n_blocks}", or "op"', (f"{key}.mode", "model.overrides.n_layers")
        return [Problem(name, option, rule, remedy, reads)]

    def described(self) -> str:
        """Return the mode in words, for the plan of the run."""
        if self.mode != "selective":
            return self.mode
        option = self.selective_ac_option
        return "selective (op)" if option == "op" else f"full in one block out of {option}"


# The operators are given by name, because most of them exist only if their package is installed.
_ATTENTION = (
    "torchtitan_lite::attend",
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
    """Change `blocks`, in place: the backward pass recomputes the activations that `config` does not keep.

    Args:
        by_operator: choose the results to keep operator by operator, which costs nothing while torch.compile
            traces. Otherwise choose by the modules of a block, which is cheaper when eager.
    """
    if config.mode == "none":
        return
    option = config.selective_ac_option if config.mode == "selective" else "1"
    for number, block in enumerate(blocks, start=1):
        if option == "op":
            contexts = _keep_attention_and_every_second_matmul if by_operator else Keeper(block).contexts
            _recompute(block, context_fn=contexts)
        elif number % int(option) == 0:
            _recompute(block)


def _recompute(block: nn.Module, **options: Any) -> None:
    forward = block.forward

    def recomputed(*args: Any) -> Any:
        # Nothing in a block is random.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)

    # Replacing the forward, not wrapping the module, leaves the names of parameters alone. The new forward is
    # a function of this file, because torch.compile skips a forward that is a function of torch itself.
    block.forward = recomputed


def _keep_attention_and_every_second_matmul() -> Any:
    """Return the contexts of a block's forward and of its recompute. Each context counts its own matmuls."""
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


class Keeper:
    """The selective recompute of a block: keep the results of attention and of every second matmul.

    A dispatch mode around the whole block would call Python for each operator, which takes longer than
    launching the kernels. So only the attention runs under a mode. A kept matmul is an autograd function.
    Forward and recompute save the same tensors, and the recompute returns the kept result.
    """

    def __init__(self, block: Any) -> None:
        """Change `block`, in place: a module with a method `wrap_attention`, like the decoder's blocks."""
        self.now: Kept | None = None
        products = [module for module in block.modules() if isinstance(module, nn.Linear)]
        self.n_products = len(products)
        for module in products:
            setattr(module, "multiply", self.multiply)  # noqa: B010
        block.wrap_attention(self._wrap)

    def contexts(self) -> tuple[Any, Any]:
        """Return the context of the block's forward, and the same context for its recompute."""
        kept = Kept(self)
        return kept, kept

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return `F.linear(x, weight)`. Some results are kept for the recompute (see `Kept.keeps_next`)."""
        if self.now is None or not self.now.keeps_next():
            return F.linear(x, weight)
        return _KeptProduct.apply(x, weight, self.now)

    def _wrap(self, inner: nn.Module) -> nn.Module:
        attend = inner.forward

        def kept(*args: Any, **kwargs: Any) -> Tensor:
            if self.now is None:
                return attend(*args, **kwargs)
            with self.now.attention_modes[self.now.is_recompute]:
                return attend(*args, **kwargs)

        inner.forward = kept
        return inner


class Kept:
    """The results that a block's forward keeps for its recompute, and the context of these two passes."""

    def __init__(self, keeper: Keeper) -> None:
        self.keeper, self.n_passes, self.n_counted = keeper, 0, 0
        self.results: deque[Tensor] = deque()
        # torch's modes look at every operator that runs under them, so only attention runs under these modes.
        self.attention_modes = create_selective_checkpoint_contexts(_keep_attention)

    @property
    def is_recompute(self) -> bool:
        """True in the recompute, False in the forward."""
        return self.n_passes == 2

    def __enter__(self) -> None:
        if self.is_recompute:
            raise RuntimeError(
                "this block was differentiated before: selective recompute keeps its results for one backward"
            )
        self.n_passes, self.n_counted = self.n_passes + 1, 0
        self.keeper.now = self

    def __exit__(self, *_: object) -> None:
        self.keeper.now = None

    def keeps_next(self) -> bool:
        """Count a matmul. Return True for every second one, but not for the last, which no gradient needs."""
        self.n_counted += 1
        return self.n_counted % 2 == 1 and self.n_counted < self.keeper.n_products


class _KeptProduct(torch.autograd.Function):
    """A product with a weight. The forward keeps the result, and the recompute returns the kept result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kept: Kept) -> Tensor:
        ctx.save_for_backward(x, weight)
        if kept.is_recompute:
            return kept.results.popleft()
        out = F.linear(x, weight)
        kept.results.append(out.detach())  # not `out` itself: its graph holds `kept`
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        dout_TF, (needs_dx, needs_dweight, _) = dout.flatten(0, -2), ctx.needs_input_grad
        dx = (dout_TF @ weight).view(x.shape) if needs_dx else None
        dweight = dout_TF.t() @ x.flatten(0, -2) if needs_dweight else None
        return dx, dweight, None
