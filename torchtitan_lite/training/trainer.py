"""The training loop, which every rank runs: steps, validations, saves and calls of hooks."""

import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from torchtitan_lite.checkpoint.save import Saver
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.data import Batch, Shards, in_order
from torchtitan_lite.launch.log import say
from torchtitan_lite.launch.process import set_up_process
from torchtitan_lite.launch.world import World
from torchtitan_lite.training.corpus import load_corpus
from torchtitan_lite.training.hooks import HookFailed, Hooks, Outcome, RunInfo, StepStats
from torchtitan_lite.training.record import Start
from torchtitan_lite.training.state import TrainState
from torchtitan_lite.training.step import NonFinite, Stepper
from torchtitan_lite.training.validation import Validation, mean_loss

_LOG = logging.getLogger(__name__)


class Trainer:
    """The training loop of a run: steps, validations, saves and calls of hooks.

    Raises ConfigError, before the model is built, if the data cannot be used or `start` does not fit the run.

    Args:
        folder: the folder that the run writes to. Without a folder nothing is saved, and no hook is called.
        is_asked: returns True if this rank has been asked to stop.
        shards: tokens to train on, instead of the text that the config names.
    """

    def __init__(
        self,
        job: JobConfig,
        world: World | None = None,
        start: Start | None = None,
        *,
        folder: Path | None = None,
        is_asked: Callable[[], bool] = lambda: False,
        shards: Shards | None = None,
    ) -> None:
        self.job, self.world = job, world or World()
        set_up_process(
            device=job.device,
            seed=job.debug.seed,
            deterministic=job.debug.deterministic,
            uses_inductor=job.compile.uses_inductor,
        )
        self.corpus = load_corpus(job, self.world, shards)
        self.start = start or Start()
        self.state = TrainState(job, self.world, self.corpus, self.start)
        self.stepper = Stepper(job, self.world, self.state)
        self.hooks = Hooks(job.hook_configs, self._run_info(folder)) if folder else Hooks({})
        self.saver = self._build_saver(folder) if folder and job.checkpoint.enable else None
        self.is_asked = is_asked if self.saver else lambda: False  # a run without saves never stops early
        self.is_stopping = False
        """True once all ranks have agreed to stop early, because a rank was asked to stop."""
        self.validations: list[Validation] = []
        self.last: StepStats | None = None
        """The last step that this process has taken."""

    def _run_info(self, folder: Path) -> RunInfo:
        return RunInfo(
            job=self.job,
            folder=folder,
            rank=self.world.rank,
            world_size=self.world.size,
            device=self.stepper.device,
            model=self.state.model,
            n_steps=self.job.training.steps,
            flops_per_token=self.state.model.config.flops_per_token(self.job.training.seq_len),
            resumed_step=self.state.resumed_step,
        )

    def _build_saver(self, folder: Path) -> Saver:
        config = self.job.checkpoint
        return Saver(
            config,
            Steps(folder / config.folder),
            self.world.saving,
            say=self.say,
            saved=self.state.resumed_step,
            on_published=self.hooks.saved,
        )

    def say(self, line: str) -> None:
        """Print a line, on the first rank only."""
        if self.world.is_first:
            say(line)

    @property
    def is_done(self) -> bool:
        """True if all steps are done and, if the run validates, also the validation after the last step."""
        is_validated = self.corpus.held_out is None or self.state.validated == self.state.step
        return self.state.step >= self.job.training.steps and is_validated

    @property
    def is_over(self) -> bool:
        """True if `run` has nothing to do: the last step is done, or only the model was saved."""
        return self.is_done or self.start.is_model_only

    def run(self) -> None:
        """Train, validate and save, to the last step or until a rank is asked to stop."""
        if self.is_over:
            alone = ", and holds the model alone" if self.start.is_model_only else ""
            self.say("\n".join(self.state.notes))
            self.say(f"nothing to do: step {self.state.step} is the last one{alone}")
            return
        with closing(self.state.batches):
            try:
                self.hooks.start()
                self.say("\n".join([*self.describe(), *self.state.notes]))
                self._train()
            except BaseException as error:
                try:
                    self._finish_save(error)
                finally:
                    self.hooks.end(Outcome(kind="failed", error=error))
                raise
            self.hooks.end(Outcome(kind="done" if self.is_done else "stopped"))

    def _finish_save(self, error: BaseException) -> None:
        """Finish a save in the background when `error` ends the run. If a hook fails here, only log that."""
        # A save needs all ranks. Only NonFinite is sure to end every rank at the same step.
        if self.saver and (self.world.size == 1 or isinstance(error, NonFinite)):
            try:
                self.saver.finish()
            except HookFailed as failure:
                _LOG.error("%s", failure)

    def _train(self) -> None:
        self.is_stopping = self.world.any(self.is_asked())
        self.validate()
        while self.state.step < self.job.training.steps and not self.is_stopping:
            stats = self.stepper.train_step(
                lambda: (self.is_asked(), bool(self.saver and self.saver.has_failed))
            )
            self.last = stats
            self.is_stopping, save_failed = stats.votes
            if self.state.step == self.state.steps_before + 1:
                if self.saver:
                    self.state.check_optimizer(self.job.optimizer.name)
                self.world.set_timeout(self.job.comm.train_timeout_seconds)
            self.world.alive()
            seconds = self.hooks.take_seconds()
            self.hooks.step(replace(stats, seconds=stats.seconds + seconds, hook_seconds=seconds))
            self.validate()
            self.save(after_failure=save_failed)
        self.save(last=True)

    def save(self, *, last: bool = False, after_failure: bool = False) -> None:
        """Save the current step if a save is due, or if it is the `last` of this process. Raises SaveFailed.

        Args:
            after_failure: True if all ranks know that a rank failed to write an earlier step.
        """
        if self.saver is None:
            return
        if after_failure and not self.is_stopping:  # when stopping, save the current step instead
            self.saver.report()
        step = self.state.step
        if last or (step % self.job.checkpoint.interval == 0 and step < self.job.training.steps):
            seconds = self.world.progress.seconds
            self.world.alive(self.job.comm.init_timeout_seconds)
            self.saver.save(step, partial(self.state.snapshot, is_done=self.is_done), last=last)
            self.world.alive(seconds)
            self.is_stopping = self.is_stopping or self.world.any(self.is_asked())

    def validate(self) -> None:
        """Measure and report the loss on held-out text, if that is due. A request to stop ends it early."""
        step, last, freq = self.state.step, self.job.training.steps, self.job.validation.freq
        is_due = step % freq == 0 or step >= last
        if self.corpus.held_out is None or not is_due or self.state.validated == step or self.is_stopping:
            return
        size, steps = self.job.training.local_batch_size, self.job.validation.steps
        n_batches = steps if steps < 0 else steps * self.stepper.accumulation
        batches = in_order(self.corpus.held_out, size, n_batches, *self.stepper.data_share)
        try:
            loss = mean_loss(self.state.model, self._validation_loss_of, batches, self.stepper.sum_over_ranks)
        except _Stopped:
            return
        self.state.validated = step
        split = self.corpus.shards.validation
        per_byte = loss * split.n_tokens / split.n_bytes
        result = Validation(
            step=step, loss=loss, nats_per_byte=per_byte, unigram_entropy=split.unigram_entropy
        )
        self.validations.append(result)
        self.hooks.validated(result)

    def _validation_loss_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self.world.alive()
        if self.job.checkpoint.enable and self.world.any(self.is_asked()):
            self.is_stopping = True
            raise _Stopped
        return self.stepper.loss_of(batch)

    def describe(self) -> list[str]:
        """Return lines to print about the model, the data, and how the ranks divide the work."""
        device, training = self.stepper.device, self.job.training
        n_threads = torch.get_num_threads()
        place = f"cpu, {n_threads} thread{'s' if n_threads > 1 else ''}"
        if device.type == "cuda":
            place = torch.cuda.get_device_name(device)
        n_samples = training.steps * training.samples_per_step(self.stepper.degrees.data)
        epochs = n_samples / len(self.corpus.samples)
        rounded = f"{epochs:,.2f}" if epochs >= 0.01 else "less than 0.01"
        return [
            f"started: {time.strftime('%Y-%m-%d %H:%M:%S %z')}",
            *self.job.plan(self.world.size),
            f"device: {place}; computes in {training.mixed_precision_param}",
            f"data: {self.corpus.shards.train.n_tokens:,} tokens to train on; the run makes {rounded} epochs",
        ]


class _Stopped(Exception):
    """The exception that ends a validation, on all ranks at once, after a request to stop."""
