"""Two rules: imports point one way, and only the model spells its names. Tests show what each rule finds."""

import ast
import re
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from torchtitan_lite.models.decoder import PARAMETERS
from torchtitan_lite.models.registry import families

ROOT = Path(__file__).parents[1]
PACKAGE = "torchtitan_lite"

# An earlier unit may import a later one. Units of one set may not import each other; files of one unit may.
ORDER = (
    {"entry"},
    {"inference", "training.trainer"},
    {"training.step"},
    {"training.state"},
    {"training.record", "training.corpus"},
    {"config.job", "training.hub"},
    {"training", "checkpoint", "data", "parallel.apply"},
    {"models"},
    {"attention"},
)
PLACE = {unit: place for place, units in enumerate(ORDER) for unit in units}
LEAVES = ("config", "registry", "durable")
"""Know nothing of ours but each other, and all but attention may import them."""
IN_ATTENTION = ("attention.portable.native", "durable")
"""The one edge from attention to the rest: what compiles kernels publishes them as other files are."""
LAUNCH_MAY_IMPORT = ("config.load", "registry", "")
"""`launch` is a leaf too. It may import these modules and itself."""
WITHOUT_MODELS = {"training", "training.step", "training.corpus", "checkpoint", "data"}
ABOVE_PARALLEL = {
    "entry",
    "inference",
    "training.trainer",
    "training.step",
    "training.state",
    "training.record",
    "training.corpus",
    "training.hub",
    "config.job",
    "parallel.apply",
}
ATTENTION_MAY_IMPORT = {"torch", "flash_attn", "flash_attn_3", "flash_attn_interface"}


def test_every_import_points_down() -> None:
    assert wrong_imports(package_sources()) == []


def test_every_module_has_a_place_in_the_order() -> None:
    known = {*PLACE, *LEAVES, "launch", "parallel.context", "parallel.exchange", "parallel", ""}
    assert {unit(module) for module in package_sources()} <= known


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("attention.flex", "from torchtitan_lite.config.load import Problem"),
        ("attention.flex", "from torchtitan_lite import durable"),
        ("durable", "from torchtitan_lite.config.load import Problem"),
        ("durable", "import torch"),
        ("registry", "from torchtitan_lite.attention import Sdpa"),
        ("attention.flex", "from torchtitan_lite import models"),
        ("attention.flex", "import numpy"),
        ("attention.flex", "import torchtitan_lite"),
        ("models.decoder", "from ..data import loader"),
        ("models.decoder", "import torchtitan_lite.training.step as s"),
        ("data.loader", "from torchtitan_lite.models.decoder import Decoder"),
        ("data.loader", "from torchtitan_lite.checkpoint import save"),
        ("training.schedule", "from torchtitan_lite.models import decoder"),
        ("training.schedule", "from torchtitan_lite.training import trainer"),
        ("training.schedule", "from . import trainer"),
        ("training.schedule", "from torchtitan_lite.parallel.mesh import Degrees"),
        ("training.hooks.console", "from torchtitan_lite.training.state import TrainState"),
        ("training.step", "from torchtitan_lite.models import decoder"),
        ("training.step", "from torchtitan_lite.training import trainer"),
        ("training.state", "from torchtitan_lite.training.step import Stepper"),
        ("training.corpus", "from torchtitan_lite.training.state import TrainState"),
        ("training.trainer", "from torchtitan_lite.inference.generate import generate"),
        ("training.trainer", "from torchtitan_lite.cli import main"),
        ("config.load", "from torchtitan_lite.config.job import JobConfig"),
        ("config.job", "from torchtitan_lite.training.trainer import Trainer"),
        ("parallel.context", "from torchtitan_lite.models.decoder import Decoder"),
        ("parallel.tensor", "from torchtitan_lite.models.decoder import Decoder"),
        ("parallel.tensor", "from torchtitan_lite.parallel.mesh import Degrees"),
        ("parallel.exchange", "from torchtitan_lite.attention import SEQ_DIM"),
        ("parallel.apply", "from torchtitan_lite.data.loader import Loader"),
        ("launch.guard", "from torchtitan_lite.checkpoint import SaveFailed"),
        ("launch.guard", "from torchtitan_lite.config.job import JobConfig"),
        ("launch.guard", "from torchtitan_lite.config.problem import Problem"),
        ("models.decoder", "from torchtitan_lite.launch.world import World"),
        ("", "from torchtitan_lite.training.trainer import Trainer"),
    ],
)
def test_a_forbidden_import_is_found(importer: str, line: str) -> None:
    sources = dict.fromkeys(
        [*package_sources(), "training.trainer", "inference.generate", "checkpoint.save"], ""
    )
    assert wrong_imports({**sources, importer: line})


