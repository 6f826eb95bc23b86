"""Training with torchrun on several ranks gives the numbers of one rank, and one set of files."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli
from launch import SCRIPT, launched, launched_on_two_nodes
from programs import Program, environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

# The same number of samples in each step on one rank and on two.
SAME = ("--training.global-batch-size", 8, "--validation.enable", "--validation.steps", -1)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(folder: Path) -> list[float]:
    """The logged numbers that must not depend on the number of ranks, in order."""
    names = ("step", "loss", "grad_norm", "lr", "n_tokens_seen", "validation_loss")
    return [line[name] for line in lines(folder) for name in names if name in line]


def check(out: list[str], folder: Path, alone: Path) -> None:
    """Check the output and the files of a run against the run on one rank in `alone`."""
    assert numbers(folder) == pytest.approx(numbers(alone), rel=1e-5)
    assert json.loads((folder / "exit.json").read_text())["outcome"] == "done"
    assert tomli.loads((folder / "config.toml").read_text())["training"]["global_batch_size"] == 8
    reports = [line.split() for line in out if re.match(r"\d\d:\d\d:\d\d ", line)]
    assert [words[1] for words in reports if "validation" not in words] == ["1", "2", "3", "4", "5"]
    assert [line for line in out if line.startswith("Files: ")] == [f"Files: {folder}"]


@pytest.fixture
def alone(run, small_run, tmp_path: Path) -> Path:
    """The folder of a finished run on one rank."""
    folder = tmp_path / "alone"
    done = run(SCRIPT, *small_run, *SAME, "--job.dump-folder", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_ranks_and_two_nodes_train_like_one_rank(alone: Path, small_run, tmp_path: Path) -> None:
    words = (SCRIPT, *small_run, *SAME)
    with launched(
        tmp_path, *words, "--profiling.enable-profiling", "--profiling.profile-freq", 5, fresh=True
    ) as run:
        assert run.wait() == 0, run.err
        assert run.left() == []
    assert run.of_ranks() == ""
    folder = tmp_path / "run"
    check(run.out.splitlines(), folder, alone)
    assert {path.name for path in folder.iterdir()} == {
        "config.toml",
        "exit.json",
        "lock",
        "log.txt",
        "metrics.jsonl",
        "run.json",
        "profile_traces",
    }
    facts = json.loads((folder / "run.json").read_text())
    assert facts["ranks"] == sum(facts["devices"].values()) == facts["ranks_on_hosts"][facts["host"]] == 2
    traces = {path.name for path in (folder / "profile_traces").iterdir()}
    assert traces == {"step-5-rank-0.json", "step-5-rank-1.json"}

    folder = tmp_path / "nodes"
    with launched_on_two_nodes(tmp_path, *words, "--job.dump-folder", folder) as (first, second):
        assert [first.wait(), second.wait()] == [0, 0], first.err + second.err
        assert first.left() + second.left() == []
    check(first.out.splitlines(), folder, alone)
    assert second.out == ""
    files = {"config.toml", "exit.json", "lock", "log.txt", "metrics.jsonl", "run.json"}
    assert {path.name for path in folder.iterdir()} == files


SRUN = {
    "SLURM_JOB_ID": str(os.getpid()),  # another test run beside this one meets at another port
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1",
}


@pytest.fixture
def tasks(tmp_path: Path) -> Iterator[Callable[..., list[Program]]]:
    """`tasks(*words, **variables)` starts two processes as srun does, and kills them at the end."""
    started: list[Program] = []

    def start(*words: object, **variables: str) -> list[Program]:
        for rank in ("0", "1"):
            own = environment(**{**SRUN, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, **variables})
            started.append(Program(words, cwd=tmp_path, env=own))
        return started

    yield start
    for one in started:
        one.kill()
        one.communicate()


def test_two_tasks_of_srun_train_like_one_rank(alone: Path, small_run, tasks, tmp_path: Path) -> None:
    first, second = tasks(SCRIPT, *small_run, *SAME)
    status, out, err = first.end()
    assert (status, second.end()) == (0, (0, "", "")), err
    check(out.splitlines(), tmp_path / "run", alone)


def test_tasks_that_cannot_meet_are_refused_once_and_touch_nothing(small_run, tasks, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text("of an earlier run")
    first, second = tasks(SCRIPT, *small_run, SLURM_STEP_NUM_NODES="2")
    status, out, err = first.end()
    assert (status, out) == (2, "")
    assert re.fullmatch(
        r"SLURM_STEP_NUM_TASKS = 2 means that .* torchrun --nnodes 2 --nproc_per_node 1 .*\n", err
    )
    assert second.end() == (2, "", "")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["exit.json"]
    assert (tmp_path / "run" / "exit.json").read_text() == "of an earlier run"


def test_a_batch_script_without_srun_trains_alone_and_a_line_says_so(run, small_run) -> None:
    done = run(SCRIPT, *small_run, SLURM_JOB_ID="1", SLURM_NTASKS="8", SLURM_PROCID="0")
    assert done.returncode == 0
    assert done.stderr.count("SLURM_NTASKS = 8, but this process is the only one") == 1


@pytest.mark.parametrize("option", ["--dry-run", "--help"])
def test_what_trains_nothing_needs_no_address(option: str, run, small_run) -> None:
    done = run(SCRIPT, *small_run, option, SLURM_NTASKS="2", SLURM_PROCID="1")
    assert (done.returncode, done.stderr) == (0, "")


def test_wrong_input_is_reported_in_one_line_although_every_rank_finds_it(small_run, tmp_path: Path) -> None:
    words = ("--parallelism.data-parallel-shard-degree", 3)
    with launched(tmp_path, SCRIPT, *small_run, *words) as run:
        assert run.wait() == 1
        assert run.left() == []
    (line,) = run.of_ranks().splitlines()
    assert line.startswith("WORLD_SIZE = 2 ")
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["message"] == line


def test_all_ranks_end_with_status_2_if_rank_0_cannot_make_the_folder(small_run, tmp_path: Path) -> None:
    with launched(tmp_path, SCRIPT, *small_run, "--job.dump-folder", "/proc/here") as run:
        assert run.wait() == 1
        assert run.left() == []
    (line,) = run.of_ranks().splitlines()
    assert line.startswith('job.dump_folder = "/proc/here" cannot be written (')
    assert run.err.count("exitcode  : 2 ") == 2
