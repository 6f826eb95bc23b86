"""What all tests share."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from parallel_cases import write_documents
from ranks import Pools

from torchtitan_lite.attention import native
from torchtitan_lite.attention.native import CXX

ROOT = Path(__file__).parents[1]

# The tests' tensors are small: more threads spend their time waiting for each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU or a compiler where there is none, and say so."""
    absent = {}
    if not torch.cuda.is_available():
        absent["gpu"] = "no CUDA GPU here (torch.cuda.is_available() is False)"
    if not shutil.which(CXX):
        absent["compiler"] = f"no C++ compiler here ({CXX} is not on PATH; CXX names another)"
    for item in items:
        for marker in absent.keys() & item.keywords.keys():
            item.add_marker(pytest.mark.skip(reason=absent[marker]))


@pytest.fixture(autouse=True)
def _kernels_forgotten() -> Iterator[None]:
    """What a compiled run uses from then on is not used by the next test."""
    yield
    native.forget_kernels()


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> Iterator[Pools]:
    """`ranks(4).run(function, *args)` runs a function on four ranks; a pool is started when first used."""
    pools = Pools(pytestconfig.getini("filterwarnings"))
    yield pools
    pools.stop()


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents, 80 kB in all, with words that a model can learn."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(50)]
    for number in range(40):
        text = " ".join(rng.choices(words, k=rng.randint(10, 700)))
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a module's own, with short documents in `short.jsonl`."""
    place = tmp_path_factory.mktemp("texts")
    write_documents(place / "short.jsonl")
    return place


@pytest.fixture
def small_run(text_folder: Path, tmp_path: Path) -> list[str]:
    """Options of a run of five steps that takes a second on a CPU, in the folder `tmp_path / "run"`."""
    overrides = '{"n_layers": 2, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 64}'
    options = {
        "job.dump-folder": tmp_path / "run",
        "job.device": "cpu",
        "model.overrides": overrides,
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
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a Python command line in `tmp_path` and keeps what it prints; an empty variable is left out."""

    def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        changed = {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=tmp_path,
            env={key: value for key, value in changed.items() if value},
            capture_output=True,
            text=True,
            check=False,
        )

    return run
