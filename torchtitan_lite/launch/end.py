"""How a run ends before it is done: the exit status, the outcome in exit.json, and what is printed."""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from typing import ClassVar

from torchtitan_lite.config.load import ConfigError


class RunError(Exception):
    """An error that ends a run with one line instead of a traceback."""

    outcome: ClassVar[str] = "failed"
    """What exit.json says of the run."""


@dataclass(frozen=True, kw_only=True)
class End:
    """How a run ends before it is done."""

    rank: int
    """The rank that is the cause."""
    message: str
    status: int = 1
    outcome: str = "failed"
    quiet: bool = False
    """The other ranks print nothing: their lines would only repeat the message."""
    is_dead: bool = False
    """The rank does not answer any more."""

    @property
    def is_signal(self) -> bool:
        """Whether a signal ended the rank."""
        return self.outcome in ("interrupted", "terminated")

    def line_on(self, rank: int) -> str:
        """What another rank prints when it ends for this reason."""
        return "" if self.quiet else f"rank {rank} stopped: {self.message}"


def signalled(rank: int, number: int) -> End:
    """The end of a run on signal `number`."""
    outcome = "interrupted" if number == signal.SIGINT else "terminated"
    message = f"ended by signal {number}"
    return End(rank=rank, message=message, status=128 + number, outcome=outcome, quiet=True)


def end_of(error: BaseException, rank: int = 0, size: int = 1) -> End:
    """The end of a run on an exception of `rank`."""
    if isinstance(error, KeyboardInterrupt):
        return signalled(rank, signal.SIGINT)
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        return signalled(rank, error.code - 128)
    if isinstance(error, ConfigError):
        return End(rank=rank, status=2, outcome="refused", message=str(error), quiet=True)
    if isinstance(error, RunError):
        return End(rank=rank, outcome=error.outcome, message=str(error), quiet=True)
    if isinstance(error, BrokenPipeError):
        return End(rank=rank, status=141, outcome="interrupted", message=str(error), quiet=True)
    message = str(error) or type(error).__name__
    if size > 1:
        message = f"rank {rank} failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return End(rank=rank, message=message)


def words_of(error: BaseException, end: End) -> str:
    """What the rank that raised `error` prints about it."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, RunError):
        return f"error: {error}"
    if end.quiet:
        return words_of_signal(end)
    return f"rank {end.rank} failed:\n{''.join(traceback.format_exception(error))}".rstrip()


def words_of_signal(end: End) -> str:
    """What a rank prints when a signal ends the run: nothing on SIGTERM."""
    return "interrupted" if end.status == 128 + signal.SIGINT else ""


def say(text: str) -> None:
    """Print `text` on standard error in one write, so that no other rank's lines come between."""
    if text:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def tell_launcher(message: str, late: bool = False) -> None:
    """Write the message to torchrun's error file, in torchrun's format.

    torchrun names the rank with the earliest error as the root cause. `late`: another rank is the cause.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()) + late)}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
