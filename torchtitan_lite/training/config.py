"""The settings of training: batch sizes, duration, precision and reproducibility."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from torchtitan_lite.config.load import Problem
from torchtitan_lite.config.problem import Remedy


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The settings of training: batch sizes, duration and precision."""

    local_batch_size: Annotated[int, Field(ge=1)] = 8
    """Samples in a micro-batch of one rank."""
    global_batch_size: (
        Literal[-1]
        | Annotated[
            int, Field(ge=1), Remedy("use -1, or a multiple of the samples of a micro-batch of all ranks")
        ]
    ) = -1
    """Samples per optimizer step, over all ranks and micro-batches. -1: one micro-batch on each rank."""
    seq_len: Annotated[int, Field(ge=1)] = 512
    """Tokens per sample."""
    steps: Annotated[int, Field(ge=1)] = 1000
    """Optimizer steps of the whole run."""
    max_norm: Annotated[float, Field(ge=0), Remedy("use 0 for no clipping")] = 1.0
    """Gradients with a larger global norm are scaled down to this norm. 0: the norm is only measured."""
    mixed_precision_param: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision that the model computes in. Weights, their updates and the sums of gradients stay float32."""
    enable_cpu_offload: bool = False
    """Keep weights, gradients and the optimizer's state in host memory, and update them there."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """The torch dtype that `mixed_precision_param` names."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.mixed_precision_param]

    def accumulation(self, data_ranks: int = 1) -> int:
        """Return the number of micro-batches per optimizer step on each of `data_ranks` ranks."""
        if self.global_batch_size == -1:
            return 1
        return self.global_batch_size // (self.local_batch_size * data_ranks)

    def samples_per_step(self, data_ranks: int = 1) -> int:
        """Return the number of samples of an optimizer step, over all ranks and micro-batches."""
        return self.local_batch_size * self.accumulation(data_ranks) * data_ranks

    def problems(self, key: str, data_ranks: int = 1) -> list[Problem]:
        """Return a problem if `data_ranks` ranks cannot share the global batch evenly."""
        size, unit = self.global_batch_size, self.local_batch_size * data_ranks
        if size == -1 or size % unit == 0:
            return []
        ranks = f" times {data_ranks} data ranks of [parallelism]" if data_ranks > 1 else ""
        rule = f"is not a multiple of {key}.local_batch_size = {self.local_batch_size}{ranks}"
        below = size - size % unit
        remedy = f"use {below} or {below + unit}" if below else f"use {unit}"
        reads = (f"{key}.local_batch_size", "parallelism")
        return [Problem(f"{key}.global_batch_size", size, rule, remedy, reads)]


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """The settings that make a run repeatable, and a log that shows which samples it read."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the initial weights and of the order of the data."""
    deterministic: bool = False
    """Use only deterministic kernels, which are slower. Runs repeated on one machine give the same losses."""
    log_sample_ids: bool = False
    """Write the global sample ids of every step and rank to sample_ids/rank-R.jsonl in the run's folder."""
