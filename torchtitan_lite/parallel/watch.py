"""How a run of several ranks ends when one of them fails: soon, all of it, and with that rank's error first.

Every rank gives signs of life to the store where the ranks met, from a thread of its own. The rank that fails
first says what happened and writes it there; the others find it, say a line each and end. Where nothing is
written, the rank without signs of life is the one to name. The thread ends the process by itself when the
main thread hangs, or waits for a rank that is gone.
"""

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

_BEAT = 0.5
"""Seconds between two signs of life."""
_SILENCE = 3.0
"""Seconds without one after which a rank is gone, once something has gone wrong."""
_GRACE = 6.0
"""Seconds for the main thread to end the process by itself; more than a `_SILENCE`."""
_TORCH = os.path.dirname(torch.__file__) + os.sep
_COMMUNICATION = os.path.join(_TORCH, "distributed") + os.sep


@dataclass(frozen=True, kw_only=True)
class End:
    """How a run ends before it is done."""

    rank: int
    """The rank that is the cause."""
    message: str
    status: int = 1
    outcome: str = "failed"
    quiet: bool = False
    """Whether the other ranks need not say that they end too."""


def signalled(rank: int, number: int) -> End:
    """The end that signal `number` makes of a run."""
    status = 128 + number
    outcome = "interrupted" if number == signal.SIGINT else "terminated"
    message = f"ended by signal {number}"
    return End(rank=rank, message=message, status=status, outcome=outcome, quiet=True)


def words_of(end: End) -> str:
    """What a run prints when `end` ends it: the word `interrupted` after Ctrl-C, nothing after SIGTERM."""
    return "interrupted" if end.outcome == "interrupted" else ""


