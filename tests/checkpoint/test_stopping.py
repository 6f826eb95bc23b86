"""A stop signal in any phase of a run: the ranks agree on a step, save it, and end with status 75."""

import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import programs
import pytest
from launch import SCRIPT, launched
from programs import Program, environment
from resume_cases import lines, main, outcome, steps_in

from torchtitan_lite.checkpoint.restore import verify
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.launch.world import World

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

# Runs `action` once on the given ranks: before the function that stands for `phase`.
DRIVER = """\
import os, signal, sys, time
from torchtitan_lite import train
from torchtitan_lite.checkpoint import save
from torchtitan_lite.launch.signals import StopRequest
from torchtitan_lite.training import corpus, state
from torchtitan_lite.training.state import TrainState
from torchtitan_lite.training.step import Stepper
from torchtitan_lite.training.trainer import Trainer

rank = int(os.environ.get("RANK", "0"))
place, at = {{
    "data": ((corpus, "prepare"), 0),
    "model": ((state, "build_model"), 0),
    "first step": ((Stepper, "count_valid"), 0),
    "step": ((Stepper, "count_valid"), 2),
    "validation": ((Trainer, "_validation_loss_of"), 3),
    "save": ((save, "write_tensors"), 2),
}}["{phase}"]
sound, done, states, requests = getattr(*place), [], [], []

def wait_until_asked():
    deadline = time.monotonic() + 30
    while not requests[0].asked and time.monotonic() < deadline:
        time.sleep(0.01)

def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)
        wait_until_asked()

def install(self, **words):
    requests.append(self)
    installed(self, **words)

def act(*args, **words):
    step = states[0].step if states else 0
    if not done and step == at and rank in {ranks}:
        done.append(step)
        {action}
    return sound(*args, **words)

def build(self, *args, **words):
    states.append(self)
    self.step = 0
    built(self, *args, **words)

built, TrainState.__init__ = TrainState.__init__, build
installed, StopRequest.install = StopRequest.install, install
if __name__ == "__main__":
    setattr(*place, act)
    status = train.main(sys.argv[1:])
    open(f"status-{{rank}}", "w").write(str(status))
    sys.exit(status)
"""
TERM, USR1, INT, HUP = map(int, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP))
PHASES = {"data": 0, "model": 0, "first step": 1, "step": 3, "validation": 3, "save": 2}
"""The phases in which a signal arrives, and the step that the run then saves."""
SAVES = (
    *("--checkpoint.enable", "--checkpoint.interval", "2"),
    *("--training.global-batch-size", "8", "--lr-scheduler.total-steps", "5"),
    *("--validation.enable", "--validation.freq", "3", "--data.validation-fraction", "0.2"),
)


def drive(
    folder: Path, phase: str, action: str, small_run: list[str], ranks: tuple[int, ...]
) -> list[object]:
    """The command line of a run in which `ranks` do `action` in `phase`."""
    (folder / "driver.py").write_text(DRIVER.format(phase=phase, action=action, ranks=ranks))
    return ["driver.py", *small_run, *SAVES]


def statuses(folder: Path) -> dict[str, str]:
    """The exit status that train.main returned on each rank."""
    return {path.name: path.read_text() for path in folder.glob("status-*")}


def check_stopped(folder: Path, number: int, step: int, n_ranks: int) -> None:
    """Check that all ranks stopped with status 75 after `step`, and that this step is saved and undamaged."""
    assert statuses(folder) == {f"status-{rank}": "75" for rank in range(n_ranks)}
    left = outcome(folder / "run")
    assert (left["status"], left["outcome"], left["step"]) == (75, "stopped", step)
    message = left["message"]
    assert message in (
        f"asked to stop by {signal.Signals(number).name}",
        "asked to stop by a signal to another rank",
    )
    steps = Steps(folder / "run" / "checkpoint")
    assert steps.published()[-1] == step
    found = verify(steps.path(step), World())
    assert (found.state.step, found.state.consumed_samples) == (step, 8 * step)
    assert found.manifest.made["mesh"]["ranks"] == n_ranks


def check_goes_on(folder: Path, small_run: list[str]) -> None:
    """Check that the next start, here on one rank, runs each step that is left exactly once."""
    assert main(*small_run, *SAVES, "--training.local-batch-size", 8) == 0
    found = [("loss" in line, line["step"]) for line in lines(folder / "run")]
    assert sorted(step for is_trained, step in found if is_trained) == [1, 2, 3, 4, 5]
    assert sorted(step for is_trained, step in found if not is_trained) == [0, 3, 5]
    assert [step for _, step in found] == sorted(step for _, step in found)
    assert outcome(folder / "run") == {"status": 0, "outcome": "done", "step": 5, "message": ""}
    assert all(
        name == "latest" or (name.startswith("step-") and ".tmp" not in name)
        for name in steps_in(folder / "run")
    )


