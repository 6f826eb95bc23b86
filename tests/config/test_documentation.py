"""The examples and tables of docs/configuration.md agree with the code."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import plugin_cases
import pytest

from torchtitan_lite.config.job import JobConfig, load_job
from torchtitan_lite.train import main

TEXT = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
FILES = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
PLUGINS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
CONSOLES = re.findall(r"```console\n\$ python -m torchtitan_lite.train (.*?)\n(.*?)```", TEXT, re.DOTALL)
ROWS = re.findall(r"^\| `\[([\w.]+)\]` `(.*?)`(?:, `.*?`)? \| `(--.*?)`.* \|$", TEXT, re.MULTILINE)
SECOND_FLAGS = re.findall(r"^\| `\[([\w.]+)\]` `(.*?)` \| `--.*?` or `(--.*?)` \|$", TEXT, re.MULTILINE)
TABLES = re.findall(r"^\| `\[(\w+)\]` \| default \| \|\n\|.*\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
FLAVORS = re.findall(r"^\| `(\w+)` \| `([^`]*)`, `([^`]*)` \|$", TEXT, re.MULTILINE)


def test_the_page_has_the_examples_and_tables_that_are_tested() -> None:
    assert [section for section, _ in TABLES] == ["parallelism", "comm", "activation_checkpoint"]
    counts = [len(found) for found in (FILES, PLUGINS, CONSOLES, ROWS, SECOND_FLAGS, FLAVORS)]
    assert counts == [2, 1, 4, 6, 4, 3]


@pytest.mark.parametrize("text", FILES)
def test_a_file_on_the_page_loads(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(text)
    (tmp_path / "my_plugin.py").write_text(PLUGINS[0])
    with plugin_cases.forgotten():
        load_job(["--config", str(tmp_path / "run.toml")])


def test_the_doors_on_the_page_are_those_of_the_registry() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*) \| .* \|$", TEXT, re.MULTILINE)
    doors = {name: (tag, text) for name, tag, text in rows if name in plugin_cases.DOORS}
    assert doors.keys() == plugin_cases.DOORS.keys()
    for name, door in plugin_cases.DOORS.items():
        tag, text = doors[name]
        assert tag == door.tag and all(need in text for need in door.needs if need != "problems")


@pytest.mark.parametrize(("argv", "lines"), CONSOLES)
def test_a_command_on_the_page_prints_the_lines_below_it(
    argv: str, lines: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(argv)) == 2
    assert capsys.readouterr().err == lines


@pytest.mark.parametrize(("section", "line", "flag"), ROWS + SECOND_FLAGS)
def test_a_flag_and_the_line_beside_it_set_the_same_value(
    section: str, line: str, flag: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f"[{section}]\n{line}")
    gpu = ["--job.device", "cuda", "--dry-run"]
    kind = ["--model.attention", "flex"] if section == "model.attention" else []
    from_file = load_job(["--config", str(file), *kind, *gpu]).config
    from_flags = load_job([*kind, *shlex.split(flag), *gpu]).config
    assert from_file == from_flags
    assert from_file != load_job(gpu).config


@pytest.mark.parametrize(("section", "rows"), TABLES, ids=[section for section, _ in TABLES])
def test_a_table_of_keys_lists_every_key_and_default_of_its_section(section: str, rows: str) -> None:
    listed = re.findall(r"^\| `(\w+)` \| `(.*?)` \| .* \|$", rows, re.MULTILINE)
    keys = dataclasses.asdict(getattr(JobConfig(), section))
    assert {name: json.loads(default) for name, default in listed} == keys


@pytest.mark.parametrize(("flavor", "size", "attention"), FLAVORS)
def test_a_flavor_and_the_table_beside_it_mean_the_same_decoder(
    flavor: str, size: str, attention: str, tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f"[model]\n{size}\n{attention}")
    gpu = ["--job.device", "cuda", "--dry-run"]
    from_file = load_job(["--config", str(file), *gpu]).config
    assert from_file.decoder == load_job(["--model.flavor", flavor, *gpu]).config.decoder
