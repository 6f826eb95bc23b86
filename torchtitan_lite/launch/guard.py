"""Guard one process of a run: handle its signals, watch its progress, and end all ranks together.

When one rank fails, all ranks end soon, and the error of that rank is printed first. Two threads watch each
rank. The first thread blocks on a key of the store where the ranks met, until any rank announces
trouble. So a healthy run sends no requests to the store. The second thread checks only its own process: that
the launcher is alive, and that the main thread makes progress.

A rank announces trouble if it has an error or makes no progress. Every rank then writes a report about itself
to the store (cause.Answer). The announcing rank picks the cause and writes the verdict, an End. The rank that
is the cause prints first, every other rank prints one line, and all processes end. A rank without an answer
counts as dead.
"""

import contextlib
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Self

import torch.distributed as dist
from pydantic import TypeAdapter
from torch.distributed.distributed_c10d import PrefixStore, Store

from torchtitan_lite.launch.cause import Answer, collectives, find_cause, is_explained
from torchtitan_lite.launch.end import End, end_of, say, signalled, tell_launcher
from torchtitan_lite.launch.process import is_orphan
from torchtitan_lite.launch.signals import STOPS, StopRequest
from torchtitan_lite.launch.world import World, leave

_TICK = 0.5
"""The seconds between two checks of the main thread and the launcher."""
_SILENCE = 3.0
"""The seconds after which a rank that has not answered counts as dead."""
_GRACE = 6.0
"""The seconds that the main thread has to end the process by itself. They must exceed `_SILENCE`."""
_AT_MOST = 60.0
"""The most seconds that ending may take, even if a disk or a terminal does not respond."""
_FOREVER = timedelta(days=20)
"""The longest timeout of a request to the store: poll() counts milliseconds, for at most 24 days."""

# The keys in the store, besides answer/RANK and left/RANK. "trouble" holds the rank that announced trouble,
# or _OVER after a run without trouble.
_TROUBLE, _VERDICT, _TOLD = "trouble", "verdict", "told"
_OVER = "over"
_ANSWER, _END = TypeAdapter(Answer), TypeAdapter(End)


