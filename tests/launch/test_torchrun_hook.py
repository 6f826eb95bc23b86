"""The line that plain torchrun prints instead of a traceback, and the door by which torch finds the hook."""

import ast
import signal
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest
import tomli
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import registry, rendezvous_handler_registry

from torchtitan_lite.launch import torchrun_hook

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "torchtitan_lite" / "train.py"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`shown(error, *words)` is what `torchrun *words` prints for an error. Its own hook says "as before"."""
    group, name = "torchrun.handlers", "torchtitan_lite"
    value = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group][name]
    found = EntryPoints([EntryPoint(name=name, value=value, group=group)])
    monkeypatch.setattr(registry, "entry_points", lambda group: found)

    def show(error: BaseException, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["torchrun", *map(str, words)])
        monkeypatch.setattr(sys, "excepthook", lambda *_: print("as before", file=sys.stderr))
        registry._register_out_of_tree_handlers()
        sys.excepthook(type(error), error, None)
        return capsys.readouterr().err

    yield show
    rendezvous_handler_registry._registry.pop(name)


SIGNALLED = SignalException("Process 1 got signal: 2", sigval=signal.SIGINT)


@pytest.mark.parametrize(
    "words",
    [
        ("--nproc_per_node", 2, TRAIN, "--config", "run.toml"),
        ("-m", "torchtitan_lite.train"),
        ("--no-python", "/usr/bin/torchtitan-lite", "train"),
    ],
)
def test_the_torchrun_of_a_run_prints_a_line(words, shown) -> None:
    for error in (SIGNALLED, ZeroDivisionError()):
        said = shown(error, *words)
        expected = "torchrun was ended by SIGINT: exit.json has the end of the run\n"
        assert said == (expected if error is SIGNALLED else "as before\n")


@pytest.mark.parametrize("words", [("train.py",), ("-m", "another.train"), ("torchtitan_lite",), ()])
def test_the_torchrun_of_other_projects_stays_as_it_is(words, shown) -> None:
    assert shown(SIGNALLED, *words) == "as before\n"


def test_the_hook_is_no_rendezvous() -> None:
    with pytest.raises(ValueError, match="is no rendezvous backend"):
        torchrun_hook.rendezvous_handler()(object())


def test_the_hook_imports_the_standard_library_alone() -> None:
    tree = ast.parse(Path(torchrun_hook.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {str(module).partition(".")[0] for module in modules} <= sys.stdlib_module_names
