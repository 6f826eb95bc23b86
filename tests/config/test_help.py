"""What `--help` prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import plugin_cases
import pytest

from torchtitan_lite import registry
from torchtitan_lite.attention import BACKENDS
from torchtitan_lite.cli import main
from torchtitan_lite.config.job import JobConfig, load_job
from torchtitan_lite.config.schema import leaves
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.models.registry import families

KINDS = f"{{{','.join(backend.kind for backend in BACKENDS)}}}"
"""The choices of model.attention, as in the help."""


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The help as one line of words."""
    with pytest.raises(SystemExit) as caught:
        load_job(argv)
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_the_usage_and_the_form_of_each_option(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--help")
    for words in (
        "usage: python -m torchtitan_lite.train [-h] [OPTIONS] Train a decoder on text.",
        "--training.steps 20 is steps = 20 in [training]",
        "--config FILE.toml Read this file.",
        "--dry-run Check everything",
        "--world-size N With --dry-run: check for this many ranks, without torchrun.",
        "--job.device {auto,cpu,cuda} auto: cuda where there is one, else cpu. (default: auto)",
        f"--model.attention {KINDS}",
        "--model.overrides JSON, --model.overrides.KEY VALUE",
        "--compile.enable, --compile.no-enable",
        "(default: 1e-08)",
    ):
        assert words in text


def test_every_key_is_in_the_help_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    choices = [("--model.attention", backend.kind) for backend in BACKENDS]
    choices += [("--data.dataset", name) for name in registry.datasets.members]
    text = " ".join(printed(capsys, "-h", *choice) for choice in choices)
    for key in leaves(JobConfig):
        flag = f"--{key.replace('_', '-').removesuffix('.kind')}"
        shown = re.search(rf"{re.escape(flag)},? (\S+ )?(.*?)\(default", text)
        assert shown, flag
        assert len(shown[2].split()) >= 3, f"{flag} is not explained"


def test_help_shows_the_values_of_files_and_flags_as_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text("[training]\nsteps = 321\n[model.attention]\nkind = 'flex'\nblock_size = 64")
    text = printed(capsys, "--help", "--config", "run.toml", "--optimizer.lr", "0.125")
    assert "Optimizer steps of the whole run. At least 1. (default: 321)" in text
    assert "(default: 0.125)" in text
    assert re.search(rf"--model.attention {re.escape(KINDS)} .*chosen one's. \(default: flex\)", text)
    assert re.search(r"--model.attention.block-size INT\|\{INT INT\} [^()]*\(default: 64\)", text)
    assert "--model.attention.kernel " not in text
    text = printed(capsys, "--config", "run.toml", "--model.attention=varlen", "--help")
    assert "--model.attention.kernel {auto,fa4,fa3,flash_attn,torch,documents}" in text
    assert "--model.attention.block-size" not in text


def test_help_is_folded_to_the_width_of_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit):
        load_job(["--help", "--job.description", "x" * 200])
    assert max(map(len, capsys.readouterr().out.splitlines())) == 60


def test_the_flag_before_help_does_not_take_help_as_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage:" in printed(capsys, "--job.description", "-h")


def test_help_is_printed_beside_the_problems_of_the_other_flags(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_job(["--training.stps", "5", "--config", "nowhere.toml", "--training.seq-len", "99", "--help"])
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert "(default: 99)" in out
    assert [line.split(" ")[0] for line in err.splitlines()] == ["--config", "training.stps"]


def test_help_lists_the_backends_beside_a_flavor_that_does_not_exist(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        load_job(["--model.flavor", "7X", "--help"])
    assert f"--model.attention {KINDS}" in capsys.readouterr().out


def test_help_lists_the_flavors_of_each_family_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_job(["--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    for name, sizes in families.items():
        assert f"{name}: {', '.join(sizes)}." in lines
    assert "Each size also comes as <size>_flex, <size>_flex_flash and <size>_varlen." in " ".join(lines)


def test_help_lists_the_fields_that_overrides_may_name(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--help")
    named = re.search(r"Keys: (.*?)\. \(default", text)
    assert named
    words = named[1].split(", ")
    assert {"n_layers INT", "norm_eps FLOAT", "qk_norm BOOL", "sliding_window INT|{None}"} <= set(words)
    fields = {key for key in leaves(DecoderConfig) if not key.startswith("attention")}
    assert {word.split(" ")[0] for word in words} == fields


def test_what_a_plugin_adds_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text(plugin_cases.ALL)
    with plugin_cases.forgotten():
        text = printed(
            capsys, "--job.plugins", "mine", "--model.name", "olmo", "--model.flavor", "tiny", "-h"
        )
    assert "olmo: tiny." in text
    assert re.search(r"Keys: [^()]*, norm \{", text)


PACKAGE = Path(load_job.__code__.co_filename).parents[2]


@pytest.mark.parametrize("argv", [["--help"], ["--training.steps", "5", "--optimizer.lr", "0.5"]])
def test_loading_a_configuration_has_no_slow_imports(argv: list[str]) -> None:
    code = (
        "import sys, torch; before = set(sys.modules); from torchtitan_lite.config.job import load_job\n"
        f"try: load_job({argv})\nexcept SystemExit: pass\n"
        "slow = {'tensorboard', 'tqdm.auto', 'torch._dynamo', 'torch.distributed.fsdp', 'safetensors.torch',"
        "'torch.distributed.tensor', 'torch.distributed._tensor'} - before\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)"
    )
    command, nothing = [sys.executable, "-c", code], subprocess.DEVNULL
    subprocess.run(command, cwd=PACKAGE, check=True, timeout=120, stdout=nothing)


COMMANDS = ["train", "generate", "eval", "export-hf", "import-hf", "models", "attention"]


def test_help_is_the_same_without_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        assert main(["help", command]) == 0
    code = f"from torchtitan_lite.cli import main; print([main(['help', x]) for x in {COMMANDS}])"
    env = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    command = [sys.executable, "-OO", "-c", code]
    found = subprocess.check_output(command, env=env, text=True, timeout=120)
    assert found == capsys.readouterr().out + f"{[0] * len(COMMANDS)}\n"