@pytest.mark.parametrize(
    "source",
    [
        "def later():\n    from torchtitan_lite.models import decoder",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torchtitan_lite.models import decoder",
        "import importlib\nimportlib.import_module('torchtitan_lite.models.decoder')",
    ],
    ids=["in a function", "for types", "by name"],
)
def test_a_forbidden_import_is_found_anywhere_in_a_file(source: str) -> None:
    assert wrong_imports({"models.decoder": "", "data.loader": source})


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("attention.flex", "from torchtitan_lite.attention import mask"),
        ("attention.flex", "import math, torch.nn, flash_attn.cute"),
        ("attention.portable.native", "from torchtitan_lite import durable"),
        ("checkpoint.steps", "from torchtitan_lite import durable"),
        ("models.decoder", "from torchtitan_lite.attention import Sdpa"),
        ("models.decoder", "from torchtitan_lite.config.load import ConfigError"),
        ("data.loader", "from torchtitan_lite.data.order import sample_at"),
        ("training.optimizer", "from torchtitan_lite.registry import optimizers"),
        ("registry", "from torchtitan_lite.config.problem import Problem"),
        ("parallel.apply", "from torchtitan_lite.parallel import mesh"),
        ("parallel.apply", "from torchtitan_lite.models.decoder import Decoder"),
        ("parallel.context", "from torchtitan_lite.attention import SEQ_DIM"),
        ("parallel.context", "from torchtitan_lite.parallel.exchange import all_gather"),
        ("parallel.tensor", "from torchtitan_lite.parallel.exchange import all_gather"),
        ("parallel.mesh", "from torchtitan_lite.config.load import Problem"),
        ("training.trainer", "from torchtitan_lite.config.job import JobConfig"),
        ("training.step", "from torchtitan_lite.training.hooks import StepStats"),
        ("training.hooks.console", "from torchtitan_lite.training.metrics import Reporter"),
        ("launch.guard", "from torchtitan_lite.launch.end import End"),
        ("launch.world", "from torchtitan_lite.config.load import ConfigError"),
        ("checkpoint.save", "from torchtitan_lite.launch.world import World"),
        ("cli", "from torchtitan_lite import train"),
    ],
)
def test_an_allowed_import_is_not_reported(importer: str, line: str) -> None:
    sources = dict.fromkeys([*package_sources(), "parallel.context"], "")
    assert wrong_imports({**sources, importer: line}) == []


def package_sources() -> dict[str, str]:
    """The source of every module, by its name below the package. A package's name stands for its __init__."""
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
    """Whether the rule allows the import. Names are below the package; outside names start with a slash."""
    source, target = unit(importer), unit(imported)
    if imported.startswith("/"):
        top = imported[1:].partition(".")[0]
        outside = {"attention": ATTENTION_MAY_IMPORT, "durable": set()}
        return source not in outside or top in outside[source] or top in sys.stdlib_module_names
    if source == "durable":
        return False
    if (importer, target) == IN_ATTENTION:
        return True
    if source == "launch":
        return target == "launch" or imported in LAUNCH_MAY_IMPORT
    if target == "launch":
        return source not in ("attention", "models", "parallel", "", *LEAVES)
    if target in (*LEAVES, ""):
        return source not in ("attention", "") and (source not in LEAVES or target in LEAVES)
    if target == "parallel.exchange":
        return source in ("parallel", "parallel.context")
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
    """The unit of a module: its folder, or the module itself if the rule names it."""
    if module in ("train", "run_folder", "summary", "cli", "__main__"):
        return "entry"
    if module in {*PLACE, "parallel.context", "parallel.exchange"}:
        return module
    return module.partition(".")[0]


def imports(importer: str, source: str, modules) -> list[str]:
    """Every module that `source` imports: ours by its name in the package, others with a slash before."""
    # Relative imports of a package start at the package itself, those of a module at its package.
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
    """The module that a dotted name names, or the module that holds the name."""
    if name.partition(".")[0] != PACKAGE:
        return f"/{name}"
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in modules:
        parts.pop()
    return ".".join(parts)


# Strings could walk around the rule of imports, so only the model's own modules may spell its names.