class Guard:
    """A context manager for the main thread: if the block raises, all ranks of the run end together.

    All ranks also end if any rank makes no progress. With one rank, the Guard calls `on_end` and the error
    goes on. A second stop signal ends the run in the same way as an error.

    Args:
        saves: whether the run saves checkpoints. If so, the first signal asks to save and stop. Otherwise it
            ends the run.
        on_end: called with the End of the run, unless the block succeeds. Rank 0 calls it. If rank 0 is dead,
            the rank that announced the trouble calls it.
    """

    def __init__(self, world: World, *, saves: bool, on_end: Callable[[End], None]) -> None:
        self.world, self.on_end = world, on_end
        self.stop = StopRequest(self, saves=saves)
        """The request to save and stop, which a signal makes."""
        self._signal, self._must_end_at = int(signal.SIGTERM), math.inf
        self._ending = threading.Lock()
        self._is_announced, self._is_over = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        # Without torchrun, the store is in the process of rank 0 (torch.distributed.rendezvous).
        self._store_is_of_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        if world.size > 1:
            self._store, self._waiting = _connect(world), _connect(world)
            self._threads = [
                threading.Thread(target=target, name="watch", daemon=True)
                for target in (self._look_at_store, self._look_at_process)
            ]

    def __enter__(self) -> Self:
        self.stop.install()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._is_over.set()
            if self._threads:
                with contextlib.suppress(RuntimeError):  # the store is already gone
                    self._store.compare_set(_TROUBLE, "", _OVER)
            for thread in self._threads:
                thread.join()
            self._part()
            return
        while True:  # try again if a signal raises inside
            with contextlib.suppress(KeyboardInterrupt, SystemExit):
                self.end(end_of(error, self.world.rank, self.world.size))
                leave(wait=False)
                return

    @property
    def is_ending(self) -> bool:
        """True if this rank knows that the run is about to end because of an error or a hang."""
        return self._is_announced.is_set() or self._ending.locked() or self._is_late

    @property
    def _is_late(self) -> bool:
        return self.world.size > 1 and self.world.progress.is_late

    def set_deadline(self, number: int = signal.SIGTERM) -> None:
        """Give the main thread `_GRACE` seconds to end the process, then end it as on signal `number`."""
        if self._must_end_at == math.inf:
            self._signal, self._must_end_at = number, time.monotonic() + _GRACE

    def end(self, own: End) -> None:
        """Agree with the other ranks on how the run ends, print the message, and end this process.

        `own` is the end of the run if this rank is the cause. With one rank, this method only calls `on_end`.
        """
        if self.world.size == 1:
            return self.on_end(own)
        with self._ending:  # never released: the first thread to get the lock ends the process
            limit = threading.Timer(_AT_MOST, os._exit, [own.status])
            limit.daemon = True
            limit.start()
            for number in STOPS:
                with contextlib.suppress(ValueError):  # not the main thread, so no handler raises here
                    signal.signal(number, signal.SIG_IGN)
            end, rank = self._agree(own), self.world.rank
            is_cause = end.rank == rank
            line = end.line_on(rank)
            if end.is_dead and own.reason == "error":  # may be the reason, and is printed nowhere else
                line += f" ({own.message})"
            with contextlib.suppress(RuntimeError):  # the store is gone
                if is_cause:
                    say(end.words)
                    self._store.set(_TOLD, "")
                elif not end.is_dead:
                    self._store.wait([_TOLD])
            if not is_cause:
                say(line)
            if rank == end.writer:
                with contextlib.suppress(OSError):
                    self.on_end(end)
            tell_launcher(end.message if is_cause else line or end.message, late=not is_cause)
            sys.stdout.flush()
            if not end.is_dead:
                self._part()
            os._exit(end.status)

    def _agree(self, own: End) -> End:
        """Return the end that all ranks agree on, or `own` if the other ranks cannot be asked."""
        if is_orphan():
            return self._orphaned()  # the store has probably ended with the launcher
        rank = self.world.rank
        try:
            found = self._store.compare_set(_TROUBLE, "", str(rank)).decode()
            if found == _OVER:
                return own
            announcer = int(found)
            self._store.set(f"answer/{rank}", self._answer(own))
            if announcer == rank:
                self._store.set(_VERDICT, _END.dump_json(self._judge()).decode())
            return _verdict(self._store, announcer)
        except RuntimeError:
            return own if own.is_own or own.reason == "signal" else self._without_store(own)

    def _judge(self) -> End:
        """Collect the answers of all ranks, and return the end of the rank that is the cause."""
        deadline = time.monotonic() + _SILENCE
        keys = [f"answer/{rank}" for rank in range(self.world.size)]
        while True:
            is_over = time.monotonic() > deadline
            # Read all answers again: a rank that has an error later replaces its first answer.
            there = {rank: self._store.get(key) for rank, key in enumerate(keys) if self._store.check([key])}
            answers = {rank: _ANSWER.validate_json(text) for rank, text in there.items()}
            if is_over or (len(answers) == len(keys) and is_explained(answers)):
                break
            time.sleep(0.05)
        if dead := [rank for rank in range(len(keys)) if rank not in answers]:
            # The dead ranks may have ended because of an error that no other rank can have caused (`is_own`).
            end = next((one.end for one in answers.values() if one.end.is_own), _no_answer(dead))
            return replace(end, writer=self.world.rank) if 0 in dead else end
        return answers[find_cause(answers, self.world.rank)].end

    def _answer(self, own: End) -> str:
        answer = Answer(end=own, is_late=self._is_late, counts=collectives())
        return _ANSWER.dump_json(answer).decode()

    def _look_at_store(self) -> None:
        """Wait until a rank announces trouble, answer, and make sure that this process ends."""
        rank = self.world.rank
        try:
            self._wait_for_trouble()
            announcer = self._waiting.get(_TROUBLE).decode()
            if announcer == _OVER:
                return
            self._is_announced.set()
            # If the main thread has an error, the answer of the main thread replaces this one.
            self._waiting.compare_set(f"answer/{rank}", "", self._answer(self._hang()))
            end = _verdict(self._waiting, int(announcer))
        except RuntimeError:
            # At the end of a run the store may close shortly before `_is_over` is set.
            if not self._is_over.wait(2):
                self.end(self._without_store(self._orphaned()))
            return
        if end.rank == rank:  # the main thread hangs, or is about to end the process
            self.end(end)
        self.set_deadline()

    def _wait_for_trouble(self) -> None:
        while True:
            with contextlib.suppress(dist.DistStoreError):  # no trouble for `_FOREVER`: wait again
                return self._waiting.wait([_TROUBLE], _FOREVER)

    def _look_at_process(self) -> None:
        """End the process if its launcher is gone, if its main thread is late, or if its deadline is over."""
        while not self._is_over.wait(_TICK):
            if self._ending.locked():
                return
            if is_orphan() and not self._is_over.wait(2):
                self.end(self._orphaned())
            elif self._is_late:
                self.end(self._hang())
            elif time.monotonic() > self._must_end_at:
                self.end(signalled(self.world.rank, self._signal))

    def _part(self) -> None:
        """Let rank 0 wait until the other ranks need the store no longer, if its process has the store."""
        if not self._threads or not self._store_is_of_rank_0:
            return
        with contextlib.suppress(RuntimeError):  # a rank is dead, or the store is gone
            if self.world.rank:
                self._store.set(f"left/{self.world.rank}", "")
            else:
                others = [f"left/{rank}" for rank in range(1, self.world.size)]
                self._store.wait(others, timedelta(seconds=_SILENCE))

    def _without_store(self, own: End) -> End:
        """Return the end of a run whose store is gone: `own`, unless the store was in another rank."""
        if not self._store_is_of_rank_0 or self.world.rank == 0:
            return own
        return replace(_no_answer([0]), reason="consequence", writer=1)

    def _orphaned(self) -> End:
        end = End(rank=self.world.rank, message="the launcher no longer answers")
        return replace(end, words=end.line_on(end.rank))

    def _hang(self) -> End:
        rank, seconds = self.world.rank, time.monotonic() - self.world.progress.reported_at
        message = f"rank {rank} hangs: no progress for {seconds:.0f} s"
        main = sys._current_frames()[threading.main_thread().ident or 0]
        stack = "".join(traceback.format_stack(main)).rstrip()
        words = f"{message} (the timeouts of [comm] say how long that may be)\n{stack}"
        return End(rank=rank, message=message, words=words, reason="none")


