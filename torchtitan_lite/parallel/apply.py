"""What is applied to the finished single-device model, in the one order that works."""

from dataclasses import dataclass

import torch
from torch import nn

from torchtitan_lite.config.load import Problem, near


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Whether and how the model is compiled."""

    enable: bool = False
    """Compile each block with torch.compile: slow to start, faster after."""
    backend: str = "inductor"
    """Backend of torch.compile."""

    def problems(self, key: str) -> list[Problem]:
        """A backend that torch does not list."""
        if not self.enable:
            return []
        known = torch.compiler.list_backends(exclude_tags=())
        if self.backend in known:
            return []
        return [
            Problem(
                f"{key}.backend", self.backend, "is not a backend of torch.compile", near(self.backend, known)
            )
        ]


def apply(model: nn.Module, *, compile: CompileConfig) -> None:
    """Change `model` in place, block by block.

    Compiling comes last of what changes the inside of a block, because it freezes what it sees. Per block, so
    that all blocks share one compiled graph and the head's chunked loss stays eager.
    """
    if compile.enable:
        for block in model.get_submodule("blocks").children():
            block.compile(backend=compile.backend)
