"""How a run ends: the exit status, the outcome in exit.json, and what is printed.

Imports no torch: train.main also reports an interrupt that arrives while torch is imported.
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

STATUS_STOPPED = 75
"""The exit status of a run that was asked to stop and has saved: EX_TEMPFAIL of sysexits.h, "try again"."""


class RunError(Exception):
    """An error that ends a run with one line instead of a traceback."""

    outcome: ClassVar[str] = "failed"
    """The outcome in exit.json."""


class OnAnotherRank(RuntimeError):
    """Another rank raised an error; the message says which rank and which error."""


@dataclass(frozen=True, kw_only=True)
class End:
    """How a run ends."""

    rank: int
    """The rank that is the cause."""
    message: str = ""
    words: str = ""
    """The text that this rank prints."""
    status: int = 1
    outcome: str = "failed"
    reason: Literal["error", "consequence", "signal", "none"] = "error"
    """The event that ended the work of the rank. An echo reports the error of another rank. none: a hang."""
    quiet: bool = False
    """The other ranks print nothing: their lines would only repeat the message."""
    is_own: bool = False
    """The error is no consequence of another rank's end: communication raises no errors of this type."""
    is_dead: bool = False
    """The rank does not answer any more."""
    writer: int = 0
    """The rank that writes exit.json."""

    def line_on(self, rank: int) -> str:
        """The line that another rank prints when it ends for this reason."""
        return "" if self.quiet else f"rank {rank} stopped: {self.message}"


def signalled(rank: int, number: int) -> End:
    """The end of a run on signal `number`."""
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
    """The end of a run on an exception of `rank`."""
    if isinstance(error, KeyboardInterrupt):
        return signalled(rank, signal.SIGINT)
    if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128:
        return signalled(rank, error.code - 128)
    causes = _with_causes(error)
    reason = "consequence" if any(isinstance(cause, OnAnotherRank) for cause in causes) else "error"
    message = _text(error)
    line = End(rank=rank, message=message, reason=reason, quiet=True)
    if isinstance(error, BrokenPipeError):
        return replace(line, status=141, outcome="interrupted", reason="signal")
    if isinstance(error, ConfigError):
        return replace(line, words=message, status=2, outcome="refused")
    if isinstance(error, RunError):
        return replace(line, words=f"error: {message}", outcome=error.outcome)
    words = _storable(f"rank {rank} failed:\n{''.join(traceback.format_exception(error))}".rstrip())
    if size > 1:
        message = f"rank {rank} failed: {type(error).__name__}: {message.partition(chr(10))[0]}"
    # torch raises a RuntimeError if another rank is gone, and a RunError may come from that.
    is_own = not any(isinstance(cause, RuntimeError | RunError) for cause in causes)
    message = message or type(error).__name__
    return End(rank=rank, message=message, words=words, reason=reason, is_own=is_own)


def _with_causes(error: BaseException) -> list[BaseException]:
    """The error and its causes, such as the error behind a HookFailed."""
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
    """`text` without the bytes of a file name that is not UTF-8: neither JSON nor a store takes them."""
    return text.encode("utf-8", "backslashreplace").decode()


def status_of(error: BaseException) -> int:
    """Print what a user can act on without a traceback, and return the exit status. Raise any other error.

    All ranks have the same ConfigError: the first rank of each machine prints it.
    """
    end = end_of(error)
    if not end.quiet or isinstance(error, SystemExit):
        raise error
    if isinstance(error, ConfigError):
        tell_launcher(end.message)
        if not is_first_here():
            time.sleep(5)  # the first rank prints meanwhile; then the launcher ends this process
            return end.status
    if isinstance(error, BrokenPipeError):
        # Python would complain at exit that the reader of the output, such as `head`, is gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    say(end.words)
    return end.status


def is_first_here() -> bool:
    """Whether this process is the first of its machine, as far as the launcher's variables tell."""
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


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
