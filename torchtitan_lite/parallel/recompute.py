"""Which activations are computed again in the backward pass instead of being kept."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
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
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flex_attention",
)
_MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def apply_recompute(blocks: Iterable[nn.Module], config: ActivationCheckpointConfig) -> None:
    """Make `blocks`, in place, compute again in the backward pass what `config` does not keep."""
    every = 1
    contexts: Callable[[], Any] | None = None
    if config.mode == "none":
        return
    if config.mode == "selective" and config.selective_ac_option == "op":
        contexts = _keep_attention_and_every_second_matmul
    elif config.mode == "selective":
        every = int(config.selective_ac_option)
    for number, block in enumerate(blocks, start=1):
        if number % every == 0:
            _recompute(block, contexts)


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
        keep = _qualified(op) in _ATTENTION
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def _qualified(op: Any) -> str:
    return op._schema.name if isinstance(op, torch._ops.OpOverload) else str(op)
