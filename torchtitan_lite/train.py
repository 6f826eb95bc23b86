"""Train a model: torchrun torchtitan_lite/train.py --config configs/debugmodel.toml

Works by path, as `-m torchtitan_lite.train`, and without torchrun. Exit status: 0 done, 2 wrong input,
75 stopped on request and saved, 130 interrupted, 143 terminated, 1 any other failure. torchrun turns all of
these into 1, so exit.json has the status too.
"""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:
    # Started by path, Python has put this file's folder first, and nothing is to be imported from there.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]

if TYPE_CHECKING:
    from torchtitan_lite.config.job import JobConfig
    from torchtitan_lite.config.load import ConfigError
    from torchtitan_lite.launch.world import World

_LAUNCHER = os.getppid()
"""The process that started this one."""

# Our imports stay inside the functions, so that --dry-run and wrong input are answered without the slow ones.


def main(argv: Sequence[str] | None = None, prog: str = "python -m torchtitan_lite.train") -> int:
    """Train as the command line `argv` says, and return the exit status."""
    from torchtitan_lite.launch.process import starting

    words = sys.argv[1:] if argv is None else argv
    with starting():
        try:
            return run(words, prog)
        except BaseException as error:  # noqa: BLE001 - raised again unless it is an end that a line explains
            return _status_of(error, is_dry="--dry-run" in words)


def run(argv: Sequence[str], prog: str) -> int:
    """Train to the last step, or until a signal asks to stop, and return the exit status.

    The outcome is left in the run's folder, also when it is an exception. In a run of several ranks an
    exception ends all processes, this one included.
    """
    from torchtitan_lite.config.job import load_job
    from torchtitan_lite.launch.world import leave, world_size

    loaded = load_job(argv, world_size=world_size(), prog=prog)
    job = loaded.config
    if loaded.dry_run:
        print(job.to_toml(loaded.world_size), end="", flush=True)
        return 0

    from torchtitan_lite.launch.guard import Guard
    from torchtitan_lite.launch.process import show_log, started
    from torchtitan_lite.run_folder import RunFolder
    from torchtitan_lite.training.record import find_start
    from torchtitan_lite.training.trainer import Trainer

    world = _meet(job)
    show_log(world.is_first)
    folder = RunFolder(job, world)
    # Only now: a rank that waits for others that never come can do no better than end at the first signal.
    saves = job.checkpoint.enable
    with Guard(world, job.comm, saves=saves, launcher=_LAUNCHER, on_end=folder.write_exit) as guard:
        path = folder.claim(guard.alive)
        resumed, initial = find_start(job, path, world, guard.alive)
        trainer = Trainer(
            job,
            world,
            guard.alive,
            folder=path,
            is_asked=lambda: guard.stop.asked,
            resumed=resumed,
            initial=initial,
        )
        guard.is_steady = lambda: trainer.is_steady
        folder.settle(trainer, resumed, guard.alive)
        started()
        if resumed is not None and resumed.state.model_only:
            step = resumed.state.step
            trainer.say(f"nothing to do: step {step} is the last one, and holds the model alone")
        else:
            trainer.run()
        folder.export(guard.alive)
        guard.stop.done()
        status = folder.finish(guard.stop.signal_name)
        leave()
    return status


def _meet(job: "JobConfig") -> "World":
    """Meet the other ranks. Meanwhile this process ends if its launcher does."""
    from torchtitan_lite.launch.watch import while_launched
    from torchtitan_lite.launch.world import join

    with while_launched(_LAUNCHER) if "RANK" in os.environ else contextlib.nullcontext():
        return join(
            job.device,
            init_seconds=job.comm.init_timeout_seconds,
            train_seconds=job.comm.train_timeout_seconds,
            offload=job.training.enable_cpu_offload,
        )


def _status_of(error: BaseException, *, is_dry: bool) -> int:
    """Print what a user can act on without a traceback, and return its exit status; raise any other error."""
    from torchtitan_lite.config.load import ConfigError
    from torchtitan_lite.launch.end import end_of, say, words_of
    from torchtitan_lite.launch.process import discard_output

    end = end_of(error)
    if not end.quiet or isinstance(error, SystemExit):
        raise error
    if isinstance(error, ConfigError):
        _refuse(error, writes=not is_dry)
        return end.status
    if isinstance(error, BrokenPipeError):
        discard_output()
    say(words_of(error, end))
    return end.status


def _refuse(error: "ConfigError", *, writes: bool) -> None:
    """Print what is wrong with the input, on one rank of each machine; with `writes`, in exit.json too."""
    from torchtitan_lite.config.job import JobConfig
    from torchtitan_lite.launch.end import say, tell_launcher
    from torchtitan_lite.training.outputs import write_refusal

    tell_launcher(str(error))
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)  # local rank 0 prints the same meanwhile; then the launcher ends this process
        return
    if "LOCAL_RANK" not in os.environ and os.environ.get("RANK", "0") != "0":
        return
    say(str(error))
    if writes and isinstance(error.config, JobConfig) and error.config.job.dump_folder:
        with contextlib.suppress(OSError, RuntimeError):  # the folder itself may be what is wrong
            write_refusal(Path(error.config.job.dump_folder).expanduser(), str(error))


if __name__ == "__main__":
    from torchtitan_lite.launch.process import end_process

    end_process(main())
