"""A rank fails, dies or hangs: the run ends soon, that rank is named first, and nothing is left behind."""

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from launch import DEEP, Launched, launched, launched_on_two_nodes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

WRONG = """\
import ctypes, os, signal, sys, time
from torchtitan_lite import train
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.launch import guard
from torchtitan_lite.training.step import Stepper
from torchtitan_lite.training.trainer import Trainer

place = Trainer if sys.argv[1] == "__init__" else Stepper
sound, rank = getattr(place, sys.argv[1]), int(os.environ["RANK"])

def signalled_on_the_way_out(number):
    sound, left = guard.end_of, [number]

    def end_of(*words):
        while left:
            os.kill(os.getpid(), left.pop())
        return sound(*words)

    guard.end_of = end_of

def wrong(self, *args, **words):
    if int(sys.argv[2]) in (rank, -1) and (place is Trainer or self.state.step == 2):
        {action}
    return sound(self, *args, **words)

setattr(place, sys.argv[1], wrong)
guard._SILENCE, guard._GRACE = 2.0, 3.0  # instead of 3 and 6 seconds
sys.exit(train.main(sys.argv[3:]))
"""
SAY = "os.write(1, b'\\n%d\\n' % os.getpid())"
"""A process id on its own line: ranks of torchrun do not buffer, and rank 0 may be in the middle of one."""
TIMEOUTS = ("--comm.init-timeout-seconds", 100, "--comm.train-timeout-seconds", 100)
SOON = ("--comm.train-timeout-seconds", 5)


HOOKED = """\
from dataclasses import dataclass
from typing import Literal

from torchtitan_lite.registry import hooks


@hooks.register
@dataclass(frozen=True, kw_only=True)
class Mine:
    name: Literal["mine"] = "mine"

    def build(self, run):
        return self if run.rank == 0 else None

    def step(self, stats):
        1 / (stats.step - 2)
"""


def wrong_run(folder: Path, action: str, where: str, rank: int, options: Sequence[str]) -> list[object]:
    """The words of a run in which `rank` (-1: each) does `action` in its third step.

    In a method of the step: by `reduce_and_clip` the ranks have met, so that all are in their third step.
    Or as the trainer is built, where `where` is `__init__`.
    """
    (folder / "wrong.py").write_text(WRONG.format(action=action))
    return ["wrong.py", where, rank, *options, *TIMEOUTS]


@pytest.fixture
def wrong(tmp_path: Path, small_run):
    """`wrong(action, rank=1)` starts a run that goes wrong."""

    def start(
        action: str,
        *options: object,
        rank: int = 1,
        where: str = "reduce_and_clip",
        processes: int = 2,
        fresh: bool = False,
    ) -> AbstractContextManager[Launched]:
        words = wrong_run(tmp_path, action, where, rank, small_run)
        return launched(tmp_path, *words, *options, processes=processes, fresh=fresh)

    return start


def outcome(folder: Path) -> dict:
    return json.loads((folder / "run" / "exit.json").read_text())


@pytest.mark.parametrize(("rank", "processes", "fresh"), [(1, 3, False), (0, 2, True)])
def test_an_exception_is_shown_once_and_first_and_the_others_say_a_line(
    rank: int, processes: int, fresh: bool, wrong, tmp_path: Path
) -> None:
    with wrong("1 / 0", rank=rank, processes=processes, fresh=fresh) as run:
        assert run.wait() == 1
        assert run.left() == []
    said = run.of_ranks().splitlines()
    assert said[:2] == [f"rank {rank} failed:", "Traceback (most recent call last):"]
    end = said.index("ZeroDivisionError: division by zero")
    others = [other for other in range(processes) if other != rank]
    cause = f"rank {rank} failed: ZeroDivisionError: division by zero"
    assert sorted(said[end + 1 :]) == [f"rank {other} stopped: {cause}" for other in others]
    assert run.of_ranks().count("Traceback") == 1
    assert outcome(tmp_path) == {"status": 1, "outcome": "failed", "step": 2, "message": cause}
    root = run.err.partition("Root Cause")[2]
    assert f"rank      : {rank} " in root and cause in root


def test_a_hook_that_fails_on_one_rank_ends_all_with_its_name(small_run, tmp_path: Path) -> None:
    (tmp_path / "hooked.py").write_text(HOOKED)
    options = [*small_run, *TIMEOUTS, "--job.plugins", "hooked"]
    with launched(tmp_path, "-m", "torchtitan_lite.train", *options, processes=2) as run:
        assert run.wait() == 1
        assert run.left() == []
    said = run.of_ranks().splitlines()
    cause = 'hook "mine" failed in step(): ZeroDivisionError: division by zero'
    assert said[0] == "rank 0 failed:"
    assert said[-1] == f"rank 1 stopped: rank 0 failed: HookFailed: {cause}"
    assert outcome(tmp_path)["message"] == f"rank 0 failed: HookFailed: {cause}"


