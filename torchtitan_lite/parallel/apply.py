"""What is applied to the finished single-device model, in the one order that works."""

import os
import shutil
import sys
from dataclasses import dataclass

import torch
from torch import nn

from torchtitan_lite.config.load import Problem, near

# What torch looks for: torch._inductor.config.cpp.cxx.
CXX = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
"""The compiler of torch's CPU kernels."""


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """Whether and how the model is compiled."""

    enable: bool = False
    """Compile each block with torch.compile: slow to start, faster after."""
    backend: str = "inductor"
    """Backend of torch.compile."""

    def problems(self, key: str, device: str | None = None) -> list[Problem]:
        """A backend that torch does not list, or no compiler for `device` (None: that of another machine)."""
        if not self.enable:
            return []
        known = torch.compiler.list_backends(exclude_tags=())
        if self.backend not in known:
            rule = "is not a backend of torch.compile"
            return [Problem(f"{key}.backend", self.backend, rule, near(self.backend, known))]
        if self.backend == "inductor" and device == "cpu" and not shutil.which(CXX):
            rule = f"needs a C++ compiler, and {CXX} is not on PATH"
            return [Problem(f"{key}.enable", True, rule, "install one, name one in CXX, or do not compile")]
        return []


def apply(model: nn.Module, *, compile: CompileConfig) -> None:
    """Change `model` in place, block by block.

    Compiling comes last of what changes the inside of a block, because it freezes what it sees. Per block, so
    that all blocks share one compiled graph and the head's chunked loss stays eager.
    """
    if compile.enable:
        for block in model.get_submodule("blocks").children():
            block.compile(backend=compile.backend)
