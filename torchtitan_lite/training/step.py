"""One optimizer step: micro-batches, loss, sum over ranks, clipping, check for NaN, and update.

B batch, S sequence.
"""

import math
from collections.abc import Callable, Sequence
from time import perf_counter

import torch
from torch import Tensor

from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.data import IGNORE, Batch
from torchtitan_lite.launch.end import RunError
from torchtitan_lite.launch.world import World
from torchtitan_lite.parallel.fsdp import sync_gradients
from torchtitan_lite.parallel.gradients import scale, squared_norm, sum_partial
from torchtitan_lite.training.hooks import StepStats
from torchtitan_lite.training.metrics import peak_memory_gib
from torchtitan_lite.training.schedule import lr_factor
from torchtitan_lite.training.state import TrainState


class Stepper:
    """The object that takes optimizer steps: forward, backward, gradient clipping and update."""

    def __init__(self, job: JobConfig, world: World, state: TrainState) -> None:
        self.world, self.state = world, state
        self.degrees = job.parallelism.degrees(world.size)
        self.device = torch.device(job.device)
        self.accumulation = job.training.accumulation(self.degrees.data)
        self.max_norm = job.training.max_norm
        self.peak_lr, self.schedule, self.n_steps = job.optimizer.lr, job.lr_scheduler, job.training.steps

    @property
    def data_share(self) -> tuple[int, int]:
        """This rank's part of every batch: the index of the part, and the number of parts."""
        return self.degrees.data_rank(self.world.rank), self.degrees.data

    def train_step(self, votes: Callable[[], Sequence[bool]] = tuple) -> StepStats:
        """Take one optimizer step, in which every token with a label has the same weight.

        Raises NonFinite, before the weights change, if the loss or the gradient norm is not finite. `votes`
        returns the votes of this rank, and is called as late as possible. In the result a vote is set if any
        rank set it.
        """
        start, state = perf_counter(), self.state
        first_sample = state.batches.consumed_samples
        micro = [next(state.batches) for _ in range(self.accumulation)]
        data_seconds = perf_counter() - start
        work = self.attention_work(micro) if state.step == state.steps_before else None
        n_valid = self.count_valid(micro)
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro, start=1):
            sync_gradients(state.model, last=number == self.accumulation)
            self.world.alive()
            loss_sum, _ = self.loss_of(batch)
            (loss_sum / n_valid).backward()
            loss = loss + loss_sum.detach() / n_valid
        loss_value, norm_value, agreed = self.reduce_and_clip(loss, votes)
        of_all_ranks = range(first_sample, state.batches.consumed_samples)
        check_finite(step=state.step + 1, loss=loss_value, grad_norm=norm_value, sample_ids=of_all_ranks)
        lr = self.update()
        n_tokens = sum(batch.tokens_BS.numel() for batch in micro) * self.degrees.data
        state.n_tokens_seen += n_tokens
        return StepStats(
            step=state.step,
            loss=loss_value,
            grad_norm=norm_value,
            lr=lr,
            n_tokens=n_tokens,
            n_tokens_seen=state.n_tokens_seen,
            seconds=perf_counter() - start,
            data_seconds=data_seconds,
            peak_memory_gib=peak_memory_gib(self.device),
            sample_ids=[index for batch in micro for index in batch.sample_ids],
            attention_work=work,
            votes=agreed,
        )

    def attention_work(self, micro: list[Batch]) -> float:
        """Return the number of visible (query, key) pairs that this rank computes in a step, per head."""
        window = self.state.model.config.sliding_window
        return sum(self.state.context.work(batch.positions_BS, window) for batch in micro)

    def count_valid(self, micro: list[Batch]) -> Tensor:
        """Return the number of labels in the step, over all micro-batches and ranks; at least 1."""
        count = sum(int((batch.labels_BS != IGNORE).sum()) for batch in micro)
        # Filled on the device: a copy from the host would wait until the device has done all its work.
        total = self.world.sum(torch.full((), count, device=self.device))
        # Every rank of a context- or tensor-parallel group has counted the same labels.
        return (total // (self.degrees.context * self.degrees.tensor)).clamp(min=1)

    def loss_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed loss of this rank's tokens and the number of its labels, both on the device."""
        model, share = self.state.model, self.state.context
        tensors = batch.tokens_BS, batch.positions_BS, batch.labels_BS
        return model(*model.prepare(*tensors, share=share, device=self.device))

    def reduce_and_clip(
        self, loss: Tensor, votes: Callable[[], Sequence[bool]] = tuple
    ) -> tuple[float, float, tuple[bool, ...]]:
        """Sum the loss, the squared gradient norm and the votes in one all-reduce, then clip the gradients.

        Returns the loss, the norm before clipping, and the combined votes. A vote is set if any rank set it.
        """
        parameters = list(self.state.model.parameters())
        sum_partial(parameters)
        squares = squared_norm(parameters, self.world.size).to(loss)
        # All ranks of a tensor-parallel group have the same loss, so each rank adds only a part of it.
        both = loss / self.degrees.tensor, squares
        own = (torch.full_like(loss, is_set) for is_set in votes())
        # The only read from the device in a step. It comes as late as possible: the weights change next.
        loss_value, square, *counts = self.world.sum(torch.stack([*both, *own])).tolist()
        norm = max(square, 0.0) ** 0.5
        if self.max_norm and norm > self.max_norm:  # scaling by 1 would cost a pass over all gradients
            scale(parameters, self.max_norm / norm)
        return loss_value, norm, tuple(count > 0 for count in counts)

    def update(self) -> float:
        """Update the weights at the scheduled learning rate, and return this rate."""
        state = self.state
        factor = lr_factor(state.step, self.schedule, self.n_steps)
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        return self.peak_lr * factor

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over all ranks. The copies of `x` in a tensor-parallel group count once."""
        return self.world.sum(x / self.degrees.tensor)


class NonFinite(RunError):
    """The error for an infinite or NaN loss or gradient norm. The weights have not been updated."""

    outcome = "non-finite"


def check_finite(*, step: int, loss: float, grad_norm: float, sample_ids: Sequence[int]) -> None:
    """Raise NonFinite if a number is not finite. `sample_ids` are the step's samples on all ranks."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if not math.isfinite(value):
            raise NonFinite(
                f"the {name} of step {step} is {value}: stopped before the weights were updated; "
                f"the step's global sample ids are {', '.join(map(str, sample_ids))}"
            )
