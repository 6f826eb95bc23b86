"""The command `torchtitan-lite`."""

import platform
import re
from importlib import metadata
from pathlib import Path

import plugin_cases
import programs
import pytest

import torchtitan_lite
from torchtitan_lite import cli, train
from torchtitan_lite.attention import BACKENDS, Varlen
from torchtitan_lite.models.registry import families, resolve


def test_models_lists_every_preset_with_its_parameter_count(capsys) -> None:
    assert cli.main(["models"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    listed = {(row[0], row[1]): row[2] for row in rows if row and row[0] in families}
    assert listed == {
        (name, size): f"{resolve(name, size).n_params:,}"
        for name, sizes in families.items()
        for size in sizes
    }


def test_attention_lists_every_implementation_and_the_kernel_of_varlen(capsys) -> None:
    assert cli.main(["attention"]) == 0
    shown = capsys.readouterr().out
    for backend in BACKENDS:
        for can in backend.supports:
            (line,) = re.findall(rf"^{re.escape(can.name)}  .*$", shown, re.MULTILINE)
            assert ", ".join(can.devices) in line and ", ".join(can.dtypes) in line
            assert line.endswith(can.missing() or "yes")
    assert f'"{Varlen().resolve("cuda" if "on cuda" in shown else "cpu")}"' in shown.splitlines()[-1]
    for words in ("head_dim: multiple of 8, up to 256", "deterministic: no", 'pip install "flash-attn>=2.7"'):
        assert words in " ".join(shown.split())


def test_the_listing_of_attention_fits_a_hundred_columns(
    capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["attention"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    monkeypatch.chdir(tmp_path)
    name = "an implementation of attention with a long name " * 3
    Path("mine.py").write_text(plugin_cases.ALL.replace('name="plain"', f'name="{name}"'))
    with plugin_cases.forgotten():
        assert cli.main(["attention", "--plugins", "mine"]) == 0
    shown = capsys.readouterr().out
    assert name.strip() in " ".join(shown.split()) and max(map(len, shown.splitlines())) <= 100


VERSIONS = (
    f"torchtitan_lite {torchtitan_lite.__version__}, torch {metadata.version('torch')}, "
    f"Python {platform.python_version()}\n"
)


@pytest.mark.parametrize(
    "argv",
    [
        "--version",
        "train --version",
        "generate --version",
        "eval x --version",
        "models --version",
        "launch --version",
    ],
)
def test_version_names_the_versions_of_the_package_of_torch_and_of_python(argv: str, capsys) -> None:
    assert cli.main(argv.split()) == 0
    assert capsys.readouterr() == (VERSIONS, "")


def test_the_trainer_alone_tells_the_versions_too(capsys) -> None:
    assert train.main(["--training.steps", "5", "--version"]) == 0
    assert capsys.readouterr() == (VERSIONS, "")


def test_usage_and_versions_need_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from torchtitan_lite.cli import main\n"
        "for line in ('--help', '-h', 'help', '--version', 'train --version', '', 'x'): main(line.split())\n"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    done = programs.run(["-c", code], fresh=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count(VERSIONS) == 2, done.stderr


@pytest.mark.parametrize("module", ["torchtitan_lite", "torchtitan_lite.cli"])
def test_the_package_runs_as_a_module(module: str, tmp_path: Path) -> None:
    done = programs.run(["-m", module, "help"], fresh=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, cli.USAGE, "")


@pytest.mark.parametrize("command", [*cli.TRAINED, *cli.LISTINGS, "train"])
def test_help_of_a_command_is_its_help(command: str, capsys) -> None:
    shown = []
    for argv in (["help", command], [command, "--help"], [command, "-h"]):
        assert cli.main(argv) == 0
        shown.append(capsys.readouterr())
    assert shown[0] == shown[1] == shown[2]
    assert shown[0].out.startswith(f"usage: torchtitan-lite {command} ") and shown[0].err == ""
    usage = shown[0].out.partition("\n")[0]
    assert ("RUN_OR_STEP" in usage) == (command in ("generate", "eval", "export-hf"))
    assert ("--out DIR" in usage) == (command in ("export-hf", "import-hf"))
    assert ("--dry-run" in shown[0].out) == ("--config" in shown[0].out) == (command == "train")


def test_train_takes_the_trainers_options(capsys) -> None:
    assert cli.main(["train", "--training.steps", "7", "--dry-run"]) == 0
    assert "steps = 7" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["-h", "--help", "help"])
def test_help_names_every_command(flag: str, capsys) -> None:
    assert cli.main([flag]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in ("train", "models", "attention", "help"))


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["trian"], 'torchtitan-lite trian is not a command: did you mean "train"?'),
        (["help", "trian"], 'torchtitan-lite trian is not a command: did you mean "train"?'),
        (["version"], 'torchtitan-lite version is not a command: did you mean "--version"?'),
        (["models", "--plugins=[]", "--dry-run"], "--dry-run is for training: leave it out"),
        (["models", "-v"], "torchtitan-lite models takes no option but --plugins: leave out -v"),
    ],
)
def test_a_wrong_command_prints_one_line_and_has_status_2(argv: list[str], line: str, capsys) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr() == ("", f"{line}\n")


def test_without_a_command_the_usage_is_printed_as_an_error(capsys) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().err == cli.USAGE


def test_the_usage_fits_a_terminal() -> None:
    assert max(map(len, cli.USAGE.splitlines())) <= 78
