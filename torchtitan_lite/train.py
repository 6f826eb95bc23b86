"""Train a model: torchrun torchtitan_lite/train.py --config configs/debugmodel.toml

Works by path, as `-m torchtitan_lite.train`, and without torchrun. Exit status: 0 done, 2 the input is wrong,
75 stopped on request and saved, 130 interrupted, 143 terminated, 1 any other failure; torchrun makes 1 of all
of these, so exit.json says it too.
"""

import atexit
import contextlib
import logging
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn, TypeVar, cast

if not __package__:
    # Started by path, Python has put this file's folder first, where nothing is to be imported from.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]

if TYPE_CHECKING:
    from torchtitan_lite.checkpoint import CheckpointConfig
    from torchtitan_lite.checkpoint.state import State
    from torchtitan_lite.checkpoint.steps import Steps
    from torchtitan_lite.config.job import JobConfig
    from torchtitan_lite.config.load import Problem
    from torchtitan_lite.parallel.signals import StopRequest
    from torchtitan_lite.parallel.watch import End
    from torchtitan_lite.parallel.world import World
    from torchtitan_lite.training.trainer import Trainer

STOPPED = 75
"""The status of a run that was asked to stop, and has saved: EX_TEMPFAIL of sysexits.h, "try again"."""

_SECONDS_TO_DIE = 10
"""How long the ranks of a run whose launcher was killed may take to end."""
_LAUNCHER = os.getppid()
"""The process that has started this one, as long as it lives."""

T = TypeVar("T")

# Our imports stay inside the functions, so that --dry-run and wrong input are answered without the slow ones.


