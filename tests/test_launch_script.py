"""The launcher for schedulers passes signals on to the ranks, and its exit status is that of the ranks."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launch import holders_of
from programs import PIPE, Program, environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

ROOT = Path(__file__).parents[1]
STANDALONE = ("--standalone", "--nproc_per_node", 2)

# Handles signals like a run, but without a model.
RANK = """\
import os, signal, sys, time
from types import SimpleNamespace
from torchtitan_lite.launch import signals
from torchtitan_lite.launch.signals import StopRequest

signals._REPEAT = 60.0  # instead of 1 second: a busy machine may be slower
rank = int(os.environ["RANK"])
if len(sys.argv) > 2:
    exec(sys.argv[2])
world = SimpleNamespace(is_first=rank == 0)
request = StopRequest(SimpleNamespace(world=world, is_ending=False), saves=True)
request.install()
sys.stdout.write("ready\\n")  # at once, as the other rank writes too
while not request.asked:
    time.sleep(0.01)
time.sleep(float(sys.argv[1]))
sys.stdout.write("saved\\n")
request.ignore_signals()
time.sleep(0.3 * rank)  # the launcher finds that the other one has ended
sys.exit(75)
"""


class Launch:
    """A running launcher and its child processes, which all write to one pipe."""

    def __init__(
        self, folder: Path, *words: object, fresh: bool = False, stdin: int | None = None, **more: str
    ) -> None:
        """`fresh`: start launch.sh, as a scheduler does; otherwise only the Python launcher, in a fork."""
        options: dict[str, Any] = {"env": environment(**more), "stdin": stdin, "start_new_session": True}
        if fresh:
            command = ["bash", folder / "scripts" / "launch.sh", *map(str, words)]
            self.process = subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, **options)
        else:
            script = folder / "torchtitan_lite" / "launch" / "torchrun.py"
            self.process = Program([script, *words], **options)
        assert self.process.stdout is not None
        self._pipe = os.readlink(f"/proc/self/fd/{self.process.stdout.fileno()}")

    def wait_until_ready(self, ranks: int = 2) -> None:
        """Wait until every rank has installed its signal handlers."""
        self.read("ready", ranks)

    def read(self, line: str, ranks: int = 2) -> None:
        """Wait until each rank has printed `line`."""
        assert self.process.stdout is not None
        assert [self.process.stdout.readline() for _ in range(ranks)] == [f"{line}\n"] * ranks

    def end(self, within: float = 60) -> tuple[int, str, list[str]]:
        """Wait for the end. Returns the exit status and the ranks' output, without torchrun's log."""
        out, err = self.process.communicate(timeout=within)
        said = [line for line in err.splitlines() if "torch/distributed" not in line]
        return self.process.returncode, out, said

    def processes(self) -> list[int]:
        """The processes that run now."""
        return [pid for pid in holders_of(self._pipe) if pid != os.getpid()]

    def signal_all(self, number: int) -> None:
        """Send a signal to the launcher and to every rank, as some schedulers do."""
        for pid in self.processes():
            os.kill(pid, number)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the launchers without .venv, in a folder with a space: shell scripts often break there."""
    for folder in ("scripts", "torchtitan_lite/launch"):
        shutil.copytree(ROOT / folder, tmp_path / "a repository" / folder)
    return tmp_path / "a repository"


@pytest.fixture
def launch(repository: Path) -> Iterator:
    """`launch(seconds to save, code to run first)` starts two ranks and kills them at the end of the test."""
    (repository / "rank.py").write_text(RANK)
    started = []

    def start(*words: object, how: tuple = STANDALONE, **more: Any) -> Launch:
        run = Launch(repository, *how, repository / "rank.py", *words, **more)
        started.append(run)
        return run

    yield start
    for run in started:
        for pid in run.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.communicate()


