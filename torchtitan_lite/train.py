"""Train a model: torchrun torchtitan_lite/train.py --config configs/debugmodel.toml

Works by path, as `-m torchtitan_lite.train`, and without torchrun. Exit status: 0 done, 2 the input is wrong,
75 stopped on request and saved, 130 interrupted, 143 terminated, 1 any other failure; torchrun makes 1 of all
of these, so exit.json says it too.
"""

import atexit
import contextlib
import gc
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if not __package__:
    # Started by path, Python has put this file's folder first, where nothing is to be imported from.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]

if TYPE_CHECKING:
    from torchtitan_lite.config.job import JobConfig
    from torchtitan_lite.parallel.watch import End, Watch
    from torchtitan_lite.parallel.world import World

_LAUNCHER = os.getppid()
"""The process that has started this one, as long as it lives."""

_GC_THRESHOLDS = gc.get_threshold()

# Our imports stay inside the functions, so that --dry-run and wrong input are answered without the slow ones.


def main(argv: Sequence[str] | None = None, prog: str = "python -m torchtitan_lite.train") -> int:
    """Do what the command line `argv` says, and return the exit status."""
    # As often as usual, looking for garbage takes half a second of a start.
    gc.set_threshold(100_000, *_GC_THRESHOLDS[1:])
    try:
        return _main(sys.argv[1:] if argv is None else argv, prog)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output, such as `head`, has had enough; Python would complain again on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        gc.unfreeze()
        gc.set_threshold(*_GC_THRESHOLDS)


def _main(argv: Sequence[str], prog: str) -> int:
    from torchtitan_lite.checkpoint import SaveFailed
    from torchtitan_lite.config.job import load_job
    from torchtitan_lite.config.load import ConfigError
    from torchtitan_lite.parallel.watch import tell_launcher
    from torchtitan_lite.parallel.world import world_size
    from torchtitan_lite.training.finite import NonFinite

    status = 0
    try:
        loaded = load_job(argv, world_size=world_size(), prog=prog)
        if loaded.dry_run:
            print(loaded.config.to_toml(loaded.world_size), end="", flush=True)
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


def _look_for_new_garbage() -> None:
    """Look for garbage as often as usual, but never among what is there now: it stays."""
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


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
    from torchtitan_lite.parallel.watch import Watch, signalled, while_launched
    from torchtitan_lite.parallel.world import join, leave
    from torchtitan_lite.run import Run

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
    run = Run(job, world, on_built=_look_for_new_garbage)
    # Only now: a rank that waits for others that never come can do no better than end at the first signal.
    request = partial(StopRequest, is_first=world.is_first, launched=launched)
    if world.size == 1:
        stop = request(on_second=lambda number: run.write_exit(signalled(world.rank, number)))
        stop.install(saves=job.checkpoint.enable)
        try:
            status = run.work(stop, alive=lambda: None)
            leave()
        except BaseException as error:
            failure = error
            _despite_signals(lambda: run.write_exit(_end_of(failure, world)))
            leave(wait=False)
            raise
        return status
    assert world.store is not None
    gpu = current_device() if job.device == "cuda" else None
    parts = {"rank": world.rank, "size": world.size, "launcher": _LAUNCHER, "gpu": gpu}
    watch = Watch(world.store, seconds=init_seconds, on_end=run.write_exit, **parts)
    stop = request(
        on_second=lambda number: watch.end(signalled(world.rank, number), doubtful=True),
        on_ending=watch.hurry,
        is_ending=lambda: watch.is_ending,
    )
    stop.install(saves=job.checkpoint.enable)
    watch.start()
    try:
        status = run.work(stop, alive=lambda: watch.alive(train_seconds if run.is_steady else init_seconds))
        leave()
    except BaseException as error:  # of this rank or felt from another: each ends the process
        failure = error
        _despite_signals(lambda: _end_all(watch, failure, world))
        raise
    watch.stop()
    return status


def _despite_signals(act: Callable[[], None]) -> None:
    """Do `act`, from its beginning again whenever a signal raises in it."""
    while True:
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            return act()


def _end_all(watch: "Watch", error: BaseException, world: "World") -> None:
    """End this process, and with it the run, upon `error`."""
    from torchtitan_lite.parallel.watch import is_of_communication

    end = _end_of(error, world)
    watch.end(end, _details(error, end), doubtful=is_of_communication(error))


def _end_of(error: BaseException, world: "World") -> "End":
    """What an exception makes of the run."""
    from torchtitan_lite.checkpoint import SaveFailed
    from torchtitan_lite.config.load import ConfigError
    from torchtitan_lite.parallel.watch import End, signalled
    from torchtitan_lite.training.finite import NonFinite

    if isinstance(error, KeyboardInterrupt):
        return signalled(world.rank, signal.SIGINT)
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        return signalled(world.rank, error.code - 128)
    ends = {
        ConfigError: (2, "refused"),
        NonFinite: (1, "non-finite"),
        SaveFailed: (1, "not-saved"),
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
    from torchtitan_lite.parallel.watch import words_of

    if not end.quiet:
        return f"rank {end.rank} failed:\n{''.join(traceback.format_exception(error))}".rstrip()
    if end.outcome in ("non-finite", "not-saved"):
        return f"error: {error}"
    return end.message if end.outcome == "refused" else words_of(end)


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
