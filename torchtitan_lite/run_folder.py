"""The folder of a run: claim it, prepare it for training, and tell how the run ended."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, TypeVar

from torchtitan_lite import registry, summary
from torchtitan_lite.checkpoint import CheckpointConfig
from torchtitan_lite.checkpoint.restore import VerifiedStep
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.durable import new_folder
from torchtitan_lite.inference.sample import write_sample
from torchtitan_lite.launch import log
from torchtitan_lite.launch.end import STATUS_STOPPED, End
from torchtitan_lite.launch.world import World
from torchtitan_lite.training import hub, outputs, provenance
from torchtitan_lite.training.hooks import jsonl
from torchtitan_lite.training.trainer import Trainer

_LOG = logging.getLogger(__name__)
_SECONDS_TO_DIE = 10
"""The longest time that a run whose launcher was killed may still keep the folder locked."""

T = TypeVar("T")


class RunFolder:
    """The folder of the run `job`. All ranks call the same methods, but only rank 0 writes files.

    If rank 0 cannot write, every rank raises the same ConfigError.
    """

    def __init__(self, job: JobConfig, world: World) -> None:
        self.job, self.world = job, world
        self.path: Path | None = None
        self.trainer: Trainer | None = None
        self._began = time.monotonic()
        self._lock: IO[str] | None = None
        """The lock file, which rank 0 keeps open until its process ends."""

    def claim(self) -> Path:
        """Make, lock and return the folder. Move aside the files of an earlier run that saved no step."""
        self.path = self._on_first(self._claim)
        return self.path

    def prepare(self, trainer: Trainer, resumed: VerifiedStep | None) -> None:
        """Move all steps after `resumed` (None: all) to "earlier", and write config.toml and run.json.

        If the run is over, both files stay: no step is trained with the present settings.
        """
        self.trainer = trainer
        place = provenance.place_of(trainer.stepper.device)
        places = self.world.patiently(lambda saving: saving.gather(place))
        self._on_first(lambda: self._prepare(trainer, resumed, None if trainer.is_over else places))

    def export(self) -> None:
        """If the run is done and last_save_in_hf is set, write the last model in Hugging Face's format."""
        path, trainer = self._begun()
        checkpoint = self.job.checkpoint
        if checkpoint.last_save_in_hf and trainer.is_done:
            tokenizer = trainer.corpus.tokenizer
            self._on_first(lambda: hub.export_last(path, checkpoint, trainer.state.step, tokenizer))

    def finish(self, signal_name: str, argv: Sequence[str]) -> int:
        """Write exit.json, print what became of the run and what to do next, and return the exit status.

        Args:
            signal_name: the name of the signal that asked this rank to stop, or "".
            argv: the options of this process, for the command that goes on.
        """
        path, trainer = self._begun()
        end = End(rank=0, status=0, outcome="done")
        if trainer.is_stopping and not trainer.is_done:
            message = f"asked to stop by {signal_name or 'a signal to another rank'}"
            end = End(rank=0, status=STATUS_STOPPED, outcome="stopped", message=message)
        if self.world.is_first:
            self.write_exit(end)
        sample = self._sample(path, trainer)
        if self.world.is_first:
            summary.say_losses(trainer, time.monotonic() - self._began)
            if sample:
                summary.say_sample(sample, trainer.state.step)
            if end.status == STATUS_STOPPED:
                reason = f"{end.message}: saved step {trainer.state.step}"
                summary.say_resume(self.job, path, argv, reason)
            summary.say_files(trainer, path)
        return end.status

    def pass_over(self, step: int) -> None:
        """Say that there is nothing to do, as `step` is past the last step. Write nothing but exit.json."""
        assert self.path is not None
        if self.world.is_first:
            line = f"step {step} is past training.steps = {self.job.training.steps}: nothing to do"
            outputs.write_exit(self.path, End(rank=0, status=0, outcome="done", message=line), step)
            log.say(line)
            log.say(f"Files: {self.path}", fold=False)

    def write_exit(self, end: End) -> None:
        """Write to exit.json how the run ended. Do nothing if the run has not claimed its folder."""
        if self.path is not None:
            outputs.write_exit(self.path, end, self.trainer.state.step if self.trainer else 0)
            if end.outcome not in ("done", "stopped", "refused"):
                with contextlib.suppress(OSError):
                    log.note(end.words or end.message)

    def _sample(self, path: Path, trainer: Trainer) -> str:
        """Return a text by the last saved step if the run is done and is to show one; otherwise "".

        Rank 0 writes the text, and the other ranks wait. A run does not fail if its sample does.
        """
        n_tokens = self.job.metrics.sample_tokens
        if not (n_tokens and trainer.saver and trainer.is_done):
            return ""
        step = Steps(path / self.job.checkpoint.folder).path(trainer.state.step)

        def written() -> str:
            try:
                return write_sample(str(step), n_tokens, trainer.stepper.device)
            except Exception as error:  # noqa: BLE001 - whatever it is, the run is done
                reason = str(error).partition("\n")[0] or type(error).__name__
                _LOG.warning("the model wrote no sample, and the run is done all the same: %s", reason)
                return ""

        return self.world.patiently(lambda saving: saving.on_first(written))

    def _begun(self) -> tuple[Path, Trainer]:
        assert self.path is not None and self.trainer is not None
        return self.path, self.trainer

    def _on_first(self, act: Callable[[], T]) -> T:
        """Run `act` on rank 0, however long it takes, and return its result on every rank."""

        def written() -> T:
            try:
                return act()
            except OSError as error:
                path = str(error.filename or self.job.job.dump_folder)
                rule = f"cannot be written ({error.strerror}: {path})"
                remedy = "name a folder that you can write to"
                problem = Problem("job.dump_folder", self.job.job.dump_folder, rule, remedy)
                raise ConfigError([problem]) from None

        return self.world.patiently(lambda saving: saving.on_first(written))

    def _claim(self) -> Path:
        job, checkpoint, model = self.job, self.job.checkpoint, self.job.model
        folder = outputs.make_folder(job.job.dump_folder, model.name, model.flavor, model.overrides)
        try:
            self._lock = outputs.lock(folder, _SECONDS_TO_DIE)
        except outputs.InUse as owner:
            rule = f"is the folder of a run that goes on ({owner})"
            remedy = "name another folder, or stop that run first"
            raise ConfigError([Problem("job.dump_folder", job.job.dump_folder, rule, remedy)]) from None
        self.path = folder  # for exit.json, if the rest of this method fails
        steps = Steps(folder / checkpoint.folder)
        published = steps.published()
        if problem := _steps_problem(checkpoint, steps, published):
            raise ConfigError([problem])
        steps.clean()
        if not published and checkpoint.load_step < 0:
            subfolders = (job.metrics.save_tb_folder, job.profiling.save_traces_folder)
            # The run may read files that are in its folder. They stay.
            paths = (job.data.tokenizer, checkpoint.initial_load_path, model.flavor)
            used = [os.path.abspath(os.path.expanduser(path)) for path in paths if path]
            outputs.set_aside(folder, subfolders, used)
        log.keep_log(folder / outputs.LOG)
        return folder

    def _prepare(
        self, trainer: Trainer, resumed: VerifiedStep | None, places: Sequence[provenance.Place] | None
    ) -> None:
        """`places` are those of the ranks, for run.json. None: the run is over."""
        path, _ = self._begun()
        log.begin_log()
        steps, last = Steps(path / self.job.checkpoint.folder), -1 if resumed is None else resumed.state.step
        # This includes files and links with the name of a step: the run will save a step with that name.
        if later := [step for step in steps.named() if step > last]:
            steps.set_aside(later, outputs.free_folder(path, "earlier") / steps.folder.name)
        if resumed is not None:
            steps.point_to(last)
            jsonl.cut(path, last, resumed.state.validated)
            (path / "exit.json").unlink(missing_ok=True)
        self._keep_tokenizer(path / hub.TOKENIZER, trainer)
        if places is not None:
            text = self.job.to_movable_toml(self.world.size, path)
            (path / "config.toml").write_text(text, encoding="utf-8")
            provenance.write_start(path, places, None if resumed is None else last)

    def _keep_tokenizer(self, place: Path, trainer: Trainer) -> None:
        """Copy the tokenizer's files to `place` in the run's folder, which then needs no files elsewhere."""
        own = trainer.corpus.tokenizer
        is_registered = self.job.data.tokenizer in registry.tokenizers.members
        if is_registered or hub.tokenizer_fingerprint(place) == own.fingerprint:
            return
        if place.exists():
            place.rename(outputs.free_folder(place.parent, "earlier") / place.name)
        with new_folder(place) as made:
            own.save(made)


def _steps_problem(checkpoint: CheckpointConfig, steps: Steps, published: list[int]) -> Problem | None:
    """Return the reason why steps of an earlier run keep this run from starting, or None."""
    if steps.folder.is_symlink():
        rule = f"is a link in the run's folder ({steps.folder}), and no step is removed through links"
        return Problem("checkpoint.folder", checkpoint.folder, rule, "make job.dump_folder the link instead")
    if published and not checkpoint.enable:
        rule = f"leaves the steps of an earlier run in {steps.folder} unused (the newest: {published[-1]})"
        remedy = "set checkpoint.enable = true to go on from there, or name another job.dump_folder"
        return Problem("checkpoint.enable", False, rule, remedy)
    others = {path.parents[1] for path in steps.folder.parent.glob("*/step-*/manifest.json")} - {steps.folder}
    if others and not published:
        rule = f"is not where the steps of an earlier run are, which is {min(others)}"
        remedy = f"use {min(others).name!r} to go on from there, or name another job.dump_folder"
        return Problem("checkpoint.folder", checkpoint.folder, rule, remedy)
    return None
