"""Hooks of pytest and fixtures for all tests."""

import functools
import logging
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gpus
import programs
import pytest
import torch
from parallel_cases import write_documents
from ranks import Ranks, RanksOf

from torchtitan_lite.attention.portable import native
from torchtitan_lite.attention.portable.native import CXX
from torchtitan_lite.launch import log
from torchtitan_lite.launch.signals import STOPS

SIGNAL_HANDLERS = {number: signal.getsignal(number) for number in STOPS}
SIGNAL_MASK = signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""The signals as they are before any test."""

# The tests' tensors are small: more threads spend their time waiting for each other.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from tests that are not chosen for them."""
    if gpus.are_hidden(config.option.markexpr):
        gpus.hide()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU or a compiler if the machine has none, and give the reason."""
    absent = {}
    if gpus.are_hidden(config.option.markexpr):
        absent["gpu"] = "only -m gpu runs the tests for a GPU; all other tests see no GPU"
    elif not torch.cuda.is_available():
        absent["gpu"] = "no CUDA GPU here (torch.cuda.is_available() is False)"
    if not shutil.which(CXX):
        absent["compiler"] = f"no C++ compiler here ({CXX} is not on PATH; CXX names another)"
    for item in items:
        for marker in filter(item.get_closest_marker, absent):
            item.add_marker(pytest.mark.skip(reason=absent[marker]))


_LEFT_OUT = pytest.StashKey[int]()


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Count the slow tests that `-m "not slow"` leaves out."""
    if items and all("slow" in item.keywords for item in items):
        config = items[0].config
        config.stash[_LEFT_OUT] = len(items)
        getattr(config, "workeroutput", {})["left_out"] = len(items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the count of left out tests from a worker of pytest-xdist: it is the same in each worker."""
    node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print how many slow tests were left out, and the command that runs them."""
    if left_out := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{left_out} slow tests were left out; to run them too: ./scripts/test.sh --all"
        )


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """Restore the signals: a run in this process ignores or blocks some, for its child processes too.

    They are restored before a test too, because a fixture of a module may have run something.
    """
    _restore_signals()
    yield
    _restore_signals()


def _restore_signals() -> None:
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, SIGNAL_MASK)
    for number, handler in SIGNAL_HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """Remove the handlers and the level of the log, which a run in this process sets for its own output."""
    yield
    log.close_log()
    logger = logging.getLogger("torchtitan_lite")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _kernels_forgotten() -> Iterator[None]:
    """A compiled run switches to our own CPU kernel: undo this after each test."""
    yield
    native.forget_kernels()


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> RanksOf:
    """`ranks(4).run(function, *args)` runs a function on four ranks."""
    return functools.partial(Ranks, filters=pytestconfig.getini("filterwarnings"))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty text files, 80 kB in all, with words that a model can learn."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(50)]
    for number in range(40):
        text = " ".join(rng.choices(words, k=rng.randint(10, 700)))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each test module, with short documents in `short.jsonl`."""
    place = tmp_path_factory.mktemp("texts")
    write_documents(place / "short.jsonl")
    return place


@pytest.fixture
def small_run(text_folder: Path, tmp_path: Path) -> list[str]:
    """Options of a run of five steps in the folder `tmp_path / "run"`; it takes a second on a CPU."""
    sizes = {"n_layers": 2, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 64}
    options = {
        "job.dump-folder": tmp_path / "run",
        "job.device": "cpu",
        "model.overrides": sizes,
        "data.dataset": "text",
        "data.path": text_folder,
        "data.cache-dir": text_folder.parent / "cache",
        "training.steps": 5,
        "training.seq-len": 64,
        "training.local-batch-size": 4,
        "training.mixed-precision-param": "float32",
        "metrics.log-freq": 1,
        "metrics.peak-flops": 1e11,
        "metrics.enable-tensorboard": "false",
    }
    return programs.words_of(options)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`run(*words, **variables)` runs a Python command line in `tmp_path` and captures its output.

    An empty environment variable is left out. `fresh`: use a fresh Python instead of a fork that has imported
    torch.
    """

    def run(*words: object, fresh: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = programs.environment(**environment)
        return programs.run(words, fresh=fresh, cwd=tmp_path, env=variables)

    return run
