"""One training run, on every rank the same: built from a checked config, stepped until it is done.

B batch, S sequence.
"""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from torchtitan_lite.attention.transfer import to_device
from torchtitan_lite.checkpoint.patience import patiently
from torchtitan_lite.checkpoint.randomness import set_random_state
from torchtitan_lite.checkpoint.restore import Found, load
from torchtitan_lite.checkpoint.save import Saver, Snapshot
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.data import IGNORE, Batch, Loader, Samples, Shards, in_order, load_tokenizer, prepare
from torchtitan_lite.models.init import init_weights
from torchtitan_lite.parallel.apply import apply, prepare_compile
from torchtitan_lite.parallel.fsdp import place_shard, sync_gradients
from torchtitan_lite.parallel.gradients import scale, squared_norm, sum_partial
from torchtitan_lite.parallel.mesh import build_mesh
from torchtitan_lite.parallel.signals import StopRequest
from torchtitan_lite.parallel.world import World
from torchtitan_lite.training.determinism import set_determinism
from torchtitan_lite.training.hardware import peak_flops, peak_memory_gib
from torchtitan_lite.training.metrics import Metrics, Silence, StepStats
from torchtitan_lite.training.optimizer import build_optimizer, fill_state, groups_by_ndim
from torchtitan_lite.training.profiling import traced
from torchtitan_lite.training.record import Record, load_initial, pieces, ranks_of
from torchtitan_lite.training.sample_log import SampleLog
from torchtitan_lite.training.schedule import lr_factor
from torchtitan_lite.training.step import NonFinite, check_finite
from torchtitan_lite.training.validation import Validation, mean_loss


