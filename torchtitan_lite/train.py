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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    # Started by path, Python has put this file's folder first, where nothing is to be imported from.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]

if TYPE_CHECKING:
    from torchtitan_lite.config.job import JobConfig
    from torchtitan_lite.training.trainer import Trainer

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
    from torchtitan_lite.config.load import ConfigError, to_toml
    from torchtitan_lite.training.step import NonFinite

    is_first_rank = os.environ.get("RANK", "0") == "0"
    try:
        loaded = load_job(argv, world_size=_world_size(), prog=prog)
        if loaded.dry_run:
            print(to_toml(loaded.config), end="", flush=True)
        else:
            train(loaded.config)
    except ConfigError as error:
        if is_first_rank:
            print(error, file=sys.stderr)
            if "--dry-run" not in argv:
                _write_refusal(error.config, error)
        return 2
    except NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _world_size() -> int:
    """How many ranks the launcher started; one without a launcher."""
    from torchtitan_lite.config.load import ConfigError, Problem

    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        rule, remedy = "is not a number of ranks", "unset it, or start with torchrun, which sets it"
        raise ConfigError([Problem("WORLD_SIZE", given, rule, remedy)])
    return int(given)


def train(job: "JobConfig") -> None:
    """Train in a folder of the run's own, and leave the outcome there even when it is an exception."""
    from torchtitan_lite.config.load import ConfigError, Problem, to_toml
    from torchtitan_lite.training.outputs import new_folder, write_exit
    from torchtitan_lite.training.step import NonFinite
    from torchtitan_lite.training.trainer import Trainer

    _show_log()
    subfolders = (job.metrics.save_tb_folder, job.profiling.save_traces_folder)
    try:
        folder = new_folder(job.job.dump_folder, job.model.name, job.model.flavor, subfolders)
        (folder / "config.toml").write_text(to_toml(job), encoding="utf-8")
    except OSError as error:
        rule = f"cannot be written ({error.strerror})"
        remedy = "name a folder that you can write to"
        raise ConfigError([Problem("job.dump_folder", job.job.dump_folder, rule, remedy)]) from None
    # As an exception, so that the outcome is written on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    trainer = None
    try:
        trainer = Trainer(job)
        trainer.run(folder)
    except BaseException as error:
        ends = {
            ConfigError: (2, "refused"),
            NonFinite: (1, "non-finite"),
            KeyboardInterrupt: (130, "interrupted"),
            SystemExit: (143, "terminated"),
            BrokenPipeError: (141, "interrupted"),
        }
        status, outcome = ends.get(type(error), (1, "failed"))
        message = str(error) or type(error).__name__
        write_exit(folder, status, outcome, step=trainer.step if trainer else 0, message=message)
        raise
    write_exit(folder, 0, "done", step=trainer.step)
    _summarize(trainer, folder)


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


def _show_log() -> None:
    """Show what the package logs, and no other's, on standard error."""
    log = logging.getLogger("torchtitan_lite")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
