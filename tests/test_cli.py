"""The command `torchtitan-lite`."""

import re

import pytest

from torchtitan_lite import cli
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


def test_train_takes_the_trainers_options(capsys) -> None:
    assert cli.main(["train", "--training.steps", "7", "--dry-run"]) == 0
    assert "steps = 7" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_command(flag: str, capsys) -> None:
    assert cli.main([flag]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in ("train", "models", "attention"))


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["trian"], 'torchtitan-lite trian is not a command: did you mean "train"?'),
        (["models", "-v"], "torchtitan-lite models takes no option but --plugins: leave out -v"),
    ],
)
def test_a_wrong_command_prints_one_line_and_has_status_2(argv: list[str], line: str, capsys) -> None:
    assert cli.main(argv) == 2
    assert capsys.readouterr() == ("", f"{line}\n")


def test_without_a_command_the_usage_is_printed_as_an_error(capsys) -> None:
    assert cli.main([]) == 2
    assert capsys.readouterr().err == cli.USAGE
