"""SIGTERM, SIGUSR1, SIGINT and SIGHUP in a process with a StopRequest: real processes, real signals."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
from launch import DEEP
from programs import PIPE, Program, environment

PROGRAM = """\
import ctypes, os, signal, subprocess, sys, threading, time
from types import SimpleNamespace
from torchtitan_lite.launch import signals
from torchtitan_lite.launch.signals import StopRequest

ending = threading.Event()

class Guard:
    world = SimpleNamespace(rank=0, is_first={is_first})
    is_ending = False

    def set_deadline(self, number):
        os.write(1, b"deadline %d\\n" % number)
        ending.set()

    def end(self, end):
        print(end.outcome, end.status)

def tell():
    while not request.asked: time.sleep(0.01)
    print("asked", flush=True)

{before}
request = StopRequest(Guard(), saves={saves})
request.install()
print("ready", flush=True)
{after}
"""
WAIT = "while not request.asked: time.sleep(0.01)\n"
TELL = "threading.Thread(target=tell, daemon=True).start()\n"
FOREVER = "while True: time.sleep(0.1)"
ASKED = "asked to stop by {}: saves and stops as soon as it can\n"
ASKED_BY: dict[int, str] = {
    number: ASKED.format(number.name)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
}
ASKED_BY[signal.SIGINT] = ASKED_BY[signal.SIGINT].replace("\n", "; press Ctrl-C again to end at once\n")
AGAIN = "asked again: ending at once\n"
SHORT_LAST_WORDS = "signals._LAST_WORDS = 1.0"  # instead of 5 seconds


class Process(Program):
    """A process that installs a StopRequest and then runs the code `after`."""

    def __init__(
        self,
        after: str,
        *,
        before: str = "",
        is_first: bool = True,
        launched: bool = False,
        saves: bool = True,
        **options: int,
    ) -> None:
        code = PROGRAM.format(before=before, after=after, is_first=is_first, saves=saves)
        variables = {"RANK": "0"} if launched else {}
        super().__init__(["-c", code], env=environment(**variables), start_new_session=True, **options)
        self.read("ready")

    def ask(self, number: int) -> None:
        """Send the first signal, and wait until the process has noticed the request. `after` must TELL."""
        self.send_signal(number)
        self.read("asked")


@pytest.fixture
def start() -> Iterator[type[Process]]:
    """`start(after)` starts a process and kills it at the end of the test."""
    started = []

    class Started(Process):
        def __init__(self, *words, **settings) -> None:
            started.append(self)
            super().__init__(*words, **settings)

    yield Started
    for one in started:
        one.kill()
        one.communicate()


STOPS = pytest.mark.parametrize("number", ASKED_BY, ids=[signal.Signals(number).name for number in ASKED_BY])


@STOPS
@pytest.mark.parametrize("launched", [False, True])
def test_the_first_signal_asks_to_stop_and_the_process_says_so_once(
    number: int, launched: bool, start
) -> None:
    process = start(WAIT + "print(request.signal_name); request.ignore_signals()", launched=launched)
    process.send_signal(number)
    assert process.end() == (0, f"{signal.Signals(number).name}\n", ASKED_BY[number])


@STOPS
@pytest.mark.parametrize("code", [FOREVER, DEEP], ids=["in Python", "in C"])
def test_a_second_signal_ends_the_process_at_once(number: int, code: str, start) -> None:
    process = start(TELL + code, before="signals._LAST_WORDS, signals._REPEAT = 1000.0, 0.0")
    process.ask(number)
    process.send_signal(number)
    status, out, err = process.end()
    outcome = "interrupted" if number == signal.SIGINT else "terminated"
    assert (status, out) == (128 + number, f"{outcome} {status}\n")
    assert err == ASKED_BY[number] + AGAIN


def test_a_terminal_that_closes_may_send_its_signal_twice(start) -> None:
    # Once by its shell, and once by the system.
    process = start(
        TELL + WAIT + "time.sleep(1); request.ignore_signals()", before="signals._REPEAT = 1000.0"
    )
    process.ask(signal.SIGHUP)
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
    assert process.end() == (0, "", ASKED_BY[signal.SIGHUP])


@pytest.mark.parametrize("saves", [True, False])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["SIGHUP", "SIGINT"])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(number: int, saves: bool, start) -> None:
    # nohup ignores SIGHUP, and a shell script ignores SIGINT in what it starts in the background.
    code = "input(); print(request.asked, ending.is_set()); request.ignore_signals()"
    process = start(code, before=f"signal.signal({number:d}, signal.SIG_IGN)", saves=saves, stdin=PIPE)
    process.send_signal(number)
    print(file=process.stdin, flush=True)
    assert process.end() == (0, "False False\n", "")


def test_only_the_first_rank_prints(start) -> None:
    process = start(TELL + FOREVER, is_first=False)
    process.ask(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.end() == (143, "terminated 143\n", "")


@pytest.mark.parametrize("end", ["1 / 0", "sys.exit(3)", "threading.Event().wait()"])
def test_a_second_signal_ends_the_process_even_if_the_guard_raises_exits_or_hangs(end: str, start) -> None:
    process = start(TELL + FOREVER, before=f"Guard.end = lambda guard, end: {end}\n{SHORT_LAST_WORDS}")
    process.ask(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.end() == (143, "", ASKED.format("SIGTERM") + AGAIN)


def test_a_second_signal_ends_the_process_even_if_nobody_reads_the_output(start) -> None:
    fill_the_pipe = "sys.stderr.write('x' * 2**20)"
    process = start(TELL + fill_the_pipe, before=SHORT_LAST_WORDS)
    process.ask(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143


def test_under_a_launcher_the_same_signal_within_a_second_is_ignored(start) -> None:
    # A busy machine may deliver the signals later than that: wait longer here.
    before = "signals._REPEAT = 1000.0"
    process = start(TELL + WAIT + "time.sleep(1); request.ignore_signals()", launched=True, before=before)
    process.ask(signal.SIGUSR1)
    for _ in range(2):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.1)
    assert process.end() == (0, "", ASKED.format("SIGUSR1"))


@pytest.mark.parametrize(
    ("first", "repeat"), [(signal.SIGTERM, 0.0), (signal.SIGUSR1, 1000.0)], ids=["later", "another signal"]
)
def test_under_a_launcher_any_other_signal_is_a_second_request(first: int, repeat: float, start) -> None:
    process = start(TELL + FOREVER, launched=True, before=f"signals._REPEAT = {repeat}")
    process.ask(first)
    process.send_signal(signal.SIGTERM)
    assert process.end() == (143, "terminated 143\n", AGAIN)


def test_after_the_save_signals_are_ignored(start) -> None:
    process = start(
        WAIT + "request.ignore_signals(); print('done', flush=True); time.sleep(0.5); sys.exit(75)"
    )
    process.send_signal(signal.SIGTERM)
    process.read("done")
    for number in ASKED_BY:
        process.send_signal(number)
        time.sleep(0.05)
    assert process.end() == (75, "", ASKED.format("SIGTERM"))


def test_the_request_is_not_announced_when_the_run_is_about_to_fail(start) -> None:
    # A launcher sends SIGTERM to the other ranks when a rank has failed.
    process = start(WAIT + "time.sleep(0.3); Guard.is_ending = True; time.sleep(1.5)", launched=True)
    process.send_signal(signal.SIGTERM)
    assert process.end() == (0, "", "")


@STOPS
def test_a_signal_to_the_process_group_does_not_end_child_processes(number: int, start) -> None:
    # Such as a compiler. A terminal signals all processes in its foreground.
    child = "import time; print('started', flush=True); time.sleep(1); print('compiled')"
    run = f"subprocess.run([sys.executable, '-c', {child!r}], check=True)\n"
    process = start(run + "print(request.asked); request.ignore_signals()", launched=True)
    process.read("started")
    os.killpg(process.pid, number)
    assert process.end() == (0, "compiled\nTrue\n", ASKED_BY[number])


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGINT, "KeyboardInterrupt()"),
        (signal.SIGTERM, "SystemExit(143)"),
        (signal.SIGUSR1, "SystemExit(138)"),
        (signal.SIGHUP, "SystemExit(129)"),
    ],
)
def test_a_signal_that_is_not_a_request_raises_in_the_main_thread_and_sets_a_deadline(
    number: int, error: str, start
) -> None:
    code = (
        "try: print('in', flush=True); time.sleep(9)\n"
        "except BaseException as error: ending.wait(); print(repr(error))"
    )
    process = start(code, saves=False)
    process.read("in")
    process.send_signal(number)
    assert process.end() == (0, f"deadline {int(number)}\n{error}\n", "")


def test_the_deadline_is_set_even_while_the_main_thread_is_in_c(start) -> None:
    process = start(f"while True:\n    try: {DEEP}\n    except SystemExit: pass", saves=False)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.read("deadline 15")
