"""The command lines that a run prints start the same program again."""

import sys
from pathlib import Path
from types import SimpleNamespace

import programs
import pytest

from torchtitan_lite.launch import command

PACKAGE = Path(command.__file__).parents[1]
ARGV = ["--training.steps", "4"]


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize(
    "before",
    [
        ["python", "torchtitan_lite/train.py"],
        ["python3", "-u", "-m", "torchtitan_lite.train"],
        ["/venv/bin/python", "/venv/bin/torchtitan-lite", "train"],
        ["python", "-c", "import sys; from torchtitan_lite import train; train.main(sys.argv[1:])"],
    ],
)
@pytest.mark.parametrize("argv", [ARGV, []])
def test_the_words_are_those_that_started_the_process(
    before: list[str], argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", [*before, *argv])
    assert command.again(argv) == [sys.executable, *before[1:], *argv]


def test_a_program_that_trains_with_options_of_its_own_gets_the_words_of_the_trainer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "mine.py", "--sweep"])
    assert command.again(ARGV) == [sys.executable, str(PACKAGE / "train.py"), *ARGV]


def launcher_with(words: list[str], monkeypatch: pytest.MonkeyPatch, machines: int = 1) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("GROUP_WORLD_SIZE", str(machines))
    monkeypatch.setattr(command, "_words_of_parent", lambda: words)


@pytest.mark.parametrize(
    "before",
    [
        ["/venv/bin/python", "-m", "torch.distributed.run", "--standalone", "train.py"],
        ["mpirun", "-np", "2", "python", "-m", "torchtitan_lite.train"],
    ],
)
def test_under_a_launcher_the_words_are_those_of_the_launcher(
    before: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher_with([*before, *ARGV], monkeypatch)
    assert command.again(ARGV) == [*before, *ARGV]


@pytest.mark.parametrize(
    ("words", "machines"), [(["slurmstepd: [1.0]"], 1), ([], 1), (["python", "train.py", *ARGV], 2)]
)
def test_where_the_words_are_not_known_there_are_none(
    words: list[str], machines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher_with(words, monkeypatch, machines)
    assert command.again(ARGV) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_words_of_the_parent_are_read_as_they_were_given(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "own = 'from torchtitan_lite.launch import command; print(command._words_of_parent())'\n"
        "subprocess.run([sys.executable, '-c', own])"
    )
    done = programs.run(["-c", code, "two words", ""], fresh=True, cwd=tmp_path)
    assert done.stdout == f"{[sys.executable, '-c', code, 'two words', '']}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_words_of_a_parent_that_is_not_python_are_unknown(tmp_path: Path) -> None:
    own = "from torchtitan_lite.launch import command; print(command._words_of_parent())"
    # Like mpirun, this shell stays the parent: a second command follows.
    words = f"['sh', '-c', '\"$@\"; true', 'sh', {sys.executable!r}, *sys.argv[1:]]"
    code = f"import subprocess, sys; subprocess.run({words})"
    done = programs.run(["-c", code, "-c", own, *ARGV], fresh=True, cwd=tmp_path)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("needs_modules", [True, False])
@pytest.mark.parametrize("is_module", [True, False])
def test_modules_of_the_working_directory_are_found_as_in_training(
    needs_modules: bool, is_module: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = SimpleNamespace(__spec__=SimpleNamespace() if is_module else None)
    monkeypatch.setitem(sys.modules, "__main__", main)
    by_module = needs_modules and is_module
    words = ["-m", "torchtitan_lite"] if by_module else [str(PACKAGE / "cli.py")]
    assert command.program(needs_modules) == [sys.executable, *words]
