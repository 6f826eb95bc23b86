"""One training run on one device: built from a checked config, stepped until it is done.

B batch, S sequence.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.data import IGNORE, Batch, Loader, Samples, in_order, load_tokenizer, prepare
from torchtitan_lite.models.decoder import Decoder, DecoderConfig
from torchtitan_lite.models.init import init_weights
from torchtitan_lite.parallel.apply import apply
from torchtitan_lite.training.determinism import set_determinism
from torchtitan_lite.training.hardware import peak_flops, peak_memory_gib
from torchtitan_lite.training.metrics import Metrics, StepStats
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

    Raises ConfigError, before the model is built, when the data that the config names cannot be used.
    """

    def __init__(self, job: JobConfig) -> None:
        self.job = job
        self.device = torch.device(job.device)
        set_determinism(job.debug)
        self.shards = prepare(job.data, load_tokenizer(job.data.tokenizer))
        samples = Samples(self.shards.train, job.training.seq_len)
        self.batches = Loader(samples, job.debug.seed, job.training.local_batch_size)
        self.held_out = (
            Samples(self.shards.validation, job.training.seq_len) if job.validation.enable else None
        )
        self.accumulation = job.training.accumulation()
        self.model = build_model(job.decoder, job.training.compute_dtype, self.device, job.debug.seed)
        apply(self.model, compile=job.compile)
        self.optimizer = build_optimizer(self.model.named_parameters(), job.optimizer)
        self.step = 0
        self.validations: list[Validation] = []

    def run(self, folder: Path) -> None:
        """Train to the last step, with a validation before the first one, every so often and at the end."""
        training = self.job.training
        metrics = Metrics(
            self.job.metrics,
            folder,
            steps=training.steps,
            flops_per_token=self.model.config.flops_per_token(training.seq_len),
            peak_flops=self.job.metrics.peak_flops or peak_flops(self.device, training.compute_dtype),
        )
        with metrics:
            metrics.say(self.describe())
            self.validate(metrics)
            while self.step < training.steps:
                with traced(self.job.profiling, folder, self.device, self.step + 1):
                    stats = self.train_step()
                metrics.log(stats, peak_memory_gib(self.device))
                if self.step % self.job.validation.freq == 0 or self.step == training.steps:
                    self.validate(metrics)

    def describe(self) -> str:
        """What is about to be trained, and on what, in a line."""
        model, config = self.job.model, self.model.config
        threads = f" ({torch.get_num_threads()} threads)" if self.device.type == "cpu" else ""
        return (
            f"{model.name} {model.flavor}: {config.n_params:,} parameters, {model.attention.kind} attention, "
            f"{self.job.training.mixed_precision_param} on {self.device}{threads}; "
            f"{self.shards.train.n_tokens:,} tokens to train on"
        )

    def train_step(self) -> StepStats:
        """Forward and backward over the micro-batches, clip, update; every valid token weighs the same."""
        start = perf_counter()
        micro = [next(self.batches) for _ in range(self.accumulation)]
        data_seconds = perf_counter() - start
        n_valid = max(1, sum(int((batch.labels_BS != IGNORE).sum()) for batch in micro))
        loss = torch.zeros((), device=self.device)
        for batch in micro:
            loss_sum, _ = self.loss_of(batch)
            (loss_sum / n_valid).backward()
            loss += loss_sum.detach() / n_valid
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.job.training.max_norm or math.inf)
        # The step's one read from the device, at the last moment at which the weights are still untouched.
        loss_value, norm_value = torch.stack([loss, norm]).tolist()
        sample_ids = [index for batch in micro for index in batch.sample_ids]
        check_finite(step=self.step + 1, loss=loss_value, grad_norm=norm_value, sample_ids=sample_ids)
        lr = self.update()
        return StepStats(
            step=self.step,
            loss=loss_value,
            grad_norm=norm_value,
            lr=lr,
            n_tokens=sum(batch.tokens_BS.numel() for batch in micro),
            seconds=perf_counter() - start,
            data_seconds=data_seconds,
        )

    def loss_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the losses of a batch and count of its valid tokens, on the device."""
        decoder = self.model.config
        # Once for all blocks, and from the positions that are still on the CPU: no read from the device.
        mask = decoder.attention.mask(
            batch.positions_BS, sliding_window=decoder.sliding_window, device=self.device
        )
        tokens_BS, positions_BS, labels_BS = (
            tensor.to(self.device, non_blocking=True)
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

    def validate(self, metrics: Metrics) -> None:
        """Measure and report the loss on held-out text, if that is asked for."""
        if self.held_out is None:
            return
        batches = in_order(self.held_out, self.job.training.local_batch_size, self.job.validation.steps)
        loss = mean_loss(self.model, self.loss_of, batches)
        split = self.shards.validation
        done = Validation(step=self.step, loss=loss, nats_per_byte=loss * split.n_tokens / split.n_bytes)
        self.validations.append(done)
        metrics.log_validation(done.step, done.loss)
        metrics.say(
            f"step {done.step}/{self.job.training.steps}  validation loss {done.loss:.4f} nats per token, "
            f"{done.nats_per_byte:.4f} per byte (byte frequencies alone: {split.unigram_entropy:.4f})"
        )


def build_model(config: DecoderConfig, dtype: torch.dtype, device: torch.device, seed: int) -> Decoder:
    """A decoder that computes in `dtype`, with float32 weights on `device`."""
    with torch.device("meta"):
        model = config.build(compute_dtype=dtype)
    model.to_empty(device=device)
    init_weights(model, seed)
    return model
