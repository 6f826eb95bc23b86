"""Imports point one way: the rule, held against every module, and proof that it finds what it forbids."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "torchtitan_lite"

# Left may import right. What shares a place may not import each other, but files of one unit may.
ORDER = (
    {"entry"},
    {"inference", "training.trainer"},
    {"training.record"},
    {"config.job", "training.hub"},
    {"training", "checkpoint", "data", "parallel.apply"},
    {"models"},
    {"attention"},
)
PLACE = {unit: place for place, units in enumerate(ORDER) for unit in units}
LEAVES = ("config", "registry")
"""Know nothing of ours but each other, and all but attention may import them."""
WITHOUT_MODELS = {"training", "checkpoint", "data"}
ABOVE_PARALLEL = {
    "entry",
    "inference",
    "training.trainer",
    "training.record",
    "training.hub",
    "config.job",
    "parallel.apply",
}
ATTENTION_MAY_IMPORT = {"torch", "flash_attn", "flash_attn_3", "flash_attn_interface"}


def test_every_import_points_down() -> None:
    assert wrong_imports(package_sources()) == []


def test_every_module_has_a_place_in_the_order() -> None:
    known = {*PLACE, *LEAVES, "parallel.context", "parallel", ""}
    assert {unit(module) for module in package_sources()} <= known


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("attention.flex", "from torchtitan_lite.config.load import Problem"),
        ("attention.flex", "from torchtitan_lite.registry import attentions"),
        ("registry", "from torchtitan_lite.attention import Sdpa"),
        ("registry", "from torchtitan_lite.config.job import JobConfig"),
        ("attention.flex", "from torchtitan_lite import models"),
        ("attention.flex", "import numpy"),
        ("attention.flex", "import torchtitan_lite"),
        ("models.decoder", "from ..data import loader"),
        ("models.decoder", "import torchtitan_lite.training.step as s"),
        ("models.decoder", "from torchtitan_lite.config.job import JobConfig"),
        ("data.loader", "from torchtitan_lite.models.decoder import Decoder"),
        ("data.loader", "from torchtitan_lite.checkpoint import save"),
        ("training.step", "from torchtitan_lite.models import decoder"),
        ("training.step", "from torchtitan_lite.data import Batch"),
        ("training.step", "from torchtitan_lite.training import trainer"),
        ("training.step", "from . import trainer"),
        ("training.step", "from torchtitan_lite.parallel.mesh import Mesh"),
        ("training.trainer", "from torchtitan_lite.inference.generate import generate"),
        ("training.trainer", "from torchtitan_lite.cli import main"),
        ("training.record", "from torchtitan_lite.training.trainer import Trainer"),
        ("checkpoint.save", "from torchtitan_lite.models.init import init_weights"),
        ("config.load", "from torchtitan_lite.config.job import JobConfig"),
        ("config.load", "from torchtitan_lite.data.sources import DataConfig"),
        ("config.job", "from torchtitan_lite.training.trainer import Trainer"),
        ("parallel.context", "from torchtitan_lite.models.decoder import Decoder"),
        ("parallel.context", "from torchtitan_lite.config.job import JobConfig"),
        ("parallel.tensor", "from torchtitan_lite.models.decoder import Decoder"),
        ("parallel.tensor", "from torchtitan_lite.parallel.mesh import Mesh"),
        ("parallel.apply", "from torchtitan_lite.data.loader import Loader"),
        ("", "from torchtitan_lite.training.trainer import Trainer"),
    ],
)
@pytest.mark.parametrize(
    "place",
    [
        "{line}",
        "def later():\n    {line}",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {line}",
    ],
    ids=["top", "function", "type-checking"],
)
def test_a_forbidden_import_is_found_wherever_it_stands(importer: str, line: str, place: str) -> None:
    sources = dict.fromkeys(
        [*package_sources(), "training.trainer", "inference.generate", "checkpoint.save"], ""
    )
    assert wrong_imports({**sources, importer: place.format(line=line)})


def test_an_import_by_name_counts_too() -> None:
    line = "import importlib\nimportlib.import_module('torchtitan_lite.models.decoder')"
    assert wrong_imports({"models.decoder": "", "data.loader": line})


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("attention.flex", "from torchtitan_lite.attention import mask"),
        ("attention.flex", "import math, torch.nn, flash_attn.cute"),
        ("models.decoder", "from torchtitan_lite.attention import Sdpa"),
        ("models.decoder", "from torchtitan_lite.config.load import ConfigError"),
        ("data.loader", "from torchtitan_lite.data.order import permute"),
        ("training.optimizer", "from torchtitan_lite.registry import optimizers"),
        ("registry", "from torchtitan_lite.config.problem import Problem"),
        ("parallel.apply", "from torchtitan_lite.parallel import mesh"),
        ("parallel.apply", "from torchtitan_lite.models.decoder import Decoder"),
        ("parallel.context", "from torchtitan_lite.attention import SEQ_DIM"),
        ("parallel.mesh", "from torchtitan_lite.config.load import Problem"),
        ("training.trainer", "from torchtitan_lite.config.job import JobConfig"),
        ("cli", "from torchtitan_lite import train"),
    ],
)
def test_an_allowed_import_is_left_alone(importer: str, line: str) -> None:
    sources = dict.fromkeys([*package_sources(), "parallel.context"], "")
    assert wrong_imports({**sources, importer: line}) == []


def package_sources() -> dict[str, str]:
    """Source of every module, by its name below the package; a package's own name stands for its __init__."""
    folder = ROOT / PACKAGE
    sources = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return sources


