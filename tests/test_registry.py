"""The doors of registry.py: which members are accepted, and the errors for the others."""

import importlib
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import plugin_cases as cases
import programs
import pytest

from torchtitan_lite import registry
from torchtitan_lite.attention import BACKENDS
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.data import Jsonl, PythonStdlib, Text
from torchtitan_lite.data.tokenizer import Bytes
from torchtitan_lite.models import llama3, qwen3
from torchtitan_lite.registry import Choice, Sections, import_plugins
from torchtitan_lite.training.optimizer import AdamW

ROOT = Path(__file__).parents[1]
OPTIMIZER = """
from dataclasses import dataclass
from typing import Literal
from torchtitan_lite.registry import optimizers

@optimizers.register
@dataclass(frozen=True, kw_only=True)
class Mine:
    name: Literal["Mine"] = "Mine"
    lr: float = 0.1
    def problems(self, key): return []
    def build(self, parameters, groups): ...
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with cases.forgotten():
        yield


class Bare:
    """A class that lacks everything that a member needs."""


def refusals(source: str) -> list[str]:
    """The errors for a plugin `mine` with this source, without the key and the module."""
    Path("mine.py").write_text(source)
    sys.modules.pop("mine", None)
    importlib.invalidate_caches()
    start = 'job.plugins = "mine" '
    lines = [str(problem) for problem in import_plugins(["mine"], [])]
    assert all(line.startswith(start) for line in lines)
    return [line.removeprefix(start) for line in lines]


def test_our_own_members_are_registered_in_the_same_way() -> None:
    assert registry.attentions.members == {backend.kind: backend for backend in BACKENDS}
    assert registry.datasets.members == {"python_stdlib": PythonStdlib, "text": Text, "jsonl": Jsonl}
    assert registry.tokenizers.members["bytes"] is Bytes
    assert registry.optimizers.members["AdamW"] is AdamW
    families = {name: family.presets for name, family in registry.families.members.items()}
    assert families == {"llama3": llama3.PRESETS, "qwen3": qwen3.PRESETS}


def test_a_plugin_can_register_at_every_door() -> None:
    assert refusals(cases.ALL) == []
    names = {"families": "olmo", "attentions": "plain", "datasets": "counting"}
    names |= {"tokenizers": "shifted", "optimizers": "Descent", "hooks": "clock"}
    assert all(name in cases.DOORS[door].members for door, name in names.items())


def test_register_returns_the_member() -> None:
    door = Choice("thing", tag="kind", needs=())

    @door.register
    @dataclass(frozen=True)
    class Thing:
        kind: Literal["thing"] = "thing"

    assert door.members == {"thing": Thing} and Thing().kind == "thing"


def test_a_plugin_that_registers_nothing_is_refused_with_the_path_of_its_file() -> None:
    (line,) = refusals("")
    assert line.startswith("registers nothing (") and line.endswith(
        "mine.py): name a module that does; if you mean another file of this name, rename it"
    )


def test_an_option_that_may_be_none_must_be_none_by_default() -> None:
    (line,) = refusals(OPTIMIZER.replace("lr: float = 0.1", "lr: float = 0.1\n    every: int | None = 3"))
    assert line.endswith("which has another default than None for every: have None be the default")


def test_a_module_that_is_imported_again_replaces_its_own_members() -> None:
    assert refusals(cases.ALL) == refusals(cases.ALL) == []
    assert registry.optimizers.members["Descent"] is sys.modules["mine"].Descent


def test_a_taken_name_is_refused_and_its_member_stays() -> None:
    (line,) = refusals(OPTIMIZER.replace('"Mine"', '"AdamW"'))
    assert line == 'registers the optimizer "AdamW", which exists: choose another name'
    assert registry.optimizers.members["AdamW"] is AdamW


@pytest.mark.parametrize("name", ["qwen3", "hf"])
def test_a_family_that_exists_is_refused(name: str) -> None:
    (line,) = refusals(cases.ALL.replace('"olmo"', f'"{name}"'))
    assert line == f'registers the model family "{name}", which exists: choose another name'


DECORATOR = "write @dataclass(frozen=True, kw_only=True)"
TAG = 'which has no tag: give it the field name: Literal["NAME"] = "NAME"'


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        (
            "@dataclass(frozen=True, kw_only=True)\n",
            "",
            f"which is no dataclass: {DECORATOR} below .register",
        ),
        ("frozen=True, ", "", f"which is not frozen: {DECORATOR}"),
        ('    name: Literal["Mine"] = "Mine"\n', "", TAG),
        ('Literal["Mine"] =', "str =", TAG),
        ('= "Mine"', '= "Other"', TAG),
        ("lr: float = 0.1", "lr: float", "which has no default for lr: give every option a default"),
        ("    def build(", "    def make(", "which lacks build: every optimizer has lr, build"),
    ],
)
def test_an_incomplete_member_is_refused_in_one_line(old: str, new: str, rule: str) -> None:
    assert old in OPTIMIZER
    assert refusals(OPTIMIZER.replace(old, new)) == [f"registers the optimizer Mine, {rule}"]
    assert list(registry.optimizers.members) == ["AdamW"]


@pytest.mark.parametrize("name", ["my-own", "class"])
def test_a_name_that_is_no_identifier_is_refused(name: str) -> None:
    (line,) = refusals(OPTIMIZER.replace('"Mine"', f'"{name}"'))
    rule = "which is no word of letters, digits and _: choose another name"
    assert line == f'registers the optimizer "{name}", {rule}'


def test_a_dataset_without_a_source_and_a_family_without_presets_are_refused() -> None:
    (line,) = refusals(cases.ALL.replace("    def open(self)", "    def close(self)"))
    assert line.startswith("registers the dataset Counting, which lacks open: every dataset has ")
    (line,) = refusals(cases.ALL.replace('Family(name="olmo", presets=', "dict(name="))
    assert (
        line == "registers a model family that lacks name and presets: every model family has name, presets"
    )


def test_outside_of_a_plugin_the_module_of_the_class_is_named() -> None:
    door = Sections("thing", tag="name", needs=())
    with pytest.raises(ConfigError, match='test_registry" registers the thing Bare, which is no'):
        door.register(Bare)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("1 / 0", "cannot be imported (ZeroDivisionError: division by zero): correct it; ..."),
        ("raise SystemExit(3)", "cannot be imported (SystemExit: 3): correct it; ..."),
        (
            "import nowhere",
            "cannot be imported (ModuleNotFoundError: No module named 'nowhere'): correct it; ...",
        ),
        ("raise ValueError('a\\nb')", "cannot be imported (ValueError: a\\nb): correct it; ..."),
    ],
)
def test_a_plugin_that_cannot_be_imported_says_why_in_one_line(source: str, line: str) -> None:
    where = 'python -c "import mine" shows where'
    assert refusals(source) == [line.replace("...", where)]


@pytest.mark.parametrize("name", ["no.where", "nowhere"])
def test_the_error_for_a_missing_module_says_where_modules_are_found(name: str) -> None:
    (problem,) = import_plugins([name], [], "plugins")
    top = name.partition(".")[0]
    assert str(problem) == (
        f"plugins = \"{name}\" cannot be imported (ModuleNotFoundError: No module named '{top}'): "
        "name a module that is installed, in the working directory, or beside a --config file"
    )


@pytest.mark.parametrize("name", ["mine.py", "a/b", "", "a..b"])
def test_a_text_that_is_no_module_name_is_not_imported(name: str) -> None:
    (problem,) = import_plugins([name], [])
    assert (problem.rule, problem.remedy[:36]) == (
        "is not the name of a module",
        "write it as Python imports it, such ",
    )


def test_all_plugins_are_imported_and_all_errors_are_reported() -> None:
    Path("good.py").write_text(OPTIMIZER)
    assert len(import_plugins(["nowhere", "good", "a/b"], [])) == 2
    assert "Mine" in registry.optimizers.members


def test_a_module_beside_a_config_file_is_found_after_installed_modules(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "beside.py").write_text(OPTIMIZER)
    (tmp_path / "runs" / "tomli.py").write_text("1 / 0")
    assert import_plugins(["beside"], []) != []
    assert [x.value for x in import_plugins(["beside", "tomli"], [tmp_path / "runs"])] == ["tomli"]
    assert sys.path[-1] == str(tmp_path / "runs")


def test_a_section_has_the_options_of_every_member_that_has_any() -> None:
    assert fields(registry.hooks.section) == () or "clock" not in registry.hooks.section.__annotations__
    assert refusals(cases.ALL) == []
    section = registry.hooks.defaults()
    clock = sys.modules["mine"].Clock
    assert section.clock == clock() and registry.hooks.configured(section)["clock"] == clock()
    assert registry.hooks.configured(None)["clock"] == clock()
    assert registry.tokenizers.configured(registry.tokenizers.defaults())["bytes"] == Bytes()


def test_a_spawned_process_finds_the_plugins_of_its_parent(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "beside.py").write_text(OPTIMIZER)
    assert import_plugins(["beside"], [tmp_path / "runs"]) == []
    member = registry.optimizers.members["Mine"]()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(repr, member).result(60) == repr(member)


@pytest.mark.parametrize("start", [["-m", "torchtitan_lite.train"], [ROOT / "torchtitan_lite" / "train.py"]])
def test_a_plugin_in_the_working_directory_is_found_for_a_script_and_for_m(
    start: list, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(OPTIMIZER)
    words = [*start, "--job.plugins", "mine", "--optimizer.name", "Mine", "--dry-run"]
    environment = programs.environment(PYTHONPATH=str(ROOT))
    done = programs.run(words, fresh=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert '[optimizer]\nname = "Mine"\nlr = 0.1\n' in done.stdout
