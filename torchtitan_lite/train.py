"""Train a model: torchrun torchtitan_lite/train.py --config configs/debugmodel.toml

Works by path, as `-m torchtitan_lite.train`, and without torchrun. Exit status: 0 done, 2 the input is wrong,
130 interrupted, 143 terminated, 1 any other failure; torchrun makes 1 of them all, so exit.json says it too.
"""

import contextlib
import logging
import os
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    # Started by path, Python has put this file's folder first, where nothing is to be imported from.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]

if TYPE_CHECKING:
    from torchtitan_lite.config.job import JobConfig
    from torchtitan_lite.parallel.watch import End
    from torchtitan_lite.parallel.world import World
    from torchtitan_lite.training.trainer import Trainer

_LAUNCHER = os.getppid()
"""The process that has started this one, as long as it lives."""

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
    from torchtitan_lite.config.job import load_job
    from torchtitan_lite.config.load import ConfigError
    from torchtitan_lite.parallel.watch import tell_launcher
    from torchtitan_lite.parallel.world import world_size
    from torchtitan_lite.training.step import NonFinite

    try:
        loaded = load_job(argv, world_size=world_size(), prog=prog)
        if loaded.dry_run:
            print(_resolved(loaded.config, loaded.world_size), end="", flush=True)
        else:
            train(loaded.config)
    except ConfigError as error:
        tell_launcher(str(error))
        if _speaks():
            print(error, file=sys.stderr, flush=True)
            if "--dry-run" not in argv:
                _write_refusal(error.config, error)
        return 2
    except NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _speaks() -> bool:
    """Whether it falls to this rank to say what all ranks of its machine have found, before they have met."""
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None:
        return os.environ.get("RANK", "0") == "0"
    if local_rank != "0":
        # Meanwhile the rank that speaks does so, and then the launcher ends this one.
        time.sleep(5)
    return True


def train(job: "JobConfig") -> None:
    """Train in a folder of the run's own, and leave the outcome there even when it is an exception.

    Where there are other ranks, an exception ends all of their processes, this one included.
    """
    from torch.cuda import current_device

    from torchtitan_lite.parallel.watch import Watch, is_of_communication, while_launched
    from torchtitan_lite.parallel.world import join, leave

    init_seconds, train_seconds = job.comm.init_timeout_seconds, job.comm.train_timeout_seconds
    with while_launched(_LAUNCHER) if "RANK" in os.environ else contextlib.nullcontext():
        world = join(
            job.device,
            init_seconds=init_seconds,
            train_seconds=train_seconds,
            offload=job.training.enable_cpu_offload,
        )
    _show_log(world.is_first)
    run = _Run(job, world)
    # As an exception, so that the outcome is written on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if world.size == 1:
        try:
            run.work(alive=lambda: None)
            leave()
        except BaseException as error:
            run.write_exit(_end_of(error, world))
            leave(wait=False)
            raise
    else:
        assert world.store is not None
        gpu = current_device() if job.device == "cuda" else None
        parts = {"rank": world.rank, "size": world.size, "launcher": _LAUNCHER, "gpu": gpu}
        watch = Watch(world.store, seconds=init_seconds, **parts)
        watch.on_end = run.write_exit
        watch.start()
        try:
            run.work(alive=lambda: watch.alive(train_seconds if run.step else init_seconds))
            leave()
        except BaseException as error:  # noqa: BLE001 - of this rank or felt from another: each ends the process
            end = _end_of(error, world)
            watch.end(end, _details(error, end), doubtful=is_of_communication(error))
        watch.stop()
    run.done()


class _Run:
    """A run and its folder."""

    def __init__(self, job: "JobConfig", world: "World") -> None:
        self.job, self.world = job, world
        self.folder: Path | None = None
        self.trainer: Trainer | None = None

    @property
    def step(self) -> int:
        """Steps done."""
        return self.trainer.step if self.trainer else 0

    def work(self, alive: Callable[[], None]) -> None:
        """Train to the end; `alive` is called whenever a piece of work is done."""
        from torchtitan_lite.training.trainer import Trainer

        self.folder = _make_folder(self.job, self.world)
        self.trainer = Trainer(self.job, self.world, alive)
        self.trainer.run(self.folder)

    def write_exit(self, end: "End") -> None:
        """Leave in the run's folder how the run ended."""
        from torchtitan_lite.training.outputs import write_exit

        if self.folder is not None:
            write_exit(self.folder, end.status, end.outcome, step=self.step, message=end.message)

    def done(self) -> None:
        """Say, on the rank that speaks, that the run is done and where its files are."""
        from torchtitan_lite.training.outputs import write_exit

        if self.world.is_first and self.folder is not None and self.trainer is not None:
            write_exit(self.folder, 0, "done", step=self.step)
            _summarize(self.trainer, self.folder)


def _make_folder(job: "JobConfig", world: "World") -> Path:
    """The run's folder with its config.toml, which rank 0 makes for all."""
    from torchtitan_lite.config.load import ConfigError, Problem
    from torchtitan_lite.training.outputs import new_folder

    made: Path | ConfigError | None = None
    if world.is_first:
        subfolders = (job.metrics.save_tb_folder, job.profiling.save_traces_folder)
        try:
            made = new_folder(job.job.dump_folder, job.model.name, job.model.flavor, subfolders)
            (made / "config.toml").write_text(_resolved(job, world.size), encoding="utf-8")
        except OSError as error:
            rule = f"cannot be written ({error.strerror})"
            remedy = "name a folder that you can write to"
            made = ConfigError([Problem("job.dump_folder", job.job.dump_folder, rule, remedy)])
    made = world.share(made)
    if isinstance(made, ConfigError):
        raise made
    assert made is not None
    return made


def _resolved(job: "JobConfig", world_size: int) -> str:
    """The whole configuration as TOML, after the plan for `world_size` ranks as comments."""
    from torchtitan_lite.config.load import to_toml

    return "".join(f"# {line}\n" for line in job.plan(world_size)) + "\n" + to_toml(job)


def _end_of(error: BaseException, world: "World") -> "End":
    """What an exception makes of the run."""
    from torchtitan_lite.config.load import ConfigError
    from torchtitan_lite.parallel.watch import End
    from torchtitan_lite.training.step import NonFinite

    ends = {
        ConfigError: (2, "refused"),
        NonFinite: (1, "non-finite"),
        KeyboardInterrupt: (130, "interrupted"),
        SystemExit: (143, "terminated"),
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
    return {"terminated": "", "interrupted": "interrupted", "non-finite": f"error: {error}"}.get(
        end.outcome, end.message
    )


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


if __name__ == "__main__":
    sys.exit(main())