def _connect(world: World) -> Store:
    """Return a new connection to the store. A request blocks its connection until the store answers."""
    assert world.store is not None
    own = world.store.clone()  # pyright: ignore[reportAttributeAccessIssue]
    own.set_timeout(timedelta(seconds=_GRACE))
    return PrefixStore("watch", own)


def _verdict(store: Store, announcer: int) -> End:
    """Wait for the verdict and return it. If no verdict comes, the `announcer` counts as dead."""
    try:
        return _END.validate_json(store.get(_VERDICT))
    except dist.DistStoreError:
        return _no_answer([announcer])


def _no_answer(ranks: list[int]) -> End:
    answers = "answer" if len(ranks) > 1 else "answers"
    message = f"rank {', '.join(map(str, ranks))} no longer {answers}"
    return End(rank=ranks[0], message=message, is_dead=True)


@contextlib.contextmanager
def while_launched() -> Iterator[None]:
    """A context manager: this process ends if its launcher ends inside, or at a Ctrl-C.

    Used until there is a Guard.
    """
    is_over, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def look() -> None:
        while not is_over.wait(_TICK):
            if is_orphan():
                say("stopped: the launcher no longer answers")
                os._exit(1)

    if "RANK" in os.environ:  # otherwise there is no launcher
        threading.Thread(target=look, name="launcher", daemon=True).start()
        if before is signal.default_int_handler:
            # No handler of Python runs while the rank waits for the others, which is in C.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        is_over.set()
        signal.signal(signal.SIGINT, before)