FAST = [
    ("data", USR1, (0, 1)),
    ("first step", TERM, (0,)),
    ("validation", TERM, (1,)),
    ("save", USR1, (0, 1)),
]
SLOW = [("step", USR1, (1,)), *((phase, number, (0, 1)) for phase in PHASES for number in (TERM, USR1))]


@pytest.mark.parametrize(
    ("phase", "number", "signalled"),
    [*FAST, *(pytest.param(*words, marks=pytest.mark.slow) for words in SLOW if words not in FAST)],
)
def test_two_ranks_save_the_same_step_whoever_is_signalled(
    phase: str, number: int, signalled: tuple[int, ...], small_run, tmp_path: Path
) -> None:
    with launched(tmp_path, *drive(tmp_path, phase, f"send({number})", small_run, signalled)) as run:
        assert run.wait() == 1  # torchrun's own
        assert run.left() == []
    assert run.err.count("exitcode  : 75 ") == 2
    assert "Traceback" not in run.of_ranks()
    check_stopped(tmp_path, number, PHASES[phase], 2)
    assert (0 in signalled) == (outcome(tmp_path / "run")["message"] == f"asked to stop by {name(number)}")
    check_goes_on(tmp_path, small_run)


def name(number: int) -> str:
    return signal.Signals(number).name


@pytest.mark.parametrize(
    "number", [INT, *(pytest.param(number, marks=pytest.mark.slow) for number in (TERM, USR1, HUP))]
)
def test_a_signal_to_the_launcher_stops_both_ranks_and_its_status_is_75(
    number: int, small_run, tmp_path: Path
) -> None:
    # In its third step, rank 0 signals the launcher, which passes the signal on.
    words = drive(tmp_path, "step", f"os.kill(os.getppid(), {number}); wait_until_asked()", small_run, (0,))
    with launched(tmp_path, *words, program=("-m", "torchtitan_lite.cli", "launch")) as run:
        assert run.wait() == 75, run.err
        assert run.left() == []
    check_stopped(tmp_path, number, 3, 2)
    assert outcome(tmp_path / "run")["message"] == f"asked to stop by {name(number)}"


Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path, small_run) -> Iterator[Start]:
    """`start("step", action, ...)` starts a run of one process, and kills it at the end of the test.

    The process is in a process group of its own.
    """
    started: list[Program] = []

    def start(phase: str, action: str, *more: object) -> Program:
        words = [*drive(tmp_path, phase, action, small_run, (0,)), "--training.local-batch-size", 8, *more]
        variables = environment(PYTHONUNBUFFERED="1")
        started.append(Program(words, cwd=tmp_path, env=variables, start_new_session=True))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("step", TERM),
        ("data", HUP),
        ("save", INT),
        *(
            pytest.param(phase, number, marks=pytest.mark.slow)
            for phase in PHASES
            for number in (TERM, USR1)
            if (phase, number) != ("step", TERM)
        ),
    ],
)
def test_a_run_of_one_process_saves_and_stops(
    phase: str, number: int, start: Start, small_run, tmp_path: Path
) -> None:
    status, out, err = start(phase, f"send({number})").end()
    assert status == 75, err
    check_stopped(tmp_path, number, PHASES[phase], 1)
    said = f"asked to stop by {name(number)}"
    assert f"{said}: saves and stops as soon as it can" in err
    assert f"{said}: saved step {PHASES[phase]}; go on with:\n" in out
    check_goes_on(tmp_path, small_run)


@pytest.mark.parametrize("more", [(), ("--checkpoint.load-step", 2)])
def test_the_printed_command_goes_on_in_the_folder_of_the_run(
    more: tuple[object, ...], small_run, tmp_path: Path
) -> None:
    words = drive(tmp_path, "step", f"send({TERM})", small_run, (0,))
    own = ["--job.dump-folder", str(tmp_path / "run")]
    assert words[1:3] == own  # without it the run makes a new folder
    _, *options = [word for word in words if word not in own]
    first = programs.run(["driver.py", *options, "--training.local-batch-size", 8], cwd=tmp_path)
    assert first.returncode == 75, first.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    command = command_after(first.stdout, "asked to stop by SIGTERM: saved step 3; go on with:")
    assert command[-2:] == ["--job.dump-folder", str(folder)]
    if more:  # stop again, in a run that went back to step 2: the next start must not go back once more
        moved = folder.rename(tmp_path / "moved")
        again = ["driver.py", *options, "--training.local-batch-size", 8, *more, "--job.dump-folder", "moved"]
        second = programs.run(again, cwd=tmp_path)
        assert second.returncode == 75, second.stderr
        command, folder = command_after(second.stdout, "saved step 3; go on with:"), moved
    last = programs.run(command[1:], cwd=tmp_path)
    assert last.returncode == 0, last.stderr
    assert f"goes on from step 3 in {folder / 'checkpoint' / 'step-3'}" in last.stdout
    assert outcome(folder)["step"] == 5
    assert not (tmp_path / "outputs").exists() or len(list((tmp_path / "outputs").iterdir())) <= 1


