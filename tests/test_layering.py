"""Imports point one way, and the model alone spells its names: both rules, and proof of what each finds."""

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

# Left may import right. What shares a place may not import each other, but files of one unit may.
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
LEAVES = ("config", "registry")
"""Know nothing of ours but each other, and all but attention may import them."""
LAUNCH_MAY_IMPORT = ("config.load", "registry", "")
"""What `launch`, a leaf too, may import beside itself."""
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
    known = {*PLACE, *LEAVES, "launch", "parallel.context", "parallel", ""}
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
        ("training.schedule", "from torchtitan_lite.models import decoder"),
        ("training.schedule", "from torchtitan_lite.data import Batch"),
        ("training.schedule", "from torchtitan_lite.training import trainer"),
        ("training.schedule", "from . import trainer"),
        ("training.schedule", "from torchtitan_lite.parallel.mesh import Mesh"),
        ("training.hooks", "from torchtitan_lite.training.trainer import Trainer"),
        ("training.hooks.console", "from torchtitan_lite.training.state import TrainState"),
        ("training.hooks.console", "from torchtitan_lite.config.job import JobConfig"),
        ("training.step", "from torchtitan_lite.models import decoder"),
        ("training.step", "from torchtitan_lite.training import trainer"),
        ("training.state", "from torchtitan_lite.training.step import Stepper"),
        ("training.corpus", "from torchtitan_lite.training.state import TrainState"),
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
        ("launch.watch", "from torchtitan_lite.checkpoint import SaveFailed"),
        ("launch.watch", "from torchtitan_lite.config.job import JobConfig"),
        ("launch.watch", "from torchtitan_lite.config.problem import Problem"),
        ("models.decoder", "from torchtitan_lite.launch.world import World"),
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
        ("training.step", "from torchtitan_lite.training.hooks import StepStats"),
        ("training.hooks.console", "from torchtitan_lite.training.metrics import Meter"),
        ("launch.watch", "from torchtitan_lite.launch.end import End"),
        ("launch.world", "from torchtitan_lite.config.load import ConfigError"),
        ("checkpoint.save", "from torchtitan_lite.launch.world import World"),
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
    if source == "launch":
        return target == "launch" or imported in LAUNCH_MAY_IMPORT
    if target == "launch":
        return source not in ("attention", "models", "parallel", "", *LEAVES)
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
    if module in ("train", "run_folder", "cli"):
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


# A rule of imports that strings walk around is no rule: who may not know the model may not spell its names.

MAY_SPELL = ("models.decoder", "models.layers")
"""Where the model's modules and its table stand."""
BY_NAME = {"get_submodule", "get_parameter", "getattr", "setattr", "hasattr", "delattr"}
ALSO_WORDS = {"attention", "blocks", "embedding", "head", "inner", "logits", "loss", "norm", "weight"}
"""Names in the model that mean other things elsewhere: only what is read or written of a model counts."""
ALIASES = {"block": "blocks", "layer": "blocks"}
"""What a variable may be called that holds a module of that name."""


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


def test_the_model_alone_spells_the_names_of_its_parameters() -> None:
    assert spelled(package_sources()) == []


FORMERLY = [
    ("parallel.tensor", 'BY_ROWS = ("wo", "w2")'),
    ("parallel.tensor", 'WHOLE = ("norm", "attention_norm", "ffn_norm", "q_norm", "k_norm")'),
    ("parallel.tensor", 'embedding = model.get_submodule("embedding")'),
    ("parallel.tensor", 'model.loss = loss(model.get_submodule("loss"), mesh)'),
    ("parallel.tensor", "model.loss = loss"),
    ("parallel.tensor", 'model.logits = LogitsOfAll(model.get_submodule("logits"), mesh)'),
    ("parallel.tensor", 'for block in model.get_submodule("blocks").children(): pass'),
    ("parallel.tensor", '(block.get_submodule("attention"), block.get_submodule("ffn"))'),
    ("parallel.apply", 'blocks = list(model.get_submodule("blocks").children())'),
    ("parallel.apply", 'attention = block.get_submodule("attention")'),
    ("parallel.apply", "attention.inner = context.wrap(x)"),
    ("parallel.apply", 'f"wq wk wv w1 w3 by columns, wo w2 by rows, norms by tokens (tp {tp})"'),
    ("parallel.fsdp", 'model.get_submodule("blocks").children()'),
    ("parallel.recompute", 'inner = block.get_submodule("attention.inner")'),
    ("models.init", '_RESIDUAL_OUTPUTS = (".attention.wo.weight", ".ffn.w2.weight")'),
    ("models.init", 'model.get_submodule("blocks")'),
    ("models.huggingface", 'HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"'),
    ("models.huggingface", '{"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}'),
    ("models.huggingface", '{"attention.wq": "self_attn.q_proj"}'),
    ("config.division", 'TENSOR_DIVIDES = ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size")'),
    ("config.division", 'self.sizes.get("n_kv_heads", 0)'),
    ("config.division", 'self.undivided == ["vocab_size"]'),
    ("config.job", '_REFUSED_KEYS = {"n_heads": "model.overrides.n_heads"}'),
    ("inference.commands", 'for name in ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size"): pass'),
    ("inference.generate", "model.embedding.weight.device"),
    ("inference.generate", "[block for block in model.blocks]"),
    ("inference.generate", 'attention.get_submodule("inner.inner")'),
    ("inference.evaluate", "model.embedding"),
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
        ("parallel.tensor", "self.loss = loss"),
        ("training.metrics", "stats.loss"),
        ("config.job", "self.model.attention.kind"),
        ("config.job", 'f"the model\'s vocab_size is {n}"'),
        ("attention.capabilities", 'Refusal("n_heads", n_heads, rule, remedy)'),
        ("training.optimizer", 'group == "embedding"'),
    ],
)
def test_a_word_that_is_no_name_of_the_model_is_left_alone(module: str, line: str) -> None:
    assert spelled({module: line}) == []


def spelled(sources: dict[str, str]) -> list[str]:
    """Where a module that may not spell a name of the model does, and which."""
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
    """Whether it reads or writes a child of what is called like the model or one of its modules."""
    owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
    return node.attr in PARTS.get(ALIASES.get(owner, owner), ()) and owner != "self"