class Trainer:
    """A model, its data and its optimizer.

    Raises ConfigError, before the model is built, when the data that the config names cannot be used, and
    when the step to go on from is another run's. `alive` is called often: this rank does not hang.

    Args:
        resumed: the step to go on from.
        initial: the step whose model a new run starts with, or a folder of Hugging Face's.
        shards: tokens to train on instead of those that the config names.
    """

    def __init__(
        self,
        job: JobConfig,
        world: World | None = None,
        alive: Callable[[], None] = lambda: None,
        *,
        resumed: Found | None = None,
        initial: Found | Path | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.job, self.world, self.alive = job, world or World(), alive
        self.ranks = ranks_of(self.world)
        self.degrees = job.parallelism.degrees(self.world.size)
        self.device = torch.device(job.device)
        set_determinism(job.debug)
        self.tokenizer = tokenizer = load_tokenizer(job.data.tokenizer, job.tokenizers)
        self.shards = shards or self.world.in_turn(lambda: prepare(job.data, tokenizer))
        samples = Samples(self.shards.train, job.training.seq_len)
        size, share = job.training.local_batch_size, self._data_share()
        self.batches = Loader(samples, job.debug.seed, size, *share, n_workers=job.data.num_workers)
        self.held_out = (
            Samples(self.shards.validation, job.training.seq_len) if job.validation.enable else None
        )
        self.accumulation = job.training.accumulation(self.degrees.data)
        self.record = Record(job, self.world, self.shards, tokenizer)
        self.notes = self.record.check(resumed) if resumed else []
        self.notes += self.record.check_initial(initial) if initial else []
        self._build_model(draw=resumed is None and initial is None)
        # Of the shards: a module has whole weights in their place for as long as those are gathered.
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = build_optimizer(self.parameters, job.optimizer, groups_by_ndim(self.parameters))
        self.step = self.n_tokens_seen = 0
        self.resumed_step = None if resumed is None else resumed.state.step
        self.began = self.resumed_step or 0
        """Steps done before this start."""
        self.validated = -1
        self.first_work = 0.0
        self.validations: list[Validation] = []
        self.is_steady = False
        """Whether the slow start is over, and nothing is being saved."""
        self.own_sample_ids: list[int] = []
        self.is_asked: Callable[[], bool] = lambda: False
        """Whether this rank has been asked to stop."""
        self.has_failed: Callable[[], bool] = lambda: False
        """Whether this rank's last save has failed, as far as it knows."""
        self.stop_asked = self.save_failed = False
        """What all ranks have agreed on: that one was asked to stop, that a save has failed."""
        if resumed is not None:
            self._go_on(resumed)
        elif initial is not None:
            patiently(lambda: load_initial(initial, job.decoder, self.parameters, self.ranks), self.alive)

    def _data_share(self) -> tuple[int, int]:
        """Which share of every batch is this rank's, and of how many."""
        return self.degrees.data_rank(self.world.rank), self.degrees.data

    def _build_model(self, draw: bool) -> None:
        """A decoder with float32 weights: a rank holds its shards, and one whole while that is drawn.

        Without `draw` its weights are yet to come.
        """
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
        kind, head_dim = job.decoder.attention.kind, job.decoder.head_dim
        prepare_compile(job.compile, device=self.device.type, attention=kind, head_dim=head_dim)
        self.model.to_empty(device="cpu" if job.training.enable_cpu_offload else self.device)
        if draw:
            init_weights(self.model, job.debug.seed, self._place)

    def _place(self, parameter: Tensor, whole: Tensor) -> None:
        place_shard(parameter, whole)
        self.alive()

    def _go_on(self, found: Found) -> None:
        """Take over a step: weights, optimizer, position and generators; not the weights of an end."""
        state = found.state
        if not state.model_only:
            fill_state(self.optimizer)
            own = pieces(self.parameters, self.optimizer)
            patiently(lambda: load(found, own, self.ranks, "checkpoint.folder"), self.alive)
        self.step, self.n_tokens_seen, self.validated = state.step, state.n_tokens_seen, state.validated
        if self.record.has_order_of(state):
            self.batches.consumed_samples = state.consumed_samples
        if found.random is not None:
            set_random_state(found.random)

    @property
    def is_done(self) -> bool:
        """Whether all steps are done, and the validation that follows the last one."""
        is_validated = self.held_out is None or self.validated == self.step
        return self.step >= self.job.training.steps and is_validated

    def snapshot(self) -> Snapshot:
        """What is saved of the step that was done last."""
        return self.record.snapshot(
            self.parameters,
            self.optimizer,
            step=self.step,
            n_tokens_seen=self.n_tokens_seen,
            consumed_samples=self.batches.consumed_samples,
            validated=self.validated,
            is_done=self.is_done,
        )

    def run(self, folder: Path, stop: StopRequest | None = None) -> None:
        """Train to the last step, or until a rank is asked to `stop`, with validations and saves."""
        with (
            self.build_metrics(folder) as metrics,
            SampleLog(folder, self.world.rank, self.job.debug.log_sample_ids) as samples,
            closing(self.batches),
        ):
            if self.world.is_first:
                metrics.say("\n".join([*self.describe(), *self.notes]))
            saver = self.build_saver(folder, metrics)
            if saver is not None:
                self.has_failed = lambda: saver.has_failed
            if saver is not None and stop is not None:
                self.is_asked = lambda: stop.asked
            try:
                self._train(metrics, saver, samples, folder)
            except BaseException as error:
                # Other ranks may never come to what a save waits for, unless they have met with the same.
                if saver is not None and (self.world.size == 1 or isinstance(error, NonFinite)):
                    saver.finish()
                raise

    def _train(
        self, metrics: Metrics | Silence, saver: Saver | None, samples: SampleLog, folder: Path
    ) -> None:
        self.stop_asked = self.world.any(self.is_asked())
        self.validate(metrics)
        while self.step < self.job.training.steps and not self.stop_asked:
            with traced(self.job.profiling, folder, self.device, self.step + 1):
                stats = self.train_step()
            samples.log(self.step, self.own_sample_ids)
            if self.step == self.began + 1:
                self.world.steady()
                self.is_steady = True
                self.say_work(metrics)
            self.alive()
            metrics.log(stats, peak_memory_gib(self.device))
            self.validate(metrics)
            self.save(saver)
        self.save(saver, last=True)

    def save(self, saver: Saver | None, last: bool = False) -> None:
        """Save the step, if it is due; always the `last` one. Raises SaveFailed."""
        if saver is None:
            return
        if self.save_failed and not self.stop_asked:  # else the present step is about to be saved
            saver.report()
        self.save_failed = False
        if last or (self.step % self.job.checkpoint.interval == 0 and self.step < self.job.training.steps):
            steady, self.is_steady = self.is_steady, False
            saver.save(self.step, self.snapshot, last=last)
            self.is_steady = steady
            self.alive()
            self.stop_asked = self.stop_asked or self.world.any(self.is_asked())

    def build_saver(self, folder: Path, metrics: Metrics | Silence) -> Saver | None:
        """What saves the run's steps, if that is asked for."""
        config = self.job.checkpoint
        if not config.enable:
            return None
        steps = Steps(folder / config.folder)
        parts = {"say": metrics.say, "alive": self.alive, "saved": self.resumed_step}
        return Saver(config, steps, self.ranks, **parts)

    def build_metrics(self, folder: Path) -> Metrics | Silence:
        """The run's reports, on the first rank."""
        if not self.world.is_first:
            return Silence()
        training, stated = self.job.training, self.job.metrics.peak_flops
        return Metrics(
            self.job.metrics,
            folder,
            steps=training.steps,
            flops_per_token=self.model.config.flops_per_token(training.seq_len),
            peak_flops=lambda: (stated or peak_flops(self.device, training.compute_dtype)) * self.world.size,
            resumed_step=self.resumed_step,
            n_tokens_seen=self.n_tokens_seen,
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
        if self.step == self.began:
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
        n_tokens = sum(batch.tokens_BS.numel() for batch in micro) * self.degrees.data
        self.n_tokens_seen += n_tokens
        self.own_sample_ids = [index for batch in micro for index in batch.sample_ids]
        return StepStats(
            step=self.step,
            loss=loss_value,
            grad_norm=norm_value,
            lr=lr,
            n_tokens=n_tokens,
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
        count = sum(int((batch.labels_BS != IGNORE).sum()) for batch in micro)
        # Made on the device: a copy from the host would wait for all the work that the device has left.
        total = self.world.sum(torch.full((), count, device=self.device))
        # The ranks that share a sequence have counted the same rows.
        return (total // (self.degrees.context * self.degrees.tensor)).clamp(min=1)

    def reduce_and_clip(self, loss: Tensor) -> tuple[float, float]:
        """The loss and the gradient norm of all ranks, in one sum; the gradients are scaled to `max_norm`.

        The same sum carries two flags: this rank was asked to stop, and its last save has failed.
        """
        parameters = list(self.model.parameters())
        sum_partial(parameters)
        squares = squared_norm(parameters, self.world.size).to(loss)
        # The ranks of a tensor-parallel group have the same loss.
        both = loss / self.degrees.tensor, squares
        flags = (torch.full_like(loss, is_set) for is_set in (self.is_asked(), self.has_failed()))
        # The step's one read from the device, at the last moment at which the weights are still untouched.
        loss_value, square, asked, failed = self.world.sum(torch.stack([*both, *flags])).tolist()
        norm, max_norm = max(square, 0.0) ** 0.5, self.job.training.max_norm
        if max_norm and norm > max_norm:  # else all gradients would be moved, to be multiplied by 1
            scale(parameters, max_norm / norm)
        self.stop_asked, self.save_failed = asked > 0, failed > 0
        return loss_value, norm

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
            to_device(self.context.shard(tensor), self.device)
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
        """Measure and report the loss on held-out text, if that is due: no part of it once asked to stop."""
        last, freq = self.job.training.steps, self.job.validation.freq
        is_due = self.step % freq == 0 or self.step >= last
        if self.held_out is None or not is_due or self.validated == self.step or self.stop_asked:
            return
        size, steps = self.job.training.local_batch_size, self.job.validation.steps
        n_batches = steps if steps < 0 else steps * self.accumulation
        batches = in_order(self.held_out, size, n_batches, *self._data_share())
        try:
            loss = mean_loss(self.model, self._validation_loss_of, batches, self._sum_over_ranks)
        except _Stopped:
            return
        self.validated = self.step
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
        if self.job.checkpoint.enable and self.world.any(self.is_asked()):
            self.stop_asked = True
            raise _Stopped
        return self.loss_of(batch)

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum of what every rank found for its tokens, of which a tensor-parallel group has the same."""
        return self.world.sum(x / self.degrees.tensor)


class _Stopped(Exception):
    """A validation was broken off, on all ranks at once."""