def command_after(out: str, line: str) -> list[str]:
    """The words of the command below a line that ends with `line`."""
    lines = out.splitlines()
    (place,) = (number for number, shown in enumerate(lines) if shown.endswith(line))
    return shlex.split(lines[place + 1])


@pytest.mark.slow
def test_the_printed_command_of_two_ranks_starts_both(small_run, tmp_path: Path) -> None:
    words = drive(tmp_path, "step", f"send({TERM})", small_run[2:], (0, 1))
    options = ["--checkpoint.keep-latest-k", 3]
    launcher = [sys.executable, "-m", "torchtitan_lite.cli", "launch", "--standalone", "--nproc_per_node", 2]
    first = programs.run([*launcher[1:], *words, *options], fresh=True, cwd=tmp_path)
    assert first.returncode == 75, first.stderr
    (folder,) = (tmp_path / "outputs").iterdir()
    command = command_after(first.stdout, "saved step 3; go on with:")
    assert command == [*map(str, [*launcher, *words, *options]), "--job.dump-folder", str(folder)]
    shutil.copy(SCRIPT, tmp_path / "driver.py")  # without the signal
    subprocess.run(shlex.join(command), shell=True, check=True, cwd=tmp_path)
    assert outcome(folder)["step"] == 5


@pytest.mark.parametrize(
    ("number", "phase", "more"),
    [
        pytest.param(TERM, "step", (), id="data thread"),
        pytest.param(
            INT,
            "first step",
            ("--compile.enable",),
            marks=(pytest.mark.slow, pytest.mark.compiler),
            id="compiler",
        ),
    ],
)
def test_a_signal_to_the_process_group_does_not_end_what_the_run_has_started(
    number: int, phase: str, more: tuple[object, ...], start: Start, tmp_path: Path
) -> None:
    # Kubernetes signals the whole process group, and so does a terminal at Ctrl-C.
    status, _, err = start(phase, f"os.killpg(0, {number}); wait_until_asked()", *more).end()
    assert status == 75, err
    assert "Traceback" not in err and "worker" not in err
    check_stopped(tmp_path, number, PHASES[phase], 1)


@pytest.mark.parametrize(("second", "status"), [(TERM, 143), (INT, 130)])
def test_a_second_signal_ends_the_run_at_once_and_earlier_steps_stay(
    second: int, status: int, start: Start, small_run, tmp_path: Path
) -> None:
    # The signals arrive while step 4 is written. Step 2 is published already.
    hold = f"send({TERM}, {second}); time.sleep(1000)"
    found, _, err = start("save", f"None\n    if step == 4:\n        {hold}").end()
    assert found == status, err
    assert err.endswith("asked again: ending at once\n")
    left = outcome(tmp_path / "run")
    outcome_then = "interrupted" if second == INT else "terminated"
    assert (left["status"], left["outcome"], left["step"]) == (status, outcome_then, 4)
    steps = Steps(tmp_path / "run" / "checkpoint")
    assert steps.published() == [2]
    assert verify(steps.path(2), World()).state.step == 2
    assert any(".tmp-" in name for name in steps_in(tmp_path / "run"))
    check_goes_on(tmp_path, small_run)


def test_a_rank_is_killed_while_it_saves_and_earlier_steps_stay(small_run, tmp_path: Path) -> None:
    kill = "None\n    if step == 4 and rank == 1:\n        os.kill(os.getpid(), signal.SIGKILL)"
    with launched(tmp_path, *drive(tmp_path, "save", kill, small_run, (0, 1))) as run:
        assert run.wait() == 1
        assert run.left() == []
    assert outcome(tmp_path / "run")["message"] == "rank 1 no longer answers"
    steps = Steps(tmp_path / "run" / "checkpoint")
    assert steps.published() == [2] and verify(steps.path(2), World()).state.step == 2
    check_goes_on(tmp_path, small_run)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_rank_is_killed_in_a_step_and_the_run_goes_on_from_the_last_save(
    mode: str, small_run, tmp_path: Path
) -> None:
    kill = (
        "None\n    if step == 3 and rank == 1:"
        "\n        while not os.path.isdir('run/checkpoint/step-2'): time.sleep(0.01)"
        "\n        os.kill(os.getpid(), signal.SIGKILL)"
    )
    words = drive(tmp_path, "step", kill, small_run, (0, 1))
    with launched(tmp_path, *words, "--checkpoint.async-mode", mode) as run:
        assert run.wait() == 1
        assert run.left() == []
    assert (outcome(tmp_path / "run")["outcome"], outcome(tmp_path / "run")["step"]) == ("failed", 3)
    assert Steps(tmp_path / "run" / "checkpoint").published() == [2]
    check_goes_on(tmp_path, small_run)
