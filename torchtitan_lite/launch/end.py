"""How a run ends: the exit status, the outcome in exit.json, and the printed message.

This module must not import torch: train.main also reports an interrupt that arrives while torch is imported.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.launch.output import ReaderGone

STATUS_STOPPED = 75
"""The exit status of a run that was asked to stop and has saved: EX_TEMPFAIL of sysexits.h, "try again"."""


class RunError(Exception):
    """An error that ends a run with one printed line instead of a traceback."""

    outcome: ClassVar[str] = "failed"
    """The outcome in exit.json."""


class OnAnotherRank(RuntimeError):
    """An error that another rank raised. The message names the rank and its error."""


@dataclass(frozen=True, kw_only=True)
class End:
    """The end of a run: the rank that caused it, the exit status, the outcome and the messages."""

    rank: int
    """The rank that caused the end."""
    message: str = ""
    """One line, for exit.json and for the other ranks."""
    words: str = ""
    """The whole text that `rank` prints, with a traceback if there is one."""
    status: int = 1
    outcome: str = "failed"
    reason: Literal["error", "consequence", "signal", "none"] = "error"
    """The event that ended the work of the rank. consequence: an error of another rank. none: a hang."""
    quiet: bool = False
    """True if the other ranks print nothing, because their lines would only repeat the message."""
    is_own: bool = False
    """True if the rank's own work has caused the error: communication between ranks raises no such error."""
    is_dead: bool = False
    """True if the rank no longer answers."""
    writer: int = 0
    """The rank that writes exit.json."""

    def line_on(self, rank: int) -> str:
        """Return the line that the rank `rank` prints when another rank caused this end."""
        return "" if self.quiet else f"rank {rank} stopped: {self.message}"


def signalled(rank: int, number: int) -> End:
    """Return the end of a run whose rank `rank` got the signal `number`."""
    is_interrupt = number == signal.SIGINT
    return End(
        rank=rank,
        message=f"ended by signal {number}",
        words="interrupted" if is_interrupt else "",
        status=128 + number,
        outcome="interrupted" if is_interrupt else "terminated",
        reason="signal",
        quiet=True,
    )


def end_of(error: BaseException, rank: int = 0, size: int = 1) -> End:
    """Return the end of a run of `size` ranks whose rank `rank` raised `error`."""
    if isinstance(error, KeyboardInterrupt):
        return signalled(rank, signal.SIGINT)
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        return signalled(rank, error.code - 128)
    causes = _with_causes(error)
    reason = "consequence" if any(isinstance(cause, OnAnotherRank) for cause in causes) else "error"
    message = _text(error)
    line = End(rank=rank, message=message, reason=reason, quiet=True)
    if isinstance(error, ReaderGone):
        return replace(line, status=141, outcome="interrupted", reason="signal")
    if isinstance(error, ConfigError):
        return replace(line, words=message, status=2, outcome="refused")
    if isinstance(error, RunError):
        return replace(line, words=f"error: {message}", outcome=error.outcome)
    words = _storable(f"rank {rank} failed:\n{''.join(traceback.format_exception(error))}".rstrip())
    if size > 1:
        message = f"rank {rank} failed: {type(error).__name__}: {message.partition(chr(10))[0]}"
    # torch raises a RuntimeError if another rank is gone, and our code may turn that into a RunError.
    is_own = not any(isinstance(cause, RuntimeError | RunError) for cause in causes)
    message = message or type(error).__name__
    return End(rank=rank, message=message, words=words, reason=reason, is_own=is_own)


def _with_causes(error: BaseException) -> list[BaseException]:
    """Return the error and its chain of causes, such as the error behind a HookFailed."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    return causes


def _text(error: BaseException) -> str:
    try:
        return _storable(str(error))
    except Exception:  # noqa: BLE001 - the error may be of a plugin's class
        return "(no text: its __str__ failed)"


def _storable(text: str) -> str:
    """Return `text` with non-UTF-8 bytes of file names escaped: JSON and torch's store refuse such bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def status_of(error: BaseException) -> int:
    """Print an error that needs no traceback, and return the exit status. Raise any other error again.

    SystemExit(0), with which --help ends, is status 0: the caller then ends the process without Python's slow
    cleanup. All ranks have the same ConfigError, so only the first rank of each machine prints it.
    """
    if isinstance(error, SystemExit) and error.code == 0:
        return 0
    end = end_of(error)
    if not end.quiet or isinstance(error, SystemExit):
        raise error
    if isinstance(error, ConfigError):
        tell_launcher(end.message)
        if not is_first_here():
            time.sleep(5)  # the first rank prints and ends, then the launcher ends this process
            return end.status
    say(end.words)
    return end.status


def is_first_here() -> bool:
    """Return whether this process is the first rank of its machine, by the launcher's variables."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def say(text: str) -> None:
    """Print `text` to standard error in one write, so that the lines of several ranks do not mix."""
    if text:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def tell_launcher(message: str, late: bool = False) -> None:
    """Write the message to torchrun's error file, in torchrun's format.

    torchrun names the rank with the earliest timestamp as the root cause. `late` makes the timestamp of this
    rank one second later, for when another rank is the cause.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()) + late)}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
