"""The guards of real ranks, with real signals: what ends a rank, how soon, and what the rank prints."""

import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from launch import DEEP
from programs import PIPE, Program, environment

from torchtitan_lite.launch import guard
from torchtitan_lite.launch.end import End
from torchtitan_lite.launch.guard import Guard
from torchtitan_lite.launch.signals import StopRequest
from torchtitan_lite.launch.world import Progress, World

PROGRAM = """\
import ctypes, os, signal, sys, threading, time
import torch.distributed as dist
from torchtitan_lite.launch import guard as module
from torchtitan_lite.launch.end import End
from torchtitan_lite.launch.guard import Guard
from torchtitan_lite.launch.world import Progress, World

module._SILENCE, module._GRACE = 1.5, 2.0
rank, size, port = map(int, sys.argv[1:])
store = dist.TCPStore("127.0.0.1", port, is_master=False)

def told(end):
    os.write(1, f"{{end.status}} {{end.outcome}}\\n".encode())

world = World(rank=rank, size=size, store=store, progress=Progress(seconds=60))
guard = Guard(world, saves={saves}, on_end=told)

def tell():
    while not guard.stop.asked: time.sleep(0.01)
    print("asked", flush=True)

guard.__enter__()
if {is_deaf}:  # so that no handler raises before the process is inside the library
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
print("ready", flush=True)
{after}
"""
WAIT = "while not guard.stop.asked: time.sleep(0.01)\n"
PATIENT = "module._GRACE = 1000.0\n"  # this rank ends for another reason than its grace
FOREVER = "while True: time.sleep(0.1)"
TELL = "threading.Thread(target=tell, daemon=True).start()\n"
LEAVE = "guard.stop.ignore_signals(); guard.__exit__(None, None, None); sys.exit(75)"
ASKED = "asked to stop by SIGTERM: saves and stops as soon as it can\n"


class Rank(Program):
    """A process with a Guard, which then runs the code `after`."""

    def __init__(self, after: str, rank: int, size: int, port: int, saves: bool) -> None:
        code = PROGRAM.format(after=after, saves=saves, is_deaf=DEEP in after)
        # The store is in this process, as torchrun has it in its own.
        variables = environment(RANK=str(rank), TORCHELASTIC_USE_AGENT_STORE="True")
        super().__init__(["-c", code, rank, size, port], stdin=PIPE, env=variables)


