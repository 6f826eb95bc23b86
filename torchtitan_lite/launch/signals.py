"""Turn the signals that announce the end of a run into a request to save and stop.

Schedulers send SIGTERM and SIGUSR1. A terminal sends SIGINT at Ctrl-C and SIGHUP when it closes, to all
processes that run in its foreground.

A thread reads the signals from a pipe (signal.set_wakeup_fd). So a signal is noticed even while the main
thread is in C code, where no Python handler runs.

From the signal to exit status 75: `StopRequest.asked` is set here. The next all-reduce of a step
(`Stepper.reduce_and_clip`) tells all ranks, and so does an exchange within a validation or after a save. The
Trainer of every rank then stops after the same step, and saves that step. Then train.run calls
`ignore_signals` and returns the exit status of `RunFolder.finish`.
"""

import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

from torchtitan_lite.launch.end import say, signalled

if TYPE_CHECKING:
    from torchtitan_lite.launch.guard import Guard

_OF_TERMINALS = frozenset({signal.SIGINT, signal.SIGHUP})
STOPS = frozenset({signal.SIGTERM, signal.SIGUSR1}) | _OF_TERMINALS
_REPEAT = 1.0
"""The seconds in which one event may bring a signal twice. A launcher may forward the signal that this
process has also received directly. When a terminal closes, its shell sends SIGHUP, and so does the system."""
_PAUSE = 1.0
"""The seconds before a request is printed. The launcher also sends SIGTERM when another rank has failed, and
this rank learns of the failure in this time."""
_LAST_WORDS = 5.0
"""The limit, in seconds, for ending after a second signal. The ranks usually agree on the end sooner."""


class StopRequest:
    """The request to save and stop that the first signal of `STOPS` makes.

    A second signal ends the process. But the same signal within a second does not count under a launcher: a
    scheduler may signal the launcher and the ranks, and the launcher forwards its signal to the ranks. Nor
    does a second SIGHUP within a second.

    Args:
        guard: the Guard, which ends the process on a second signal.
        saves: whether the run saves checkpoints. If not, SIGINT raises KeyboardInterrupt in the main thread,
            and the other signals raise SystemExit.
    """

    def __init__(self, guard: "Guard", *, saves: bool) -> None:
        self.asked = False
        self.signal_name = ""
        """The name of the signal that made the request, or "" before a request."""
        self._guard, self._saves = guard, saves
        self._handled = STOPS - _ignored() if saves else STOPS - _ignored() - {signal.SIGINT}
        self._launched, self._asked_at = "RANK" in os.environ, 0.0
        self._is_done = threading.Event()
        self._telling = threading.Thread(target=self._tell, daemon=True)

    def install(self) -> None:
        """Install the signal handlers. This method must be called in the main thread.

        If the run saves, all other threads and all processes that start later block the signals. So a child
        process, such as a compiler, continues when a scheduler signals the whole process group.
        """
        for number in self._handled:
            signal.signal(number, _pass if self._saves else _exit)
            if self._saves:
                signal.siginterrupt(number, False)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True).start()
        if self._saves:
            signal.pthread_sigmask(signal.SIG_BLOCK, self._handled)

    def ignore_signals(self) -> None:
        """Ignore the signals from now on. A launcher signals all ranks when the first rank ends."""
        for number in self._handled:
            signal.signal(number, signal.SIG_IGN)
        self._is_done.set()
        if self.asked:
            self._telling.join()

    def _listen(self, reading: int) -> None:
        if self._saves:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._handled)
        while True:
            for number in os.read(reading, 64):
                self._take(number)

    def _take(self, number: int) -> None:
        if number in STOPS and not self._saves:
            self._guard.set_deadline(number)
        elif number not in STOPS or self._is_done.is_set():
            return
        elif not self.asked:
            self.signal_name, self._asked_at = signal.Signals(number).name, time.monotonic()
            self._telling.start()
            self.asked = True
        elif not self._is_repeat(number):
            self._end(number)

    def _is_repeat(self, number: int) -> bool:
        is_same = signal.Signals(number).name == self.signal_name
        may_repeat = self._launched or number == signal.SIGHUP
        return may_repeat and is_same and time.monotonic() < self._asked_at + _REPEAT

    def _tell(self) -> None:
        """Print what the signal does. A thread runs this: printing blocks if nobody reads the output."""
        if self._launched:
            self._is_done.wait(_PAUSE)
        if not self._guard.is_ending:
            how = "; press Ctrl-C again to end at once" if self.signal_name == "SIGINT" else ""
            self._say(f"asked to stop by {self.signal_name}: saves and stops as soon as it can{how}")

    def _end(self, number: int) -> None:
        try:
            threading.Timer(_LAST_WORDS, os._exit, [128 + number]).start()
            self._say("asked again: ending at once")
            sys.stdout.flush()
            self._guard.end(signalled(self._guard.world.rank, number))
        finally:
            os._exit(128 + number)

    def _say(self, text: str) -> None:
        if self._guard.world.is_first:
            say(text)


def _ignored() -> set[signal.Signals]:
    """Return the signals of terminals that this process was started to ignore, as nohup does with SIGHUP."""
    return {number for number in _OF_TERMINALS if signal.getsignal(number) is signal.SIG_IGN}


def _pass(*_: object) -> None:
    """Do nothing: this is the handler in the main thread, and the thread of `_listen` reads the signal."""


def _exit(number: int, _: object) -> None:
    # Raise an exception, so that Guard.__exit__ writes the outcome.
    sys.exit(128 + number)