MAY_SPELL = ("models.decoder", "models.layers")
"""The modules with the model's layers and its table of parameters."""
BY_NAME = {"get_submodule", "get_parameter", "getattr", "setattr", "hasattr", "delattr"}
ALSO_WORDS = {"attention", "blocks", "embedding", "head", "inner", "norm", "weight"}
"""Names in the model that mean other things elsewhere: only what is read or written of a model counts."""
ALIASES = {"block": "blocks", "layer": "blocks"}
"""Names of variables that hold a module, and the name of that module."""


def model_parts() -> dict[str, set[str]]:
    """The names of the children and parameters of each module; "model" is the root."""
    found: dict[str, set[str]] = {}
    for config in (families["llama3"]["debugmodel"], families["qwen3"]["debugmodel"]):
        with torch.device("meta"):
            model = config.build()
        paths = [name for name, _ in (*model.named_modules(), *model.named_parameters()) if name]
        for path in paths:
            parts = ["model", *(part for part in path.split(".") if not part.isdigit())]
            for owner, child in pairwise(parts):
                found.setdefault(owner, set()).add(child)
    return found


PARTS = model_parts()
NAMES = set.union(*PARTS.values())
ON_THE_HUB = {part for row in PARAMETERS for part in (row.hub or "").split(".")}
UNMISTAKABLE = (NAMES | ON_THE_HUB) - ALSO_WORDS - {"model", "layers", "mlp", "{}"}
SIZES = set(PARAMETERS.splits)


def test_only_the_model_spells_the_names_of_its_parameters() -> None:
    assert spelled(package_sources()) == []


FORMERLY = [
    ("parallel.tensor", 'BY_ROWS = ("wo", "w2")'),
    ("parallel.tensor", 'embedding = model.get_submodule("embedding")'),
    ("parallel.apply", "attention.inner = context.wrap(x)"),
    ("parallel.apply", 'f"wq wk wv w1 w3 by columns, wo w2 by rows, norms by tokens (tp {tp})"'),
    ("models.init", '_RESIDUAL_OUTPUTS = (".attention.wo.weight", ".ffn.w2.weight")'),
    ("models.huggingface", 'HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"'),
    ("models.huggingface", '{"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}'),
    ("config.division", 'self.sizes.get("n_kv_heads", 0)'),
    ("config.division", 'self.undivided == ["vocab_size"]'),
    ("config.job", '_REFUSED_KEYS = {"n_heads": "model.overrides.n_heads"}'),
    ("inference.commands", 'for name in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"): pass'),
    ("inference.generate", "model.embedding.weight.device"),
    ("inference.generate", 'attention.get_submodule("inner.inner")'),
]
"""Lines that stood in these modules."""


@pytest.mark.parametrize(("module", "line"), FORMERLY)
def test_a_name_of_the_model_is_found_wherever_it_is_spelled(module: str, line: str) -> None:
    assert spelled({module: line})


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("models.decoder", 'Parameter(pattern="blocks.*.attention.wo.weight")'),
        ("parallel.tensor", '"""Each rank has rows of wo and w2."""'),
        ("training.metrics", "stats.loss"),
        ("config.job", "self.model.attention.kind"),
        ("config.job", 'f"the model\'s vocab_size is {n}"'),
        ("attention.capabilities", 'Refusal("n_heads", n_heads, rule, remedy)'),
        ("training.optimizer", 'group == "embedding"'),
    ],
)
def test_a_word_that_is_no_name_of_the_model_is_allowed(module: str, line: str) -> None:
    assert spelled({module: line}) == []


def spelled(sources: dict[str, str]) -> list[str]:
    """Each name of the model that a module spells without permission, with its place."""
    return [
        f"{module}:{line} spells {name}"
        for module, source in sources.items()
        if module not in MAY_SPELL
        for line, name in _spelled_in(ast.parse(source), knows_sizes=unit(module) in ("models", "attention"))
    ]


def _spelled_in(tree: ast.Module, knows_sizes: bool) -> Iterator[tuple[int, str]]:
    prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_of_the_model(node):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            words = re.findall(r"\w+", node.value)
            yield from ((node.lineno, word) for word in words if word in UNMISTAKABLE)
            if node.value in SIZES and not knows_sizes:
                yield node.lineno, node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
            texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            names = [part for text in texts if isinstance(text, str) for part in text.split(".")]
            yield from ((node.lineno, name) for name in names if name in NAMES)


def _is_of_the_model(node: ast.Attribute) -> bool:
    """Whether `node` is a child of a variable that is named like the model or one of its modules."""
    owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
    return node.attr in PARTS.get(ALIASES.get(owner, owner), ()) and owner != "self"