@pytest.fixture
def start() -> Iterator:
    """`start(*afters)` starts a rank for each code, and kills them at the end of the test."""
    meet = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    store = meet("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started: list[Rank] = []

    def start(*afters: str, saves: bool = True) -> list[Rank]:
        for rank, after in enumerate(afters):
            started.append(Rank(after, rank, len(afters), store.port, saves))
        for rank in started:
            rank.read("ready")
        return started

    yield start
    for rank in started:
        rank.kill()
        rank.communicate()


def test_a_rank_that_was_asked_to_stop_may_take_longer_than_the_grace(start) -> None:
    rank, _ = start(WAIT + "time.sleep(3);" + LEAVE, FOREVER)
    rank.send_signal(signal.SIGTERM)
    assert rank.end() == (75, "", ASKED)


@pytest.mark.parametrize(
    ("number", "saves", "end", "said"),
    [
        (signal.SIGUSR1, False, "138 terminated", ""),
        (signal.SIGINT, False, "130 interrupted", "interrupted\n"),
        (signal.SIGHUP, False, "129 terminated", ""),
    ],
)
def test_a_signal_that_is_not_a_request_ends_a_rank_even_inside_a_library(
    number: int, saves: bool, end: str, said: str, start
) -> None:
    rank, _ = start(DEEP, FOREVER, saves=saves)
    rank.send_signal(number)
    assert rank.end() == (int(end.split()[0]), f"{end}\n", said)


@pytest.mark.parametrize("what", [FOREVER, DEEP], ids=["in Python", "in C"])
def test_a_second_signal_to_all_ranks_ends_them_at_once_and_is_printed_once(what: str, start) -> None:
    ranks = start(PATIENT + TELL + what, PATIENT + TELL + what)
    for rank in ranks:
        rank.send_signal(signal.SIGUSR1)
    for rank in ranks:
        rank.read("asked")
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    assert ranks[0].end() == (143, "143 terminated\n", "asked again: ending at once\n")
    assert ranks[1].end() == (143, "", "")


def test_a_second_signal_to_one_rank_ends_all_ranks(start) -> None:
    ranks = start(FOREVER, TELL + FOREVER)
    ranks[1].send_signal(signal.SIGUSR1)
    ranks[1].read("asked")
    ranks[1].send_signal(signal.SIGTERM)
    assert ranks[1].end() == (143, "", "")
    assert ranks[0].end() == (143, "143 terminated\n", "")


def test_ranks_that_have_saved_may_end_at_different_times(start) -> None:
    saves_long = "guard.stop.ignore_signals(); time.sleep(2.5); print(guard.is_ending);"
    ranks = start(WAIT + saves_long + LEAVE, WAIT + LEAVE)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    assert ranks[1].end() == (75, "", "")
    ranks[0].send_signal(signal.SIGTERM)  # the launcher's, which finds a rank ended
    assert ranks[0].end() == (75, "False\n", ASKED)


@pytest.mark.parametrize("asked_before", [False, True])
def test_another_ranks_failure_is_printed_although_the_launcher_then_sends_a_signal(
    asked_before: bool, start
) -> None:
    fail = "input(); guard.end(End(rank=1, message='disk full', words='disk full'))"
    ranks = start(FOREVER, fail)
    assert ranks[0].stderr is not None and ranks[1].stdin is not None
    if asked_before:
        ranks[0].send_signal(signal.SIGTERM)
        assert ranks[0].stderr.readline() == ASKED
    print(file=ranks[1].stdin, flush=True)
    assert ranks[1].end() == (1, "", "disk full\n")
    ranks[0].send_signal(signal.SIGTERM)
    status, out, err = ranks[0].end()
    assert (status, out) == (1, "1 failed\n")
    assert err.splitlines()[-1] == "rank 0 stopped: disk full"
    assert ASKED not in err


def test_a_rank_that_hangs_is_named_with_its_stack(start) -> None:
    ranks = start(f"{PATIENT}world.alive(0.2)\n{FOREVER}", f"{PATIENT}{FOREVER}")
    status, _, err = ranks[0].end()
    assert status == 1
    assert err.startswith("rank 0 hangs: no progress for ")
    assert '  File "<string>"' in err


def test_a_rank_that_dies_after_it_announced_trouble_is_named(start) -> None:
    die = "dist.PrefixStore('watch', store).set('trouble', '1'); os.kill(os.getpid(), signal.SIGKILL)"
    ranks = start(FOREVER, die)
    status, out, err = ranks[0].end()
    assert (status, out) == (1, "1 failed\n")
    assert err.splitlines()[-1] == "rank 0 stopped: rank 1 no longer answers"


def test_a_process_ends_even_if_writing_the_outcome_hangs(start) -> None:
    hang = "guard.on_end = lambda end: threading.Event().wait(); world.alive(0.1)"
    rank, _ = start(f"module._AT_MOST = 0.1; {hang}\n{FOREVER}", FOREVER)
    assert rank.end()[0] == 1


class CountingStore:
    """A store in this process that counts the requests of all its clones."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]

    def clone(self) -> "CountingStore":
        return self

    def set_timeout(self, seconds: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        def request(*arguments: object) -> object:
            self.requests.append(name)
            return getattr(self._store, name)(*arguments)

        return request


def guarded(store: Any) -> Guard:
    return Guard(world_of(0, store), saves=True, on_end=lambda end: None)


def test_a_wait_whose_time_is_up_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = CountingStore()
    waits = []

    def wait(*_: object) -> None:
        waits.append(None)
        if len(waits) < 3:
            raise dist.DistStoreError("wait timeout")

    store.wait = wait
    monkeypatch.setattr(guard, "PrefixStore", lambda prefix, own: own)
    guarded(store)._wait_for_trouble()
    assert len(waits) == 3


def test_a_healthy_run_sends_the_store_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it lasts: here a hundred looks at the process."""
    looks: list[float] = []
    store: Any = CountingStore()
    monkeypatch.setattr(guard, "PrefixStore", lambda prefix, own: own)
    monkeypatch.setattr(guard, "_TICK", 0.001)
    monkeypatch.setattr(guard, "is_orphan", lambda: looks.append(time.monotonic()))
    monkeypatch.setattr(StopRequest, "install", lambda own: None)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with guarded(store) as own:
        while len(looks) < 100:
            own.world.alive()
        assert store.requests == ["wait"]
    assert sorted(store.requests) == ["compare_set", "get", "wait"]


def test_rank_0_waits_for_the_others_if_its_process_has_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(guard, "PrefixStore", lambda prefix, own: own)
    store: Any = CountingStore()
    first, second = (Guard(world_of(rank, store), saves=True, on_end=lambda end: None) for rank in (0, 1))
    second._part()
    assert store.requests == ["set"]
    first._part()
    assert store.requests == ["set", "wait"]


def test_a_rank_without_the_store_of_rank_0_names_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(guard, "PrefixStore", lambda prefix, own: own)
    store: Any = CountingStore()

    def gone(*_: object) -> None:
        raise RuntimeError("Connection reset by peer")

    store.compare_set = gone
    own, felt = End(rank=1, message="division by zero", is_own=True), End(rank=1, message="reset by peer")
    ends = [
        Guard(world_of(rank, store), saves=True, on_end=lambda end: None)._agree(end)
        for rank, end in ((1, felt), (1, own), (0, felt))
    ]
    assert (ends[0].message, ends[0].writer) == ("rank 0 no longer answers", 1)
    assert ends[1:] == [own, felt]


def world_of(rank: int, store: Any) -> World:
    return World(rank=rank, size=2, store=store, progress=Progress(seconds=60))


LAUNCHER = """\
import os, signal, time
from torchtitan_lite.launch import process
from torchtitan_lite.launch.guard import while_launched

launcher = process._launcher = os.getpid()
if os.fork():
    time.sleep(60)
os.environ["RANK"] = "0"
with while_launched():
    os.kill(launcher, signal.SIGKILL)
    time.sleep(60)
"""


def test_a_rank_that_waits_to_meet_the_others_ends_when_its_launcher_ends() -> None:
    """`communicate` returns once the rank, which holds the pipe too, has ended."""
    with Program(["-c", LAUNCHER]) as launcher:
        _, said = launcher.communicate()
    assert (launcher.returncode, said) == (-signal.SIGKILL, "stopped: the launcher no longer answers\n")


def test_a_rank_that_waits_to_meet_the_others_ends_at_ctrl_c() -> None:
    # It waits in C, where no handler of Python runs.
    code = (
        "import ctypes\nfrom torchtitan_lite.launch.guard import while_launched\n"
        f"with while_launched():\n    print('ready', flush=True)\n    {DEEP}"
    )
    with Program(["-c", code], env=environment(RANK="0")) as rank:
        rank.read("ready")
        rank.send_signal(signal.SIGINT)
        assert rank.end() == (-signal.SIGINT, "", "")


def test_once_the_ranks_have_met_ctrl_c_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    before = signal.getsignal(signal.SIGINT)
    with guard.while_launched():
        pass
    assert signal.getsignal(signal.SIGINT) is before
