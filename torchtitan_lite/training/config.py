"""The settings of training: how much, for how long, and in which precision."""

from dataclasses import dataclass
from typing import Literal

import torch

from torchtitan_lite.config.load import Problem


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How much is trained on, for how long, and in which precision."""

    local_batch_size: int = 8
    """Samples per micro-batch and rank."""
    global_batch_size: int = -1
    """Samples per optimizer step, over all ranks and micro-batches. -1: one micro-batch on each rank."""
    seq_len: int = 512
    """Tokens per sample."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    max_norm: float = 1.0
    """Gradients are scaled down to this global norm. 0: measured but never clipped."""
    mixed_precision_param: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision that the model computes in; the weights themselves and their updates stay float32."""
    enable_cpu_offload: bool = False
    """Keep weights, gradients and the optimizer's state in host memory, and update them there."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """The precision of `mixed_precision_param`."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.mixed_precision_param]

    def accumulation(self, data_ranks: int = 1) -> int:
        """Micro-batches per optimizer step on each of `data_ranks` ranks."""
        if self.global_batch_size == -1:
            return 1
        return self.global_batch_size // (self.local_batch_size * data_ranks)

    def problems(self, key: str, data_ranks: int = 1) -> list[Problem]:
        """Values out of range, and a global batch that `data_ranks` ranks cannot share evenly."""
        found = [
            Problem(f"{key}.{name}", getattr(self, name), "must be at least 1", "use a positive number")
            for name in ("local_batch_size", "seq_len", "steps")
            if getattr(self, name) < 1
        ]
        if self.max_norm < 0:
            remedy = "use 0 for no clipping"
            found.append(Problem(f"{key}.max_norm", self.max_norm, "must be at least 0", remedy))
        return found + self._batch_problems(key, data_ranks)

    def _batch_problems(self, key: str, data_ranks: int) -> list[Problem]:
        size, unit = self.global_batch_size, self.local_batch_size * data_ranks
        if size == -1 or unit < 1 or (size > 0 and size % unit == 0):
            return []
        if size < 1:
            rule, remedy = "must be -1 or positive", f"use -1 or a multiple of {unit}"
        else:
            ranks = f" times {data_ranks} data ranks of [parallelism]" if data_ranks > 1 else ""
            rule = f"is not a multiple of {key}.local_batch_size = {self.local_batch_size}{ranks}"
            below = size - size % unit
            remedy = f"use {below} or {below + unit}" if below else f"use {unit}"
        return [Problem(f"{key}.global_batch_size", size, rule, remedy)]
