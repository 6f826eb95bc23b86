"""A request to stop, in real processes with real signals."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
from launch import DEEP
from programs import Program

PROGRAM = """\
import ctypes, os, signal, subprocess, sys, threading, time, warnings
from torchtitan_lite.launch import signals
from torchtitan_lite.launch.signals import StopRequest

ending = threading.Event()

def on_ending(number):
    os.write(1, b"ending %d\\n" % number)
    ending.set()

def on_second(number):
    print("second", number)

def is_ending():
    return False

def tell():
    while not request.asked: time.sleep(0.01)
    print("asked", flush=True)

{before}
request = StopRequest(
    is_first={is_first},
    launched={launched},
    on_second=on_second,
    on_ending=on_ending,
    is_ending=lambda: is_ending(),
)
request.install(saves={saves})
print("ready", flush=True)
{after}
"""
WAIT = "while not request.asked: time.sleep(0.01)\n"
TELL = "threading.Thread(target=tell, daemon=True).start()\n"
FOREVER = "while True: time.sleep(0.1)"
IN_TIME = "try: print('in', flush=True); time.sleep(9)\n"
ASKED = "asked to stop by {}: saves and stops as soon as it can\n"
AGAIN = "asked again: ending at once\n"
SOON = "signals._LAST_WORDS = 1.0"  # instead of 5 seconds


class Process:
    """A process that has installed a request, and then does `after`."""

    def __init__(
        self,
        after: str,
        *,
        before: str = "",
        is_first: bool = True,
        launched: bool = False,
        saves: bool = True,
    ) -> None:
        settings = {"is_first": is_first, "launched": launched, "saves": saves}
        code = PROGRAM.format(before=before, after=after, **settings)
        self.process = Program(["-c", code], start_new_session=True)
        self.read("ready")

    def read(self, line: str) -> None:
        """Wait until the process has printed `line`."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{line}\n"

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def ask(self, number: int) -> None:
        """Send a signal, and wait until the process, which is to TELL, has taken it."""
        self.send(number)
        self.read("asked")

    def end(self, within: float = 60) -> tuple[int, str, str]:
        """The exit status, which is negative for a signal, and what was printed since."""
        out, err = self.process.communicate(timeout=within)
        return self.process.returncode, out, err


@pytest.fixture
def start() -> Iterator[type[Process]]:
    """`start(after)` starts a process that does not outlive the test."""
    started = []

    class Started(Process):
        def __init__(self, *words, **settings) -> None:
            started.append(self)
            super().__init__(*words, **settings)

    yield Started
    for one in started:
        one.process.kill()
        one.process.communicate()


STOPS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])


@STOPS
@pytest.mark.parametrize("launched", [False, True])
def test_the_first_signal_only_asks_and_is_told_once(number: int, launched: bool, start) -> None:
    process = start(WAIT + "print(request.signal_name); request.done()", launched=launched)
    process.send(number)
    name = signal.Signals(number).name
    assert process.end() == (0, f"{name}\n", ASKED.format(name))


def test_a_rank_that_does_not_speak_says_nothing(start) -> None:
    process = start(TELL + FOREVER, is_first=False)
    process.ask(signal.SIGTERM)
    process.send(signal.SIGTERM)
    assert process.end() == (143, "second 15\n", "")


@STOPS
@pytest.mark.parametrize("what", [FOREVER, DEEP], ids=["in Python", "in C"])
def test_the_second_ends_the_process_at_once_wherever_it_is(number: int, what: str, start) -> None:
    process = start(TELL + what, before="signals._LAST_WORDS = 1000.0")
    process.ask(number)
    process.send(number)
    status, out, err = process.end()
    assert (status, out) == (128 + number, f"second {int(number)}\n")
    assert err == ASKED.format(signal.Signals(number).name) + AGAIN


@pytest.mark.parametrize(
    "on_second",
    ["1 / 0", "sys.exit(3)", "threading.Event().wait()"],
    ids=["raises", "exits", "hangs"],
)
def test_nothing_done_about_the_second_keeps_the_process(on_second: str, start) -> None:
    process = start(TELL + FOREVER, before=f"on_second = lambda number: {on_second}\n{SOON}")
    process.ask(signal.SIGTERM)
    process.send(signal.SIGTERM)
    assert process.end() == (143, "", ASKED.format("SIGTERM") + AGAIN)


