"""SIGTERM and SIGUSR1, with which schedulers announce the end of a job: a request to save and stop.

A thread reads the signals from a pipe (signal.set_wakeup_fd), so they count even while the main thread is in
a library, where no Python handler runs.

From the signal to exit status 75: `StopRequest.asked` is set here. At its next exchange the Trainer agrees
with the other ranks on one step to stop at, and saves that step. Then train.run calls `done` and returns
the status of RunFolder.finish.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from torchtitan_lite.launch.end import say

_STOPS = frozenset({signal.SIGTERM, signal.SIGUSR1})
_ECHO = 1.0
"""Seconds in which a launcher may pass on the same signal that this process has received directly."""
_PAUSE = 1.0
"""Seconds in which a rank learns that another rank has failed. A launcher then sends SIGTERM too."""
_LAST_WORDS = 5.0
"""Seconds for the last words; more than the ranks need to agree on how the run ends."""


class StopRequest:
    """Whether a signal has asked this process to save and stop.

    A second signal ends the process. But under a launcher, the same signal within a second is not a second
    request: a scheduler may signal the launcher and the ranks, and the launcher passes its signal on.

    Args:
        is_first: whether this rank prints for all.
        launched: whether a launcher started this process.
        on_second: called from a thread with the number of a second signal; then the process ends.
        on_ending: called from a thread with the number of a signal on which the main thread is to end.
        is_ending: whether the run is about to end because of a failure.
    """

    def __init__(
        self,
        *,
        is_first: bool,
        launched: bool,
        on_second: Callable[[int], None] = lambda number: None,
        on_ending: Callable[[int], None] = lambda number: None,
        is_ending: Callable[[], bool] = lambda: False,
    ) -> None:
        self.asked = False
        self.signal_name = ""
        """The signal that asked."""
        self.on_second, self.on_ending, self.is_ending = on_second, on_ending, is_ending
        self._is_first, self._launched = is_first, launched
        self._saves, self._asked_at = False, 0.0
        self._is_done = threading.Event()
        self._telling = threading.Thread(target=self._tell, daemon=True)

    def install(self, *, saves: bool) -> None:
        """Handle the signals. Called from the main thread.

        Without `saves` a signal raises SystemExit in the main thread.

        With `saves`, all other threads and all processes that start later block the signals, so that a
        compiler goes on when a whole process group is signalled.
        """
        self._saves = saves
        for number in _STOPS:
            signal.signal(number, _pass if saves else _exit)
            if saves:
                signal.siginterrupt(number, False)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True).start()
        if saves:
            signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)

    def done(self) -> None:
        """Ignore SIGTERM and SIGUSR1 from now on. A launcher signals all ranks once one of them has ended."""
        for number in _STOPS:
            signal.signal(number, signal.SIG_IGN)
        self._is_done.set()
        if self.asked:
            self._telling.join()

    def _listen(self, reading: int) -> None:
        if self._saves:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        while True:
            for number in os.read(reading, 64):
                self._take(number)

    def _take(self, number: int) -> None:
        if number == signal.SIGINT or (number in _STOPS and not self._saves):
            self.on_ending(number)
        elif number not in _STOPS or self._is_done.is_set():
            return
        elif not self.asked:
            self.signal_name, self._asked_at = signal.Signals(number).name, time.monotonic()
            self._telling.start()
            self.asked = True
        elif not self._is_echo(number):
            self._end(number)

    def _is_echo(self, number: int) -> bool:
        is_same = signal.Signals(number).name == self.signal_name
        return self._launched and is_same and time.monotonic() < self._asked_at + _ECHO

    def _tell(self) -> None:
        """Say what the signal does. In a thread of its own: printing blocks while nobody reads the output."""
        if self._launched:
            self._is_done.wait(_PAUSE)
        if not self.is_ending():
            self._say(f"asked to stop by {self.signal_name}: saves and stops as soon as it can")

    def _end(self, number: int) -> None:
        try:
            threading.Timer(_LAST_WORDS, os._exit, [128 + number]).start()
            self._say("asked again: ending at once")
            sys.stdout.flush()
            self.on_second(number)
        finally:
            os._exit(128 + number)

    def _say(self, text: str) -> None:
        if self._is_first:
            say(text)


def _pass(*_: object) -> None:
    """The handler in the main thread: the other thread reads the signal."""


def _exit(number: int, _: object) -> None:
    # An exception, so that the outcome is written on the way out.
    sys.exit(128 + number)
