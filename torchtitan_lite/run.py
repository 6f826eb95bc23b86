"""A run and its folder: claimed, gone on with or begun, trained in, and left with how it ended."""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeVar, cast

from torchtitan_lite import registry
from torchtitan_lite.checkpoint import CheckpointConfig
from torchtitan_lite.checkpoint.patience import patiently
from torchtitan_lite.checkpoint.state import State
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.durable import new_folder
from torchtitan_lite.parallel.signals import StopRequest
from torchtitan_lite.parallel.watch import End
from torchtitan_lite.parallel.world import World
from torchtitan_lite.training import hub, outputs
from torchtitan_lite.training.hooks import jsonl, samples
from torchtitan_lite.training.record import find_start, ranks_of
from torchtitan_lite.training.trainer import Trainer

STOPPED = 75
"""The status of a run that was asked to stop, and has saved: EX_TEMPFAIL of sysexits.h, "try again"."""
SECONDS_TO_DIE = 10
"""How long the ranks of a run whose launcher was killed may take to end."""

T = TypeVar("T")


class Run:
    """A run and its folder. `on_built` is called when all is there that training begins with."""

    def __init__(self, job: JobConfig, world: World, on_built: Callable[[], None] = lambda: None) -> None:
        self.job, self.world, self.on_built = job, world, on_built
        self.folder: Path | None = None
        self.trainer: Trainer | None = None
        self._lock: IO[str] | None = None
        """Held by the rank that writes, as long as the process lives."""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.trainer.state.step if self.trainer else 0

    @property
    def is_steady(self) -> bool:
        """Whether the slow start is over, and nothing is being saved."""
        return self.trainer is not None and self.trainer.is_steady

    def work(self, stop: StopRequest, alive: Callable[[], None]) -> int:
        """Train to the end, or until asked to stop: the status. `alive` is called as a sign of life."""
        self.folder = self._on_first(self._claim, alive)
        resumed, initial = find_start(self.job, self.folder, self.world, alive)
        self.trainer = Trainer(
            self.job,
            self.world,
            alive,
            folder=self.folder,
            is_asked=lambda: stop.asked,
            resumed=resumed,
            initial=initial,
        )
        self._on_first(lambda: self._settle(resumed.state if resumed else None), alive)
        self.on_built()
        if resumed is None or not resumed.state.model_only:
            self.trainer.run()
        elif self.world.is_first:
            print(f"nothing to do: step {self.step} is the last one, and holds the model alone")
        if self.job.checkpoint.last_save_in_hf and self.trainer.is_done:
            self._on_first(self._export, alive)
        stop.done()
        return self._finish(stop)

    def _export(self) -> None:
        """Write the model of the last step for others."""
        assert self.folder is not None and self.trainer is not None
        hub.export_last(self.folder, self.job.checkpoint, self.step, self.trainer.corpus.tokenizer)

    def _on_first(self, act: Callable[[], T], alive: Callable[[], None]) -> T:
        """What `act` gives on rank 0, on every rank; what it cannot write is a ConfigError on every rank.

        It may take long: there may be much to remove.
        """

        def written() -> T:
            try:
                return act()
            except OSError as error:
                path = str(error.filename or self.job.job.dump_folder)
                rule = f"cannot be written ({error.strerror}: {path})"
                remedy = "name a folder that you can write to"
                problem = Problem("job.dump_folder", self.job.job.dump_folder, rule, remedy)
                raise ConfigError([problem]) from None

        ranks = ranks_of(self.world)
        made = patiently(
            lambda: ranks.share(ranks.together(written if ranks.is_first else lambda: None)), alive
        )
        return cast(T, made)

    def _claim(self) -> Path:
        """The run's folder, for this run alone, with no more of an earlier one than it goes on with."""
        job, checkpoint = self.job, self.job.checkpoint
        folder = outputs.make_folder(job.job.dump_folder, job.model.name, job.model.flavor)
        try:
            self._lock = outputs.lock(folder, SECONDS_TO_DIE)
        except outputs.InUse as owner:
            rule = f"is the folder of a run that goes on ({owner})"
            remedy = "name another folder, or stop that run first"
            raise ConfigError([Problem("job.dump_folder", job.job.dump_folder, rule, remedy)]) from None
        self.folder = folder  # where the outcome is left, should the rest of this fail
        steps = Steps(folder / checkpoint.folder)
        published = steps.published()
        if problem := _steps_problem(checkpoint, steps, published):
            raise ConfigError([problem])
        steps.clean()
        if not published and checkpoint.load_step < 0:
            subfolders = (job.metrics.save_tb_folder, job.profiling.save_traces_folder)
            outputs.set_aside(folder, subfolders, self._used())
        return folder

    def _used(self) -> list[str]:
        """What the run reads that may lie in its folder."""
        job = self.job
        paths = (job.data.tokenizer, job.checkpoint.initial_load_path, job.model.flavor)
        return [os.path.abspath(os.path.expanduser(path)) for path in paths if path]

    def _settle(self, resumed: State | None) -> None:
        """The start is not refused any more: make the folder that of this run, from the resumed step on."""
        assert self.folder is not None
        steps, last = Steps(self.folder / self.job.checkpoint.folder), -1 if resumed is None else resumed.step
        # Whatever has their names: the run comes to need them.
        if later := [step for step in steps.named() if step > last]:
            steps.set_aside(later, outputs.free_folder(self.folder, "earlier") / steps.folder.name)
        if resumed is not None:
            steps.point_to(resumed.step)
            jsonl.cut(self.folder, resumed.step, resumed.validated)
            samples.cut(self.folder, resumed.step)
            (self.folder / "exit.json").unlink(missing_ok=True)
        assert self.trainer is not None
        self._keep_tokenizer(self.folder / hub.TOKENIZER)
        (self.folder / "config.toml").write_text(self.job.to_toml(self.world.size), encoding="utf-8")

    def _keep_tokenizer(self, place: Path) -> None:
        """Have the files of the run's tokenizer in its folder, as both may be moved."""
        assert self.trainer is not None
        own = self.trainer.corpus.tokenizer
        is_registered = self.job.data.tokenizer in registry.tokenizers.members
        if is_registered or hub.tokenizer_fingerprint(place) == own.fingerprint:
            return
        if place.exists():
            place.rename(outputs.free_folder(place.parent, "earlier") / place.name)
        with new_folder(place) as made:
            own.save(made)

    def write_exit(self, end: End) -> None:
        """Leave in the run's folder how the run ended."""
        if self.folder is not None:
            if end.outcome == "refused":
                outputs.keep_exit(self.folder)
            with self._exit_written():
                outputs.write_exit(self.folder, end.status, end.outcome, step=self.step, message=end.message)

    @contextlib.contextmanager
    def _exit_written(self) -> Iterator[None]:
        """Within it, what cannot be written takes nothing from how the run ended: it is said."""
        try:
            yield
        except OSError as error:
            print(f"exit.json in {self.folder} cannot be written ({error.strerror})", file=sys.stderr)

    def _finish(self, stop: StopRequest) -> int:
        """Say, on the rank that speaks, how far the run is and where its files are; the status."""
        assert self.folder is not None and self.trainer is not None
        stopped = self.trainer.stop_asked and not self.trainer.is_done
        if self.world.is_first:
            message = f"asked to stop by {stop.signal_name or 'a signal to another rank'}" if stopped else ""
            status, outcome = (STOPPED, "stopped") if stopped else (0, "done")
            with self._exit_written():
                outputs.write_exit(self.folder, status, outcome, step=self.step, message=message)
            if stopped:
                print(f"{message}: saved step {self.step}; the same command goes on from there")
            _summarize(self.trainer, self.folder)
        return STOPPED if stopped else 0