def wrong_imports(sources: dict[str, str]) -> list[str]:
    found = []
    for importer, source in sources.items():
        for imported in imports(importer, source, sources.keys()):
            if not may_import(importer, imported):
                found.append(f"{importer} imports {imported}")
    return found


def may_import(importer: str, imported: str) -> bool:
    """Whether the rule allows it; both names are below the package, an outside name starts with a slash."""
    source, target = unit(importer), unit(imported)
    if imported.startswith("/"):
        top = imported[1:].partition(".")[0]
        return source != "attention" or top in ATTENTION_MAY_IMPORT or top in sys.stdlib_module_names
    if target in (*LEAVES, ""):
        return source not in ("attention", "") and (source not in LEAVES or target in LEAVES)
    if source == target:
        return source != "parallel"
    if target in ("parallel", "parallel.context"):
        return source in ABOVE_PARALLEL
    if source == "parallel.context":
        return target == "attention"
    if source not in PLACE or (source in WITHOUT_MODELS and target == "models"):
        return False
    return PLACE[source] < PLACE[target]


def unit(module: str) -> str:
    """What the rule speaks of: a folder, or a file that it names apart."""
    if module in ("train", "run", "cli"):
        return "entry"
    if module in {*PLACE, "parallel.context"}:
        return module
    return module.partition(".")[0]


def imports(importer: str, source: str, modules) -> list[str]:
    """Every module that `source` imports, wherever: ours by its name in the package, others after "/"."""
    # A package's relative imports start at itself, a module's at its package.
    is_package = any(module.startswith(f"{importer}.") for module in modules) or importer == ""
    parents = [PACKAGE, *importer.split(".")] if importer else [PACKAGE]
    parents = parents if is_package else parents[:-1]
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*start, *(node.module or "").split(".")]).strip(".")
            names += [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            name = node.args[0].value
            if called in ("import_module", "__import__", "run_module") and isinstance(name, str):
                names.append(name)
    return [_known(name, modules) for name in names]


def _known(name: str, modules) -> str:
    """The module that a dotted name is or lies in; what only an __init__ can hold lies in its package."""
    if name.partition(".")[0] != PACKAGE:
        return f"/{name}"
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in modules:
        parts.pop()
    return ".".join(parts)
