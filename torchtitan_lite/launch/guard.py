"""One process of a run while it works: its signals, its watch, and what an exception makes of the run."""

import contextlib
import os
from collections.abc import Callable
from types import TracebackType
from typing import Self

from torchtitan_lite.launch.end import End, end_of, signalled
from torchtitan_lite.launch.signals import StopRequest
from torchtitan_lite.launch.watch import Watch
from torchtitan_lite.launch.world import CommConfig, World, leave


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
            seconds = comm.init_timeout_seconds
            self._watch = Watch(world, seconds=seconds, launcher=launcher, on_end=on_end)
        watch = self._watch
        self.stop = StopRequest(
            is_first=world.is_first,
            launched="RANK" in os.environ,
            on_second=lambda number: self._end(signalled(world.rank, number)),
            on_ending=watch.hurry if watch else lambda number: None,
            is_ending=lambda: bool(watch and watch.is_ending),
        )
        """The request of a signal to stop."""

    def alive(self) -> None:
        """Report progress of the main thread."""
        if self._watch:
            comm = self._comm
            self._watch.alive(comm.train_timeout_seconds if self.is_steady() else comm.init_timeout_seconds)

    def __enter__(self) -> Self:
        self.stop.install(saves=self._saves)
        if self._watch:
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if self._watch:
                self._watch.stop()
            return
        while True:  # from the beginning again whenever a signal raises in it
            with contextlib.suppress(KeyboardInterrupt, SystemExit):
                self._end(end_of(error, self._world.rank, self._world.size))
                leave(wait=False)
                return

    def _end(self, end: End) -> None:
        if self._watch:
            self._watch.end(end)
        self._on_end(end)
