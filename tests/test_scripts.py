"""train.sh and test.sh, in a copy of the repository, with a fake Python that only logs installs and runs."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import programs
import pytest
import tomli

ROOT = Path(__file__).parents[1]

PYTEST = "-m pytest -n auto --maxprocesses 4 --dist worksteal --durations 10"

# Runs short commands with a real Python, and only logs commands that would take minutes.
FAKE_PYTHON = f"""#!/usr/bin/env bash
log="${{FAKE_LOG:?}}"
case "$*" in
    "-m venv --clear "*) echo "venv" >>"$log"; rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"
        for tool in ruff basedpyright; do
            printf '#!/bin/sh\\necho "%s $*" >>"$FAKE_LOG"\\n' $tool >"$4/bin/$tool"; chmod +x "$4/bin/$tool"
        done ;;
    "-m pip install "*) echo "pip ${{*:7}}" >>"$log"
        if [[ -n ${{FAKE_PIP_FAILS:-}} ]]; then exit 1; fi ;;
    "-m pytest"*) echo "pytest $PWD $*" >>"$log" ;;
    *train.py*) echo "train $PWD" >>"$log"; printf '%s\\n' "${{@:2}}" >>"$log" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


@dataclass
class Repository:
    """A copy of the scripts in another folder."""

    root: Path
    log: Path

    def run(self, script: str, *words: str, cwd: Path | None = None, **environment: str):
        """Run a script. Returns the finished process and the lines of the fake Python's log."""
        self.log.write_text("")
        python = {"PYTHON": str(self.root.parent / "fake python"), "FAKE_LOG": str(self.log), **environment}
        done = subprocess.run(
            ["bash", str(self.root / "scripts" / script), *words],
            cwd=cwd or self.root,
            env={**os.environ, **python},
            capture_output=True,
            text=True,
            check=False,
        )
        return done, self.log.read_text().splitlines()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    root = tmp_path / "a repository"  # a space breaks careless shell scripts
    shutil.copytree(ROOT / "scripts", root / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    fake = tmp_path / "fake python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    return Repository(root, tmp_path / "log")


def installs(log: list[str]) -> list[str]:
    return [line for line in log if line.split()[0] in ("venv", "pip")]


def test_only_the_first_run_makes_the_environment_and_installs(repository: Repository) -> None:
    done, log = repository.run("train.sh")
    assert done.returncode == 0, done.stderr
    root = repository.root
    assert installs(log) == ["venv", f"pip {root}/constraints.txt --editable {root}"]
    done, log = repository.run("train.sh")
    assert (done.returncode, done.stderr, installs(log)) == (0, "", [])


def test_training_gets_the_debug_config_and_then_the_arguments_unchanged(repository: Repository) -> None:
    words = ("--model.overrides", '{"n_layers": 2}', "--job.description", "two  words")
    _, log = repository.run("train.sh", *words)
    start = log.index(f"train {repository.root}")
    assert log[start + 1 :] == ["--config", f"{repository.root}/configs/debugmodel.toml", *words]


def test_train_runs_in_the_working_directory_however_the_script_is_named(repository: Repository) -> None:
    folder = repository.root / "elsewhere"
    folder.mkdir()
    done, log = repository.run("train.sh", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"train {folder}" in log
    environment = {**os.environ, "FAKE_LOG": str(repository.log), "CDPATH": "/"}
    subprocess.run(["bash", "train.sh"], cwd=repository.root / "scripts", env=environment, check=True)
    assert f"train {repository.root}/scripts" in repository.log.read_text().splitlines()


def test_test_installs_the_tools_and_runs_lint_types_and_tests_in_turn(repository: Repository) -> None:
    done, log = repository.run("test.sh", "-k", "one or two", cwd=repository.root / "scripts")
    assert done.returncode == 0, done.stderr
    root = repository.root
    assert log == [
        "venv",
        f"pip {root}/constraints.txt --editable {root}[dev]",
        "ruff check .",
        "ruff format --check .",
        "basedpyright ",
        f"pytest {root} {PYTEST} -m not slow -k one or two",
    ]


def test_all_is_an_option_of_the_script_and_not_passed_to_pytest(repository: Repository) -> None:
    _, log = repository.run("test.sh", "-x", "--all", "tests/data")
    assert log[-1] == f"pytest {repository.root} {PYTEST} -m  -x tests/data"


def test_test_stops_when_lint_fails(repository: Repository) -> None:
    repository.run("test.sh")
    ruff = repository.root / ".venv" / "bin" / "ruff"
    ruff.write_text("#!/bin/sh\nexit 3\n")
    done, log = repository.run("test.sh")
    assert (done.returncode, log) == (3, [])


def test_the_environment_of_the_tests_serves_a_run_but_not_the_other_way_round(
    repository: Repository,
) -> None:
    repository.run("train.sh")
    assert len(installs(repository.run("test.sh")[1])) == 1
    assert installs(repository.run("train.sh")[1]) == []
    assert installs(repository.run("test.sh")[1]) == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_change_of_the_requirements_installs_again_into_the_same_environment(
    repository: Repository, name: str
) -> None:
    repository.run("train.sh")
    with (repository.root / name).open("a") as file:
        file.write("# changed\n")
    _, log = repository.run("train.sh")
    assert [line.split()[0] for line in installs(log)] == ["pip"]


def test_a_moved_repository_is_installed_again(repository: Repository) -> None:
    repository.run("train.sh")
    moved = repository.root.rename(repository.root.with_name("moved"))
    _, log = Repository(moved, repository.log).run("train.sh")
    assert len(installs(log)) == 1


def test_after_a_failed_install_the_environment_is_made_again(repository: Repository) -> None:
    done, log = repository.run("train.sh", FAKE_PIP_FAILS="1")
    assert done.returncode == 1
    assert not any(line.startswith("train") for line in log)
    done, log = repository.run("train.sh")
    assert done.returncode == 0
    assert [line.split()[0] for line in installs(log)] == ["venv", "pip"]


def test_a_broken_environment_is_made_again(repository: Repository) -> None:
    bin = repository.root / ".venv" / "bin"
    bin.mkdir(parents=True)
    (bin / "python").write_text("#!/bin/sh\nexit 1\n")
    (bin / "python").chmod(0o755)
    done, log = repository.run("train.sh")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in installs(log)] == ["venv", "pip"]


def test_two_first_runs_at_once_install_once(repository: Repository) -> None:
    environment = {"PYTHON": str(repository.root.parent / "fake python"), "FAKE_LOG": str(repository.log)}
    command = ["bash", str(repository.root / "scripts" / "train.sh")]
    start: Callable = lambda: subprocess.Popen(
        command, env={**os.environ, **environment}, stderr=subprocess.DEVNULL
    )
    assert [process.wait() for process in [start(), start(), start()]] == [0, 0, 0]
    log = repository.log.read_text().splitlines()
    assert len(installs(log)) == 2
    assert sum(line.startswith("train") for line in log) == 3


def test_the_error_for_an_unusable_python_names_it_and_the_requirements(repository: Repository) -> None:
    old = repository.root.parent / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done, log = repository.run("train.sh", PYTHON=str(old))
    assert done.returncode == 1
    assert str(old) in done.stderr and "3.11, 3.12 or 3.13" in done.stderr
    assert log == []


def test_a_python_on_path_that_does_not_run_is_skipped(repository: Repository, tmp_path: Path) -> None:
    shims = tmp_path / "shims"
    shims.mkdir()
    for name in ("python3.13", "python3.12"):
        (shims / name).write_text("#!/bin/sh\necho not installed >&2\nexit 127\n")
        (shims / name).chmod(0o755)
    shutil.copy(tmp_path / "fake python", shims / "python3.11")
    path = f"{shims}:{os.environ['PATH']}"
    done, log = repository.run("train.sh", PYTHON="", PATH=path)
    assert done.returncode == 0, done.stderr
    assert installs(log)[0] == "venv"


def test_ci_runs_all_tests() -> None:
    (*_, command) = (ROOT / ".ci" / "run").read_text().splitlines()
    assert command.startswith("exec bash ") and command.endswith('scripts/test.sh" --all')


def test_the_constraints_pin_every_dependency_to_one_version() -> None:
    project = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = {*project["dependencies"], *extras["dev"], *extras["hf"]} - {"torchtitan_lite[hf]"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    assert pins["torch"] == "2.13.0"
    assert {re.split("[<>=]", line)[0] for line in needed} <= pins.keys()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        pytest.param(("-n", 0), True, id="in one process"),
        pytest.param(("-n", 1), True, id="in a worker", marks=pytest.mark.slow),  # which imports torch
        pytest.param(("-n", 0, "-m", "slow or not slow"), False, id="with the slow ones"),
    ],
)
def test_the_end_says_how_many_slow_tests_were_left_out(tmp_path: Path, words, said: bool) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_quick(): pass\n"
        "@pytest.mark.slow\n"
        "@pytest.mark.parametrize('case', [1, 2])\n"
        "def test_slow(case): pass\n"
    )
    ours = ["-p", "conftest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-p", "no:cacheprovider"]
    environment = programs.environment(PYTHONPATH=str(ROOT / "tests"))
    done = programs.run(["-m", "pytest", *ours, *words, tmp_path], env=environment)
    line = "2 slow tests were left out; to run them too: ./scripts/test.sh --all"
    assert (done.returncode, line in done.stdout.splitlines()) == (0, said)