class Watch:
    """One rank's watch over itself and the others, from `start` to `stop`."""

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        size: int,
        seconds: float,
        launcher: int,
        gpu: int | None = None,
        on_end: Callable[[End], None] = lambda end: None,
    ) -> None:
        self.rank, self.size, self.gpu = rank, size, gpu
        self.on_end = on_end
        """What one rank does with the end of the run: rank 0, or the one that tells of rank 0's death."""
        own_store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        own_store.set_timeout(timedelta(seconds=_GRACE))
        self._store = PrefixStore("watch", own_store)
        self.alive(seconds)
        self._ending, self._stopped = threading.Lock(), threading.Event()
        self._overdue = math.inf
        """When the main thread should have ended the process, once told to."""
        self._signal = int(signal.SIGTERM)
        self._launcher = launcher
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Start to watch."""
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """No more watching: the run is done, and the ranks have parted."""
        self._stopped.set()
        self._thread.join()

    def alive(self, seconds: float) -> None:
        """A piece of work is done; the next one takes at most `seconds`."""
        self._last = time.monotonic()
        self._due = self._last + seconds  # the one that decides whether this rank is late

    @property
    def is_ending(self) -> bool:
        """Whether the process is about to end, as far as this rank has learnt; a sign of life may save it."""
        is_late = time.monotonic() > self._due
        return is_late or self._overdue < math.inf or self._ending.locked()

    def hurry(self, number: int = signal.SIGTERM) -> None:
        """The main thread is to end the process, on signal `number`; if it does not soon, the watch does."""
        if self._overdue == math.inf:
            self._signal, self._overdue = number, time.monotonic() + _GRACE

    def end(self, own: End, details: str = "", *, doubtful: bool) -> NoReturn:
        """Agree with the others on how the run ends, say it, and end the process.

        `own` is what this rank has met with, and `details` what it has to say about that. A `doubtful` one
        may be no more than the consequence of another rank's.
        """
        with self._ending:  # never released: who comes second ends with the process
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                with contextlib.suppress(ValueError):  # the thread may not, and need not
                    signal.signal(number, signal.SIG_IGN)
            try:
                end, is_teller = self._agree(own, details, doubtful)
            except RuntimeError:  # no store any more
                end, is_teller = own, True
                _say(details or self._line(own))
            if self.rank == 0 or (is_teller and end.rank == 0):
                with contextlib.suppress(OSError):
                    self.on_end(end)
            is_own = end.rank == self.rank
            tell_launcher(end.message if is_own else self._line(end) or end.message, late=not is_own)
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(end.status)

    def _agree(self, own: End, details: str, doubtful: bool) -> tuple[End, bool]:
        """The end that all ranks agree on, and whether this rank is the one to tell it."""
        if os.getppid() != self._launcher:
            # Most likely with the store in it, which would not go quietly.
            own = End(rank=self.rank, message="the launcher no longer answers")
            _say(self._line(own))
            return own, True
        if doubtful and (elsewhere := self._silent_rank()):
            own, details = elsewhere, ""
        me = str(self.rank)
        if is_teller := self._store.compare_set("teller", "", me) == me.encode():
            # First said and then written, so that no other rank's line comes before it.
            _say(details or self._line(own))
            self._store.set("end", json.dumps(asdict(own)))
        end = End(**json.loads(self._store.get("end")))
        if not is_teller:
            _say(self._line(end))
        return end, is_teller

    def _line(self, end: End) -> str:
        return "" if end.quiet else f"rank {self.rank} stopped: {end.message}"

    def _silent_rank(self) -> End | None:
        """The end that a rank without signs of life is; None if all give them, or another cause is told."""
        self._store.add("ending", 1)
        before, deadline = self._beats(), time.monotonic() + _SILENCE
        while time.monotonic() < deadline:
            if self._store.check(["teller"]) or self._store.add("ending", 0) == self.size:
                return None
            self._beat()
            time.sleep(0.05)
        pairs = enumerate(zip(before, self._beats(), strict=True))
        silent = [rank for rank, (old, new) in pairs if old == new]
        if not silent:
            return None
        answers = "answer" if len(silent) > 1 else "answers"
        return End(rank=silent[0], message=f"rank {', '.join(map(str, silent))} no longer {answers}")

    def _run(self) -> None:
        while not self._stopped.is_set():
            is_told, is_alone = False, os.getppid() != self._launcher
            try:
                if not is_alone:
                    self._beat()
                    is_told = self._store.check(["end"])
            except RuntimeError:
                is_alone = True
            # At the end of a run the launcher may go a moment before this thread is told to stop.
            if is_alone and not self._stopped.wait(2):
                self.end(End(rank=self.rank, message="the launcher no longer answers"), doubtful=False)
            if not self._ending.locked():
                self._look(is_told)
            self._stopped.wait(_BEAT)

    def _look(self, is_told: bool) -> None:
        """End the process when it is time to and the main thread does not."""
        if is_told:
            self.hurry()
        now, due = time.monotonic(), self._due
        is_late, is_over = now > due, now > min(self._overdue, due + _GRACE)
        if is_late and not self._waits() and self._due == due:  # no sign of life meanwhile
            self.end(self._hang(), self._stack(), doubtful=False)
        if is_over and is_late:
            self.end(self._hang(), self._stack(), doubtful=True)
        if is_over:
            end = signalled(self.rank, self._signal)
            self.end(end, words_of(end), doubtful=True)

    def _hang(self) -> End:
        seconds = time.monotonic() - self._last
        return End(rank=self.rank, message=f"rank {self.rank} hangs: no progress for {seconds:.0f} s")

    def _stack(self) -> str:
        stack = "".join(traceback.format_stack(_main_frame()))
        return f"{self._hang().message} (the timeouts of [comm] say how long that may be)\n{stack}".rstrip()

    def _waits(self) -> bool:
        """Whether the main thread may be waiting for another rank, or for the work of its GPU."""
        if self.gpu is not None and self._gpu_works():
            return True
        frames = [frame.f_code.co_filename for frame, _ in traceback.walk_stack(_main_frame())]
        # Autograd and compiled code wait inside a library, with no frame of torch.distributed.
        return (
            frames[0].startswith(_TORCH)
            or "torchinductor" in frames[0]
            or any(name.startswith(_COMMUNICATION) for name in frames)
        )

    def _gpu_works(self) -> bool:
        try:
            return not torch.cuda.default_stream(self.gpu).query()
        except RuntimeError:  # what is wrong with the GPU is for the main thread to meet with
            return True

    def _beat(self) -> None:
        self._store.set(f"beat/{self.rank}", str(time.monotonic_ns()))

    def _beats(self) -> list[bytes]:
        return self._store.multi_get([f"beat/{rank}" for rank in range(self.size)])


@contextlib.contextmanager
def while_launched(launcher: int) -> Iterator[None]:
    """Within it this process ends when its parent `launcher` does: the other ranks may not be there yet."""
    done = threading.Event()

    def look() -> None:
        while not done.wait(_BEAT):
            if os.getppid() != launcher:
                _say("stopped: the launcher no longer answers")
                os._exit(1)

    threading.Thread(target=look, name="launcher", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def is_of_communication(error: BaseException) -> bool:
    """Whether `error` may be how another rank's end is felt here."""
    if isinstance(error, (dist.DistError, KeyboardInterrupt, SystemExit)):
        return True
    if error.__cause__ is not None and is_of_communication(error.__cause__):  # as felt by a hook
        return True
    if any(word in str(error) for word in ("gloo", "NCCL", "Connection closed", "Connection reset")):
        return True
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename.startswith(_COMMUNICATION) for frame, _ in frames)


def _main_frame() -> FrameType:
    return sys._current_frames()[threading.main_thread().ident or 0]


def _say(text: str) -> None:
    """Print `text` in one write, so that no other rank's lines come between."""
    if text:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()


def tell_launcher(message: str, late: bool = False) -> None:
    """Leave the message where torchrun looks for it, and in its form; it takes the earliest for the cause."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()) + late)}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