def _steps_problem(checkpoint: CheckpointConfig, steps: Steps, published: list[int]) -> Problem | None:
    """What is wrong with the steps that are there for a run to start in their folder."""
    if steps.folder.is_symlink():
        rule = f"is a link in the run's folder ({steps.folder}), and no step is removed through links"
        return Problem("checkpoint.folder", checkpoint.folder, rule, "make job.dump_folder the link instead")
    if published and not checkpoint.enable:
        rule = f"leaves the steps of an earlier run in {steps.folder} unused (the newest: {published[-1]})"
        remedy = "set it to go on from there, or name another job.dump_folder"
        return Problem("checkpoint.enable", False, rule, remedy)
    others = {path.parents[1] for path in steps.folder.parent.glob("*/step-*/manifest.json")} - {steps.folder}
    if others and not published:
        rule = f"is not where the steps of an earlier run are, which is {min(others)}"
        remedy = f"use {min(others).name!r} to go on from there, or name another job.dump_folder"
        return Problem("checkpoint.folder", checkpoint.folder, rule, remedy)
    return None


def _summarize(trainer: Trainer, folder: Path) -> None:
    if trainer.validations:
        first, last = (done.nats_per_byte for done in (trainer.validations[0], trainer.validations[-1]))
        alone = trainer.validations[0].unigram_entropy
        print(
            f"Validation loss: {first:.4f} to {last:.4f} nats per byte (byte frequencies alone: {alone:.4f})"
        )
    print(f"Files: {folder}")
    if trainer.job.metrics.enable_tensorboard:
        logs = shlex.quote(str(folder / trainer.job.metrics.save_tb_folder))
        print(f"TensorBoard: {shlex.quote(sys.executable)} -m tensorboard.main --logdir {logs}")