def check_saved(run: Launch, number: int) -> None:
    status, out, said = run.end()
    assert (status, out) == (75, "saved\n" * 2), said
    how = "; press Ctrl-C again to end at once" if number == signal.SIGINT else ""
    assert said == [f"asked to stop by {signal.Signals(number).name}: saves and stops as soon as it can{how}"]
    assert run.processes() == []


@pytest.mark.parametrize(
    ("number", "fresh"),
    [(signal.SIGTERM, False), (signal.SIGUSR1, True), (signal.SIGINT, False), (signal.SIGHUP, False)],
)
def test_a_signal_to_the_script_makes_every_rank_save_once_and_its_status_is_75(
    number: int, fresh: bool, launch
) -> None:
    run = launch(0.5, fresh=fresh, PYTHON=sys.executable)
    run.wait_until_ready()
    run.process.send_signal(number)
    check_saved(run, number)


@pytest.mark.parametrize(
    ("number", "seconds"),
    [
        (signal.SIGTERM, 0.5),
        (signal.SIGUSR1, 0.5),
        pytest.param(signal.SIGTERM, 35, marks=pytest.mark.slow, id="longer than torchrun waits"),
    ],
)
def test_a_signal_to_every_process_at_once_is_one_request(number: int, seconds: float, launch) -> None:
    run = launch(seconds)
    run.wait_until_ready()
    run.signal_all(number)
    check_saved(run, number)


@pytest.mark.parametrize(
    ("first", "second"), [(signal.SIGUSR1, signal.SIGTERM), (signal.SIGINT, signal.SIGINT)]
)
def test_a_second_signal_ends_all_at_once(first: int, second: int, launch, repository: Path) -> None:
    told = RANK.replace("time.sleep(float", 'sys.stdout.write("asked\\n")\ntime.sleep(float')
    (repository / "rank.py").write_text(told)
    run = launch(1000, "signals._REPEAT = 0.0")
    run.wait_until_ready()
    run.process.send_signal(first)
    run.read("asked")
    run.process.send_signal(second)
    started = time.monotonic()
    status, out, said = run.end()
    assert time.monotonic() - started < 25, "torchrun has waited its 30 seconds"
    assert (status, out) == (128 + second, "")
    assert "asked again: ending at once" in said
    assert not any("Root Cause" in line for line in said)
    assert run.processes() == []