def test_before_the_first_step_it_is_the_same(wrong, tmp_path: Path) -> None:
    with wrong("raise KeyError('gone')", where="__init__") as run:
        assert run.wait() == 1
        assert run.left() == []
    assert run.of_ranks().splitlines()[0] == "rank 1 failed:"
    assert run.of_ranks().splitlines()[-1] == "rank 0 stopped: rank 1 failed: KeyError: 'gone'"
    assert run.of_ranks().count("Traceback") == 1
    assert outcome(tmp_path)["outcome"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_on_the_way_out_takes_nothing_from_what_is_said(number: int, wrong, tmp_path: Path) -> None:
    # A launcher sends one when the first rank is gone, which the others may have felt a moment before.
    with wrong(f"signalled_on_the_way_out({number:d}); rank and 1 / 0", rank=-1) as run:
        assert run.wait() == 1
        assert run.left() == []
    cause = "rank 1 failed: ZeroDivisionError: division by zero"
    said = run.of_ranks().splitlines()
    assert (said[0], said[-2:]) == (
        "rank 1 failed:",
        ["ZeroDivisionError: division by zero", f"rank 0 stopped: {cause}"],
    )
    assert outcome(tmp_path) == {"status": 1, "outcome": "failed", "step": 2, "message": cause}


def test_a_signal_on_the_way_out_of_a_single_rank_takes_nothing_from_the_outcome(
    wrong, tmp_path: Path
) -> None:
    with wrong(f"signalled_on_the_way_out({signal.SIGTERM:d}); 1 / 0", rank=0, processes=1) as run:
        assert run.wait() == 1
    assert "ZeroDivisionError: division by zero" in run.err
    assert outcome(tmp_path) == {
        "status": 1,
        "outcome": "failed",
        "step": 2,
        "message": "division by zero",
    }


def test_wrong_input_found_on_one_rank_is_a_line_once_and_status_2_on_all(wrong, tmp_path: Path) -> None:
    with wrong(
        "raise ConfigError([Problem('data.path', 'x', 'is not here', 'mount it')])", where="__init__"
    ) as run:
        assert run.wait() == 1  # torchrun's own
        assert run.left() == []
    line = 'data.path = "x" is not here: mount it'
    assert run.of_ranks().splitlines() == [line]
    assert run.err.count("exitcode  : 2 ") == 2
    assert outcome(tmp_path) == {"status": 2, "outcome": "refused", "step": 0, "message": line}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_in_a_line(rank: int, wrong, tmp_path: Path) -> None:
    with wrong("os.kill(os.getpid(), signal.SIGKILL)", rank=rank) as run:
        assert run.wait() == 1
        assert run.left() == []
    cause = f"rank {rank} no longer answers"
    (line,) = run.of_ranks().splitlines()
    # The line ends with the error that this rank got: such an error must not be lost.
    assert line.startswith(f"rank {1 - rank} stopped: {cause} (rank {1 - rank} failed: ")
    assert outcome(tmp_path) == {"status": 1, "outcome": "failed", "step": 2, "message": cause}


def test_an_error_is_told_although_another_rank_is_gone(wrong, tmp_path: Path) -> None:
    # The text of the error, such as the name of a file, need not be storable.
    action = (
        "if rank:\n            raise ValueError('the reason \\udcff')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)"
    )
    with wrong(action, rank=-1) as run:
        assert run.wait() == 1
        assert run.left() == []
    assert run.of_ranks().splitlines()[-1] == "ValueError: the reason \\udcff"
    assert outcome(tmp_path)["message"] == "rank 1 failed: ValueError: the reason \\udcff"


def test_a_rank_that_hangs_says_so_within_the_timeout_with_its_stack(wrong, tmp_path: Path) -> None:
    # Ranks 0 and 3 share no group with each other: 0 waits for 1 or 2, which wait for 3.
    mesh = ("--parallelism.tensor-parallel-degree", 2)
    with wrong(f"{SAY}; time.sleep(1000)", *SOON, *mesh, rank=3, where="loss_of", processes=4) as run:
        assert run.process.stdout is not None
        assert any(line.strip().isdecimal() for line in run.process.stdout)
        start = time.monotonic()
        assert run.wait() == 1
        assert time.monotonic() - start < 5 + 40
        assert run.left() == []
    said = run.of_ranks().splitlines()
    assert said[0].startswith("rank 3 hangs: no progress for ")
    assert any("wrong.py" in line and line.endswith("in wrong") for line in said)
    others = sorted(line for line in said[1:] if not line.startswith(" "))
    assert [line.partition(" no progress")[0] for line in others] == [
        f"rank {rank} stopped: rank 3 hangs:" for rank in range(3)
    ]
    assert outcome(tmp_path)["message"].startswith("rank 3 hangs: ")
    assert "rank      : 3 " in run.err.partition("Root Cause")[2]


@pytest.mark.parametrize(
    ("action", "cause"),
    [
        ("1 / 0", "rank 1 failed: ZeroDivisionError: division by zero"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 no longer answers"),
    ],
)
def test_a_rank_deep_in_a_library_ends_too(action: str, cause: str, wrong, tmp_path: Path) -> None:
    both = f"{action} if rank == 1 else {DEEP}"
    with wrong(both, rank=-1) as run:
        assert run.wait() == 1
        assert run.left() == []
    assert "SIGKILL" not in run.err.partition("Failures:")[0]
    assert run.of_ranks().splitlines()[-1].startswith(f"rank 0 stopped: {cause}")
    assert outcome(tmp_path) == {"status": 1, "outcome": "failed", "step": 2, "message": cause}


@pytest.mark.parametrize(
    ("action", "cause"),
    [
        ("1 / 0", "rank 1 failed: ZeroDivisionError: division by zero"),
        (
            "os.kill(os.getppid(), signal.SIGKILL); os.kill(os.getpid(), signal.SIGKILL)",
            "rank 1 no longer answers",
        ),
    ],
    ids=["exception", "a machine lost"],
)
def test_another_machines_failure_ends_the_ranks_here(
    action: str, cause: str, small_run, tmp_path: Path
) -> None:
    words = wrong_run(tmp_path, action, "train_step", 1, small_run)
    with launched_on_two_nodes(tmp_path, *words) as (first, second):
        assert [first.wait() != 0, second.wait() != 0] == [True, True]
        assert first.left() + second.left() == []
    (line,) = first.of_ranks().splitlines()
    assert line.startswith(f"rank 0 stopped: {cause}")
    assert outcome(tmp_path)["message"] == cause


@pytest.mark.parametrize("by", ["the test", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_within_the_timeout(by: str, wrong, tmp_path: Path) -> None:
    with wrong(f"{SAY}; os.kill(os.getpid(), signal.SIGSTOP)", *SOON) as run:
        assert run.process.stdout is not None and run.process.stderr is not None
        pid = next(int(line) for line in run.process.stdout if line.strip().isdecimal())
        start, said = time.monotonic(), "rank 0 stopped: rank 1 no longer answers"
        assert any(line.startswith(said) for line in run.process.stderr)
        assert time.monotonic() - start < 5 + 40
        if by == "the test":  # torchrun takes half a minute
            os.kill(pid, signal.SIGKILL)
        assert run.wait() == 1
        assert run.left() == []
    assert run.of_ranks() == ""
    assert outcome(tmp_path)["message"] == "rank 1 no longer answers"


@pytest.mark.parametrize(
    ("number", "said", "end"),
    [(signal.SIGTERM, [], (143, "terminated")), (signal.SIGINT, ["interrupted"], (130, "interrupted"))],
)
def test_a_stopped_launcher_takes_all_ranks_with_it(number: int, said, end, wrong, tmp_path: Path) -> None:
    with wrong("print('now', flush=True); time.sleep(1000)", rank=0) as run:
        assert run.process.stdout is not None
        assert any(line == "now\n" for line in run.process.stdout)
        run.process.send_signal(number)
        assert run.wait() != 0
        assert run.left() == []
    assert run.of_ranks().splitlines() == said
    assert (outcome(tmp_path)["status"], outcome(tmp_path)["outcome"]) == end


def test_a_killed_launcher_leaves_no_ranks(wrong, tmp_path: Path) -> None:
    with wrong("os.kill(os.getppid(), signal.SIGKILL); time.sleep(1000)") as run:
        run.wait()
        assert run.left(within=20) == []
    # torch itself may say at length that the store is gone, if it goes in the middle of a look into it.
    said = {line for line in run.of_ranks().splitlines() if line.startswith("rank ")}
    assert said <= {f"rank {rank} stopped: the launcher no longer answers" for rank in (0, 1)}
    assert "Traceback" not in run.of_ranks()
    assert outcome(tmp_path)["message"] == "the launcher no longer answers"