def test_output_that_nobody_reads_keeps_the_process_neither(start) -> None:
    process = start(TELL + "sys.stderr.write('x' * 2**20)", before=SOON)
    process.ask(signal.SIGTERM)
    process.send(signal.SIGTERM)
    assert process.process.wait(timeout=60) == 143


def test_what_a_launcher_passes_on_within_a_second_is_the_same_request(start) -> None:
    # Where there is little processor time, the test may send them later than within a second.
    before = "signals._ECHO = 1000.0"
    process = start(TELL + WAIT + "time.sleep(1.5); request.done()", launched=True, before=before)
    process.ask(signal.SIGUSR1)
    for _ in range(2):
        process.send(signal.SIGUSR1)
        time.sleep(0.1)
    assert process.end() == (0, "", ASKED.format("SIGUSR1"))


def test_after_that_second_it_is_another(start) -> None:
    process = start(TELL + FOREVER, launched=True)
    process.ask(signal.SIGTERM)
    time.sleep(1.2)
    process.send(signal.SIGTERM)
    assert process.end()[0] == 143


def test_a_different_signal_is_another_at_once(start) -> None:
    process = start(TELL + FOREVER, launched=True)
    process.ask(signal.SIGUSR1)
    process.send(signal.SIGTERM)
    assert process.end() == (143, "second 15\n", AGAIN)


def test_once_the_run_is_done_no_further_signal_counts(start) -> None:
    process = start(WAIT + "request.done(); print('done', flush=True); time.sleep(0.5); sys.exit(75)")
    process.send(signal.SIGTERM)
    process.read("done")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        process.send(number)
        time.sleep(0.05)
    assert process.end() == (75, "", ASKED.format("SIGTERM"))


def test_a_rank_that_learns_of_anothers_failure_does_not_speak_of_saving(start) -> None:
    # As when a launcher sends SIGTERM because that rank has failed.
    process = start(WAIT + "time.sleep(0.3); is_ending = lambda: True; time.sleep(1.5)", launched=True)
    process.send(signal.SIGTERM)
    assert process.end() == (0, "", "")


def test_a_signal_to_a_process_and_all_it_has_started_leaves_those_alone(start) -> None:
    # A compiler, or a data worker.
    child = "import time; print('both', flush=True); time.sleep(1); print('compiled')"
    forked = (
        "warnings.simplefilter('ignore', DeprecationWarning)  # Python 3.12 warns of a fork beside threads\n"
        "pid = os.fork()\n"
        "if not pid:\n    time.sleep(1)\n    os.write(1, b'read\\n')\n    os._exit(request.asked)\n"
    )
    run = f"{forked}subprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
    process = start(run + "print(request.asked, os.waitpid(pid, 0)[1]); request.done()", launched=True)
    process.read("both")
    os.killpg(process.process.pid, signal.SIGTERM)
    status, out, err = process.end()
    assert (status, sorted(out.splitlines()[:2])) == (0, ["compiled", "read"])
    assert out.splitlines()[2:] == ["True 0"]
    assert err == ASKED.format("SIGTERM")


@pytest.mark.parametrize("saves", [True, False])
def test_an_interrupt_stays_one_and_tells_the_watch(saves: bool, start) -> None:
    process = start(IN_TIME + "except KeyboardInterrupt: ending.wait(); print('interrupted')", saves=saves)
    process.read("in")
    process.send(signal.SIGINT)
    assert process.end() == (0, "ending 2\ninterrupted\n", "")


@STOPS
def test_a_run_that_never_saves_ends_by_an_exception(number: int, start) -> None:
    process = start(IN_TIME + "finally: ending.wait(); print('on the way out')", saves=False)
    process.read("in")
    process.send(number)
    assert process.end() == (128 + number, f"ending {int(number)}\non the way out\n", "")


def test_the_watch_is_told_of_it_even_when_the_main_thread_is_in_c(start) -> None:
    process = start(f"while True:\n    try: {DEEP}\n    except SystemExit: pass", saves=False)
    time.sleep(0.3)
    process.send(signal.SIGTERM)
    process.read("ending 15")