def main(argv: Sequence[str] | None = None, prog: str = "python -m torchtitan_lite.train") -> int:
    """Do what the command line `argv` says, and return the exit status."""
    try:
        return _main(sys.argv[1:] if argv is None else argv, prog)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output, such as `head`, has had enough; Python would complain again on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _main(argv: Sequence[str], prog: str) -> int:
    from torchtitan_lite.checkpoint import SaveFailed
    from torchtitan_lite.config.job import load_job
    from torchtitan_lite.config.load import ConfigError
    from torchtitan_lite.parallel.watch import tell_launcher
    from torchtitan_lite.parallel.world import world_size
    from torchtitan_lite.training.step import NonFinite

    status = 0
    try:
        loaded = load_job(argv, world_size=world_size(), prog=prog)
        if loaded.dry_run:
            print(_resolved(loaded.config, loaded.world_size), end="", flush=True)
        else:
            status = train(loaded.config)
    except ConfigError as error:
        tell_launcher(str(error))
        if _speaks():
            print(error, file=sys.stderr, flush=True)
            if "--dry-run" not in argv:
                _write_refusal(error.config, error)
        return 2
    except (NonFinite, SaveFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status


def _speaks() -> bool:
    """Whether it falls to this rank to say what all ranks of its machine have found, before they have met."""
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None:
        return os.environ.get("RANK", "0") == "0"
    if local_rank != "0":
        # Meanwhile the rank that speaks does so, and then the launcher ends this one.
        time.sleep(5)
    return True


def train(job: "JobConfig") -> int:
    """Train in a folder of the run's own, leave the outcome there even when it is an exception; the status.

    Where there are other ranks, an exception ends all of their processes, this one included.
    """
    from torch.cuda import current_device

    from torchtitan_lite.parallel.signals import StopRequest
    from torchtitan_lite.parallel.watch import Watch, is_of_communication, signalled, while_launched
    from torchtitan_lite.parallel.world import join, leave

    init_seconds, train_seconds = job.comm.init_timeout_seconds, job.comm.train_timeout_seconds
    launched = "RANK" in os.environ
    with while_launched(_LAUNCHER) if launched else contextlib.nullcontext():
        world = join(
            job.device,
            init_seconds=init_seconds,
            train_seconds=train_seconds,
            offload=job.training.enable_cpu_offload,
        )
    _show_log(world.is_first)
    # Only now: a rank that waits for others that never come can do no better than end at the first signal.
    stop = StopRequest(is_first=world.is_first, launched=launched)
    stop.install(saves=job.checkpoint.enable)
    run = _Run(job, world, stop)
    if world.size == 1:
        stop.on_second = lambda number: run.write_exit(signalled(world.rank, number))
        try:
            status = run.work(alive=lambda: None)
            leave()
        except BaseException as error:
            run.write_exit(_end_of(error, world))
            leave(wait=False)
            raise
        return status
    assert world.store is not None
    gpu = current_device() if job.device == "cuda" else None
    parts = {"rank": world.rank, "size": world.size, "launcher": _LAUNCHER, "gpu": gpu}
    watch = Watch(world.store, seconds=init_seconds, **parts)
    watch.on_end = run.write_exit
    stop.on_second = lambda number: watch.end(signalled(world.rank, number), doubtful=True)
    stop.on_ending, stop.is_ending = watch.hurry, lambda: watch.is_ending
    watch.start()
    try:
        status = run.work(
            alive=lambda: watch.alive(
                train_seconds if run.trainer and run.trainer.is_steady else init_seconds
            )
        )
        leave()
    except BaseException as error:  # noqa: BLE001 - of this rank or felt from another: each ends the process
        end = _end_of(error, world)
        watch.end(end, _details(error, end), doubtful=is_of_communication(error))
    watch.stop()
    return status


class _Run:
    """A run and its folder."""

    def __init__(self, job: "JobConfig", world: "World", stop: "StopRequest") -> None:
        self.job, self.world, self.stop = job, world, stop
        self.folder: Path | None = None
        self.trainer: Trainer | None = None
        self._lock: IO[str] | None = None
        """Held by the rank that writes, as long as the process lives."""

    @property
    def step(self) -> int:
        """Steps done."""
        return self.trainer.step if self.trainer else 0

    def work(self, alive: Callable[[], None]) -> int:
        """Train to the end, or until asked to stop: the status. `alive` is called as a sign of life."""
        from torchtitan_lite.training.record import find_start
        from torchtitan_lite.training.trainer import Trainer

        self.folder = self._on_first(self._claim, alive)
        resumed, initial = find_start(self.job, self.folder, self.world, alive)
        self.trainer = Trainer(self.job, self.world, alive, resumed=resumed, initial=initial)
        self._on_first(lambda: self._settle(resumed.state if resumed else None), alive)
        if resumed is None or not resumed.state.model_only:
            self.trainer.run(self.folder, self.stop)
        elif self.world.is_first:
            print(f"nothing to do: step {self.step} is the last one, and holds the model alone")
        self.stop.done()
        return self._finish()

    def _on_first(self, act: Callable[[], T], alive: Callable[[], None]) -> T:
        """What `act` gives on rank 0, on every rank; what it cannot write is a ConfigError on every rank.

        It may take long: there may be much to remove.
        """
        from torchtitan_lite.checkpoint.patience import patiently
        from torchtitan_lite.config.load import ConfigError, Problem
        from torchtitan_lite.training.record import ranks_of

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
        return cast("T", made)

    def _claim(self) -> Path:
        """The run's folder, for this run alone, with no more of an earlier one than it goes on with."""
        from torchtitan_lite.checkpoint.steps import Steps
        from torchtitan_lite.config.load import ConfigError, Problem
        from torchtitan_lite.training.outputs import InUse, lock, make_folder, set_aside

        job, checkpoint = self.job, self.job.checkpoint
        folder = make_folder(job.job.dump_folder, job.model.name, job.model.flavor)
        try:
            self._lock = lock(folder, _SECONDS_TO_DIE)
        except InUse as owner:
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
            set_aside(folder, (job.metrics.save_tb_folder, job.profiling.save_traces_folder))
        return folder

    def _settle(self, resumed: "State | None") -> None:
        """The start is not refused any more: make the folder that of this run, from the resumed step on."""
        from torchtitan_lite.checkpoint.steps import Steps
        from torchtitan_lite.training import metrics, sample_log
        from torchtitan_lite.training.outputs import free_folder

        assert self.folder is not None
        steps, last = Steps(self.folder / self.job.checkpoint.folder), -1 if resumed is None else resumed.step
        # Whatever has their names: the run comes to need them.
        if later := [step for step in steps.named() if step > last]:
            steps.set_aside(later, free_folder(self.folder, "earlier") / steps.folder.name)
        if resumed is not None:
            steps.point_to(resumed.step)
            metrics.cut(self.folder, resumed.step, resumed.validated)
            sample_log.cut(self.folder, resumed.step)
            (self.folder / "exit.json").unlink(missing_ok=True)
        (self.folder / "config.toml").write_text(_resolved(self.job, self.world.size), encoding="utf-8")

    def write_exit(self, end: "End") -> None:
        """Leave in the run's folder how the run ended."""
        from torchtitan_lite.training.outputs import keep_exit, write_exit

        if self.folder is not None:
            if end.outcome == "refused":
                keep_exit(self.folder)
            with self._exit_written():
                write_exit(self.folder, end.status, end.outcome, step=self.step, message=end.message)

    @contextlib.contextmanager
    def _exit_written(self) -> Iterator[None]:
        """Within it, what cannot be written takes nothing from how the run ended: it is said."""
        try:
            yield
        except OSError as error:
            print(f"exit.json in {self.folder} cannot be written ({error.strerror})", file=sys.stderr)

    def _finish(self) -> int:
        """Say, on the rank that speaks, how far the run is and where its files are; the status."""
        from torchtitan_lite.training.outputs import write_exit

        assert self.folder is not None and self.trainer is not None
        stopped = self.trainer.stop_asked and not self.trainer.is_done
        if self.world.is_first:
            message = (
                f"asked to stop by {self.stop.signal_name or 'a signal to another rank'}" if stopped else ""
            )
            status, outcome = (STOPPED, "stopped") if stopped else (0, "done")
            with self._exit_written():
                write_exit(self.folder, status, outcome, step=self.step, message=message)
            if stopped:
                print(f"{message}: saved step {self.step}; the same command goes on from there")
            _summarize(self.trainer, self.folder)
        return STOPPED if stopped else 0


def _steps_problem(checkpoint: "CheckpointConfig", steps: "Steps", published: list[int]) -> "Problem | None":
    """What is wrong with the steps that are there for a run to start in their folder."""
    from torchtitan_lite.config.load import Problem

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


def _resolved(job: "JobConfig", world_size: int) -> str:
    """The whole configuration as TOML, after the plan for `world_size` ranks as comments."""
    from torchtitan_lite.config.load import to_toml

    return "".join(f"# {line}\n" for line in job.plan(world_size)) + "\n" + to_toml(job)


def _end_of(error: BaseException, world: "World") -> "End":
    """What an exception makes of the run."""
    from torchtitan_lite.checkpoint import SaveFailed
    from torchtitan_lite.config.load import ConfigError
    from torchtitan_lite.parallel.watch import End, signalled
    from torchtitan_lite.training.step import NonFinite

    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        return signalled(world.rank, error.code - 128)
    ends = {
        ConfigError: (2, "refused"),
        NonFinite: (1, "non-finite"),
        SaveFailed: (1, "not-saved"),
        KeyboardInterrupt: (130, "interrupted"),
        BrokenPipeError: (141, "interrupted"),
    }
    status, outcome = ends.get(type(error), (1, "failed"))
    message = str(error) or type(error).__name__
    is_quiet = type(error) in ends
    if world.size > 1 and not is_quiet:
        message = f"rank {world.rank} failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return End(rank=world.rank, status=status, outcome=outcome, message=message, quiet=is_quiet)


def _details(error: BaseException, end: "End") -> str:
    """What the rank that `error` belongs to prints of it."""
    if not end.quiet:
        return f"rank {end.rank} failed:\n{''.join(traceback.format_exception(error))}".rstrip()
    words = {"terminated": "", "interrupted": "interrupted"}
    words |= dict.fromkeys(("non-finite", "not-saved"), f"error: {error}")
    return words.get(end.outcome, end.message)


def _summarize(trainer: "Trainer", folder: Path) -> None:
    if trainer.validations:
        first, last = (done.nats_per_byte for done in (trainer.validations[0], trainer.validations[-1]))
        alone = trainer.shards.validation.unigram_entropy
        print(
            f"Validation loss: {first:.4f} to {last:.4f} nats per byte (byte frequencies alone: {alone:.4f})"
        )
    print(f"Files: {folder}")
    if trainer.job.metrics.enable_tensorboard:
        logs = shlex.quote(str(folder / trainer.job.metrics.save_tb_folder))
        print(f"TensorBoard: {shlex.quote(sys.executable)} -m tensorboard.main --logdir {logs}")


def _write_refusal(job: object, error: Exception) -> None:
    """Leave the outcome in the folder that the configuration names: a launcher looks for it there."""
    from torchtitan_lite.config.job import JobConfig
    from torchtitan_lite.training.outputs import write_refusal

    if isinstance(job, JobConfig) and job.job.dump_folder:
        with contextlib.suppress(OSError, RuntimeError):  # the folder itself may be what is wrong
            write_refusal(Path(job.job.dump_folder).expanduser(), str(error))


def _show_log(is_first: bool) -> None:
    """Show what the package logs, and no other's, on standard error; on the first rank alone, as warnings."""
    if not is_first:
        warnings.simplefilter("ignore")
    log = logging.getLogger("torchtitan_lite")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO if is_first else logging.CRITICAL)


def end_process(status: int) -> NoReturn:
    """End the process without Python's clearing up: a thread that is in torch then would abort it."""
    if "RANK" not in os.environ:
        atexit._run_exitfuncs()  # such as data workers
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    end_process(main())
