"""One process of a run while it works: its signals, its watch, and what an exception makes of the run."""

import contextlib
import os
from collections.abc import Callable
from types import TracebackType
from typing import Self

from torchtitan_lite.launch.end import End, end_of, signalled, words_of
from torchtitan_lite.launch.signals import StopRequest
from torchtitan_lite.launch.watch import Met, Watch
from torchtitan_lite.launch.world import CommConfig, OnAnotherRank, World, leave


class Guard:
    """Guards the work in its `with` statement, which runs in the main thread.

    If the work raises in a run of several ranks, all processes of the run end, this one included. In a run of
    one process `on_end` is called and the error goes on. A second stop signal ends the run in the same ways.

    Args:
        saves: whether the run saves checkpoints, so that a signal asks to stop. Otherwise it ends the run.
        launcher: the process that started this one.
        on_end: called on one rank with how the run ends, unless the work returns.
    """

    def __init__(
        self, world: World, comm: CommConfig, *, saves: bool, launcher: int, on_end: Callable[[End], None]
    ) -> None:
        self.is_steady: Callable[[], bool] = lambda: False
        """Whether the slow start is over and nothing is being saved. The run replaces this function."""
        self._world, self._comm, self._saves, self._on_end = world, comm, saves, on_end
        self._watch: Watch | None = None
        if world.size > 1:
            assert world.store is not None
            self._watch = Watch(
                world.store,
                rank=world.rank,
                size=world.size,
                seconds=comm.init_timeout_seconds,
                launcher=launcher,
                on_end=on_end,
            )
        watch = self._watch
        self.stop = StopRequest(
            is_first=world.is_first,
            launched="RANK" in os.environ,
            on_second=self._end_now,
            on_ending=watch.hurry if watch else lambda number: None,
            is_ending=lambda: bool(watch and watch.is_ending),
        )
        """What signals ask for."""

    def alive(self) -> None:
        """Report progress of the main thread."""
        if self._watch:
            comm = self._comm
            steady = self.is_steady()
            self._watch.alive(comm.train_timeout_seconds if steady else comm.init_timeout_seconds)

    def __enter__(self) -> Self:
        self.stop.install(saves=self._saves)
        if self._watch:
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            _despite_signals(lambda: self._end_on(error))
        elif self._watch:
            self._watch.stop()

    def _end_now(self, number: int) -> None:
        """End the run on a second signal, from the thread that reads signals."""
        end = signalled(self._world.rank, number)
        if self._watch:
            self._watch.end(end, met="signal")
        self._on_end(end)

    def _end_on(self, error: BaseException) -> None:
        end = end_of(error, self._world.rank, self._world.size)
        if self._watch:
            self._watch.end(end, words_of(error, end), met=_met(error, end))
        self._on_end(end)
        leave(wait=False)


def _met(error: BaseException, end: End) -> Met:
    if end.is_signal:
        return "signal"
    cause: BaseException | None = error
    while cause is not None:  # such as a HookFailed from an OnAnotherRank
        if isinstance(cause, OnAnotherRank):
            return "echo"
        cause = cause.__cause__
    return "error"


def _despite_signals(act: Callable[[], None]) -> None:
    """Run `act`, from its beginning again whenever a signal raises in it."""
    while True:
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            return act()
