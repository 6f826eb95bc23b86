"""Train a model: torchrun torchtitan_lite/train.py --config configs/debugmodel.toml

This file also runs as `python -m torchtitan_lite.train`, and without torchrun. Exit status: 0 done, 2 wrong
input, 75 stopped on request and saved, 130 interrupted, 143 terminated, 1 any other failure. torchrun turns
every status but 0 into 1, so exit.json has the status too.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # If the file is run by its path, Python searches its folder for imports first. Remove that folder.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]

# Imports are inside the functions, so that --dry-run and errors in the input need no slow import.


def main(argv: Sequence[str] | None = None, prog: str = "python -m torchtitan_lite.train") -> int:
    """Train as the command line `argv` says, and return the exit status."""
    from torchtitan_lite.launch.output import protect
    from torchtitan_lite.launch.process import starting

    protect()
    argv = sys.argv[1:] if argv is None else argv
    if "--version" in argv:
        from torchtitan_lite.cli import versions

        print(versions())
        return 0
    with starting():
        try:
            return run(argv, prog)
        except BaseException as error:  # noqa: BLE001 - status_of raises unexpected errors again
            from torchtitan_lite.launch.end import status_of

            status = status_of(error)
            _write_refusal(error)
            return status


def run(argv: Sequence[str], prog: str) -> int:
    """Train to the last step, or until a signal asks to stop, and return the exit status.

    exit.json in the run's folder records the outcome, even if that is an exception. In a run of several ranks
    an exception ends the processes of all ranks, this process too.
    """
    from torchtitan_lite.launch.process import ending_at_interrupt

    with ending_at_interrupt():
        from torchtitan_lite.config.job import load_job
        from torchtitan_lite.config.load import ConfigError
        from torchtitan_lite.launch.end import say
        from torchtitan_lite.launch.scheduler import adopt
        from torchtitan_lite.launch.world import world_size

        adopted = adopt("torchtitan_lite/train.py ...")
        loaded = load_job(argv, world_size=world_size(), prog=prog)
        job = loaded.config
        if loaded.dry_run:
            print(job.to_toml(loaded.world_size), end="", flush=True)
            return 0
        if adopted.problems:
            raise ConfigError(adopted.problems)
        say(adopted.notice)

        from torchtitan_lite.launch.guard import Guard, while_launched
        from torchtitan_lite.launch.output import outlive_reader
        from torchtitan_lite.launch.process import show_log, started
        from torchtitan_lite.launch.world import join, leave
        from torchtitan_lite.run_folder import RunFolder
        from torchtitan_lite.training.record import find_start
        from torchtitan_lite.training.trainer import Trainer

    outlive_reader()
    with while_launched():
        world = join(
            job.device,
            init_seconds=job.comm.init_timeout_seconds,
            offload=job.training.enable_cpu_offload,
        )
    show_log(world.is_first)
    folder = RunFolder(job, world)
    # Not before `join`: a rank that still waits for other ranks should end at the first signal.
    with Guard(world, saves=job.checkpoint.enable, on_end=folder.write_exit) as guard:
        path = folder.claim()
        start = find_start(job, path, world)
        if start.step > job.training.steps:
            guard.stop.ignore_signals()
            folder.pass_over(start.step)
            leave()
            return 0
        trainer = Trainer(job, world, start, folder=path, is_asked=lambda: guard.stop.asked)
        folder.prepare(trainer, start.resumed)
        started()
        trainer.run()
        folder.export()
        status = folder.finish(guard.stop.signal_name, argv)
        guard.stop.ignore_signals()
        leave()
    return status


def _write_refusal(error: BaseException) -> None:
    """Write a ConfigError to exit.json, if the configuration is valid enough to name the run's folder."""
    from torchtitan_lite.config.job import JobConfig
    from torchtitan_lite.config.load import ConfigError
    from torchtitan_lite.launch.end import end_of, is_first_here
    from torchtitan_lite.training.outputs import write_refusal

    job = error.config if isinstance(error, ConfigError) else None
    if isinstance(error, ConfigError) and any(found.key == "job.dump_folder" for found in error.problems):
        return  # nothing may be written there
    if is_first_here() and isinstance(job, JobConfig) and job.job.dump_folder:
        with contextlib.suppress(OSError, RuntimeError):  # the folder itself may be the problem
            write_refusal(Path(job.job.dump_folder).expanduser(), end_of(error))


if __name__ == "__main__":
    from torchtitan_lite.launch.process import end_process

    end_process(main())