def takes(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_signal_before_there_are_ranks_ends_the_launcher(launch) -> None:
    run = launch(0, fresh=True, PYTHON=sys.executable)
    while not takes(run.process.pid, signal.SIGTERM):
        time.sleep(0.01)
    run.process.send_signal(signal.SIGTERM)
    status, out, _ = run.end()
    assert (status, out) == (143, "")
    assert run.processes() == []


@pytest.mark.parametrize(
    ("action", "status"), [("sys.exit(2)", 2), ("os.kill(os.getpid(), signal.SIGKILL)", 137)]
)
def test_the_status_is_that_of_the_rank_that_failed_first(action: str, status: int, launch) -> None:
    run = launch(0, f"{action} if rank == 1 else time.sleep(1000)")
    found, _, said = run.end()
    assert found == status
    assert any("Root Cause" in line for line in said)


def on_two_nodes(launch, *before_exit: str) -> list[Launch]:
    """Start a launcher with one rank for each code in `before_exit`, which that rank runs before it ends.

    Each launcher stands for a machine. The store where the ranks meet is in the first launcher.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test")
    runs = []
    for node, action in enumerate(before_exit):
        how = ("--nnodes", 2, "--nproc_per_node", 1, *meet, "--rdzv_conf", f"is_host={node == 0}")
        runs.append(launch(0, f"import atexit; atexit.register(lambda: {action})", how=how))
    for run in runs:
        run.wait_until_ready(ranks=1)
        run.process.send_signal(signal.SIGTERM)
    return runs


@pytest.mark.parametrize("actions", [("time.sleep(1)", "None"), ("None", "time.sleep(1)")])
def test_launchers_on_two_nodes_end_with_75_whichever_is_the_last(actions: tuple[str, str], launch) -> None:
    runs = on_two_nodes(launch, *actions)
    assert [run.end()[:2] for run in runs] == [(75, "saved\n")] * 2


def test_a_rank_that_fails_after_the_store_is_gone_gives_its_own_status(launch) -> None:
    runs = on_two_nodes(launch, "None", "(time.sleep(1), os._exit(3))")
    assert runs[0].end()[:2] == (75, "saved\n")
    assert runs[1].end()[:2] == (3, "saved\n")


@pytest.mark.parametrize(
    ("words", "environment", "name"),
    [
        (("--max-restarts", 3), {}, "--max-restarts"),
        (("--max_restarts=3",), {}, "--max-restarts"),
        ((), {"PET_MAX_RESTARTS": "3"}, "PET_MAX_RESTARTS"),
    ],
)
def test_restarts_by_torchrun_are_refused(
    words: tuple, environment: dict[str, str], name: str, launch
) -> None:
    status, out, said = launch(0, how=(*STANDALONE, *words), **environment).end()
    remedy = "leave it out, and let the scheduler start the command again"
    assert (status, out) == (2, "")
    assert said == [f"{name} = 3 would start again what was asked to stop: {remedy}"]


@pytest.mark.parametrize("words", [("--signals-to-handle", "SIGTERM"), ("--signals_to_handle=SIGUSR1",)])
def test_which_signals_torchrun_handles_is_not_for_the_user_to_say(words: tuple, launch) -> None:
    status, out, said = launch(0, how=(*STANDALONE, *words)).end()
    assert (status, out) == (2, "")
    assert said == ["--signals-to-handle is for this launcher to say: leave it out"]


def test_no_restarts_may_be_asked_for_and_a_script_may_have_such_an_option(launch, repository: Path) -> None:
    (repository / "rank.py").write_text("import sys; sys.stdout.write(f'{sys.argv[1:]}\\n')")
    run = launch("--max-restarts", 3, how=(*STANDALONE, "--max-restarts", 0), PET_MAX_RESTARTS="3")
    assert run.end()[:2] == (0, "['--max-restarts', '3']\n" * 2)


def test_torchrun_itself_handles_ctrl_backslash(launch) -> None:
    run = launch(0)
    run.wait_until_ready()
    os.killpg(run.process.pid, signal.SIGQUIT)
    status, out, _ = run.end()
    assert (status, out) == (131, "")
    assert run.processes() == []


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["SIGHUP", "SIGINT"])
def test_a_launcher_that_was_started_to_ignore_a_signal_goes_on(
    number: int, launch, repository: Path
) -> None:
    # As nohup does with SIGHUP. The launcher passes nothing on: the ranks ignore the signal by themselves.
    (repository / "rank.py").write_text("import sys; sys.stdout.write('ready\\n'); sys.stdin.readline()")
    launcher = repository / "torchtitan_lite" / "launch" / "torchrun.py"
    ignore = f"import signal; signal.signal({number:d}, signal.SIG_IGN)\n"
    launcher.write_text(launcher.read_text().replace("import contextlib\n", f"import contextlib\n{ignore}"))
    run = launch(stdin=PIPE)
    run.wait_until_ready()
    run.process.send_signal(number)
    assert run.end()[0] == 0  # the end of the input ends the ranks


def test_ranks_that_are_done_are_a_success(launch, repository: Path) -> None:
    (repository / "rank.py").write_text("import sys; sys.stdout.write('done\\n')")
    assert launch().end()[:2] == (0, "done\n" * 2)


def test_the_repositorys_environment_goes_first(repository: Path) -> None:
    python = repository / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    words = ("--nproc_per_node", "2", "two  words")
    status, out, _ = Launch(repository, *words, fresh=True, PYTHON="/absent").end()
    assert (status, out.splitlines()[1:]) == (0, ["--nproc_per_node", "2", "two  words"])
    assert out.splitlines()[0] == f"{repository}/torchtitan_lite/launch/torchrun.py"
