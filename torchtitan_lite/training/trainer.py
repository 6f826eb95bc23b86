"""One training run, on every rank the same: built from a checked config, stepped until it is done.

B batch, S sequence.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.data import IGNORE, Batch, Loader, Samples, in_order, load_tokenizer, prepare
from torchtitan_lite.models.init import init_weights
from torchtitan_lite.parallel.apply import apply
from torchtitan_lite.parallel.fsdp import place_shard, sync_gradients
from torchtitan_lite.parallel.gradients import scale, squared_norm, sum_partial
from torchtitan_lite.parallel.mesh import build_mesh
from torchtitan_lite.parallel.world import World
from torchtitan_lite.training.determinism import set_determinism
from torchtitan_lite.training.hardware import peak_flops, peak_memory_gib
from torchtitan_lite.training.metrics import Metrics, Silence, StepStats
from torchtitan_lite.training.optimizer import build_optimizer
from torchtitan_lite.training.profiling import traced
from torchtitan_lite.training.schedule import lr_factor
from torchtitan_lite.training.step import check_finite
from torchtitan_lite.training.validation import mean_loss


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A validation's outcome."""

    step: int
    loss: float
    """Nats per token."""
    nats_per_byte: float


class Trainer:
    """A model, its data and its optimizer.

    Raises ConfigError, before the model is built, when the data that the config names cannot be used. `alive`
    is called whenever a piece of work is done.
    """

    def __init__(
        self, job: JobConfig, world: World | None = None, alive: Callable[[], None] = lambda: None
    ) -> None:
        self.job, self.world, self.alive = job, world or World(), alive
        self.degrees = job.parallelism.degrees(self.world.size)
        self.device = torch.device(job.device)
        set_determinism(job.debug)
        self.shards = self.world.in_turn(lambda: prepare(job.data, load_tokenizer(job.data.tokenizer)))
        samples = Samples(self.shards.train, job.training.seq_len)
        size, share = job.training.local_batch_size, self._data_share()
        self.batches: Iterator[Batch] = Loader(samples, job.debug.seed, size, *share)
        self.held_out = (
            Samples(self.shards.validation, job.training.seq_len) if job.validation.enable else None
        )
        self.accumulation = job.training.accumulation(self.degrees.data)
        self._build_model()
        self.optimizer = build_optimizer(self.model.named_parameters(), job.optimizer)
        self.step = 0
        self.first_work = 0.0
        self.validations: list[Validation] = []

    def _data_share(self) -> tuple[int, int]:
        """Which share of every batch is this rank's, and of how many."""
        return self.degrees.data_rank(self.world.rank), self.degrees.data

    def _build_model(self) -> None:
        """A decoder with float32 weights: a rank holds its shards, and one whole while that is drawn."""
        job = self.job
        with torch.device("meta"):
            self.model = job.decoder.build(compute_dtype=job.training.compute_dtype)
        self.context = apply(
            self.model,
            mesh=build_mesh(self.degrees, self.device.type) if dist.is_initialized() else None,
            compute_dtype=job.training.compute_dtype,
            parallelism=job.parallelism,
            recompute=job.activation_checkpoint,
            compile=job.compile,
            offload=job.training.enable_cpu_offload,
        )
        self.model.to_empty(device="cpu" if job.training.enable_cpu_offload else self.device)
        init_weights(self.model, job.debug.seed, self._place)

    def _place(self, parameter: Tensor, whole: Tensor) -> None:
        place_shard(parameter, whole)
        self.alive()

    def run(self, folder: Path) -> None:
        """Train to the last step, with a validation before the first one, every so often and at the end."""
        training = self.job.training
        with self.build_metrics(folder) as metrics:
            if self.world.is_first:
                metrics.say("\n".join(self.describe()))
            self.validate(metrics)
            while self.step < training.steps:
                with traced(self.job.profiling, folder, self.device, self.step + 1):
                    stats = self.train_step()
                if self.step == 1:
                    self.world.steady()
                    self.say_work(metrics)
                self.alive()
                metrics.log(stats, peak_memory_gib(self.device))
                if self.step % self.job.validation.freq == 0 or self.step == training.steps:
                    self.validate(metrics)

    def build_metrics(self, folder: Path) -> Metrics | Silence:
        """The run's reports, on the first rank."""
        if not self.world.is_first:
            return Silence()
        training = self.job.training
        peak = self.job.metrics.peak_flops or peak_flops(self.device, training.compute_dtype)
        return Metrics(
            self.job.metrics,
            folder,
            steps=training.steps,
            flops_per_token=self.model.config.flops_per_token(training.seq_len),
            peak_flops=peak * self.world.size,
        )

    def describe(self) -> list[str]:
        """What is about to be trained, on what, and how it is spread over the ranks."""
        model, config = self.job.model, self.model.config
        threads = f" ({torch.get_num_threads()} threads)" if self.device.type == "cpu" else ""
        line = (
            f"{model.name} {model.flavor}: {config.n_params:,} parameters, {model.attention.kind} attention, "
            f"{self.job.training.mixed_precision_param} on {self.device}{threads}; "
            f"{self.shards.train.n_tokens:,} tokens to train on"
        )
        return [line, *self.job.plan(self.world.size)]

    def say_work(self, metrics: Metrics | Silence) -> None:
        """Report how evenly attention was shared in the step just done, where ranks share sequences."""
        if self.degrees.context == 1:
            return
        # Every rank's in a row of its own, so that one sum shows them all.
        work = torch.zeros(self.world.size, dtype=torch.float64)
        work[self.world.rank] = self.first_work
        work = self.world.sum(work.to(self.device))
        # Only the ranks of one sequence can share its work; of all sequences, the one that is shared worst.
        shared = work.view(-1, self.degrees.context, self.degrees.tensor)
        ratio = (shared.amax(1) / shared.mean(1).clamp(min=1)).max()
        metrics.say(f"attention work per rank in the first step: max/mean {ratio:.3f}")

    def train_step(self) -> StepStats:
        """Forward and backward over the micro-batches, clip, update; every valid token weighs the same."""
        start = perf_counter()
        micro = [next(self.batches) for _ in range(self.accumulation)]
        data_seconds = perf_counter() - start
        if self.step == 0:
            window = self.model.config.sliding_window
            self.first_work = sum(self.context.work(batch.positions_BS, window) for batch in micro)
        n_valid = self.count_valid(micro)
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro, start=1):
            sync_gradients(self.model, last=number == self.accumulation)
            self.alive()
            loss_sum, _ = self.loss_of(batch)
            (loss_sum / n_valid).backward()
            loss = loss + loss_sum.detach() / n_valid
        loss_value, norm_value = self.reduce_and_clip(loss)
        sample_ids = [index for batch in micro for index in self.sample_ids(batch)]
        check_finite(step=self.step + 1, loss=loss_value, grad_norm=norm_value, sample_ids=sample_ids)
        lr = self.update()
        return StepStats(
            step=self.step,
            loss=loss_value,
            grad_norm=norm_value,
            lr=lr,
            n_tokens=sum(batch.tokens_BS.numel() for batch in micro) * self.degrees.data,
            seconds=perf_counter() - start,
            data_seconds=data_seconds,
        )

    def sample_ids(self, batch: Batch) -> range:
        """The global sample ids of `batch` and of what the other ranks have at the same time."""
        share, n_shares = self._data_share()
        size = len(batch.sample_ids)
        first = batch.sample_ids[0] - share * size
        return range(first, first + n_shares * size)

    def count_valid(self, micro: list[Batch]) -> Tensor:
        """How many labels of the whole step are valid, over all micro-batches and ranks; at least 1."""
        counts = torch.stack([(batch.labels_BS != IGNORE).sum() for batch in micro])
        total = self.world.sum(counts.sum().to(self.device))
        # The ranks that share a sequence have counted the same rows.
        return (total // (self.degrees.context * self.degrees.tensor)).clamp(min=1)

    def reduce_and_clip(self, loss: Tensor) -> tuple[float, float]:
        """The loss and the gradient norm of all ranks, in one sum; the gradients are scaled to `max_norm`."""
        parameters = list(self.model.parameters())
        sum_partial(parameters)
        squares = squared_norm(parameters, self.world.size).to(loss)
        # The ranks of a tensor-parallel group have the same loss.
        loss, squares = self.world.sum(torch.stack([loss / self.degrees.tensor, squares])).unbind()
        norm = squares.sqrt()
        if self.job.training.max_norm:
            scale(parameters, (self.job.training.max_norm / (norm + 1e-6)).clamp(max=1.0))
        # The step's one read from the device, at the last moment at which the weights are still untouched.
        loss_value, norm_value = torch.stack([loss, norm]).tolist()
        return loss_value, norm_value

    def loss_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the losses of this rank's tokens of a batch, and count of the valid ones, on the device."""
        decoder = self.model.config
        # Once for all blocks, and from the positions that are still on the CPU: no read from the device.
        mask = decoder.attention.mask(
            batch.positions_BS,
            queries=self.context.queries(batch.positions_BS.shape[1]),
            sliding_window=decoder.sliding_window,
            device=self.device,
        )
        tokens_BS, positions_BS, labels_BS = (
            self.context.shard(tensor).to(self.device, non_blocking=True)
            for tensor in (batch.tokens_BS, batch.positions_BS, batch.labels_BS)
        )
        return self.model(tokens_BS, positions_BS, mask, labels_BS)

    def update(self) -> float:
        """One optimizer step at the scheduled learning rate, which is returned."""
        lr = self.job.optimizer.lr * lr_factor(self.step, self.job.lr_scheduler, self.job.training.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return lr

    def validate(self, metrics: Metrics | Silence) -> None:
        """Measure and report the loss on held-out text, if that is asked for."""
        if self.held_out is None:
            return
        size, steps = self.job.training.local_batch_size, self.job.validation.steps
        n_batches = steps if steps < 0 else steps * self.accumulation
        batches = in_order(self.held_out, size, n_batches, *self._data_share())
        loss = mean_loss(self.model, self._validation_loss_of, batches, self._sum_over_ranks)
        split = self.shards.validation
        done = Validation(step=self.step, loss=loss, nats_per_byte=loss * split.n_tokens / split.n_bytes)
        self.validations.append(done)
        metrics.log_validation(done.step, done.loss)
        metrics.say(
            f"step {done.step}/{self.job.training.steps}  validation loss {done.loss:.4f} nats per token, "
            f"{done.nats_per_byte:.4f} per byte (byte frequencies alone: {split.unigram_entropy:.4f})"
        )

    def _validation_loss_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self.alive()
        return self.loss_of(batch)

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum of what every rank found for its tokens, of which a tensor-parallel group has the same."""
        return self.world.sum(x / self.degrees.tensor)
