"""What the tests of checkpoints share."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_cases import Starts

MODEL = '{"n_layers": 2, "dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 64}'


@pytest.fixture(scope="session")
def starts() -> Starts:
    """Starts real runs; see Starts."""
    return Starts()


@pytest.fixture(scope="session")
def options(text_folder: Path) -> Callable[..., list[str]]:
    """`options(folder, steps, **others)` are those of a small run that saves each step and keeps two."""

    def options(folder: Path, steps: int, **others: object) -> list[str]:
        given = {
            "job.dump-folder": folder,
            "job.device": "cpu",
            "model.overrides": MODEL,
            "data.dataset": "text",
            "data.path": text_folder,
            "data.cache-dir": text_folder.parent / "cache",
            "training.steps": steps,
            "training.seq-len": 64,
            "training.local-batch-size": 2,
            "training.mixed-precision-param": "float32",
            "lr-scheduler.total-steps": 2000,
            "lr-scheduler.warmup-steps": 2,
            "metrics.log-freq": 1,
            "metrics.peak-flops": 1e11,
            "metrics.enable-tensorboard": "false",
            "checkpoint.enable": "true",
            "checkpoint.interval": 1,
            "checkpoint.keep-latest-k": 2,
            **{key.replace("__", ".").replace("_", "-"): value for key, value in others.items()},
        }
        return [word for key, value in given.items() for word in (f"--{key}", str(value))]

    return options


@pytest.fixture(scope="session")
def done_run(tmp_path_factory: pytest.TempPathFactory, starts: Starts, options) -> Path:
    """The folder of a run of three steps, of which the last two are there."""
    folder = tmp_path_factory.mktemp("done") / "run"
    start = starts(options(folder, 3))
    assert start.status == 0, start.err
    return folder


@pytest.fixture
def run_folder(done_run: Path, tmp_path: Path) -> Path:
    """A copy of that run, to go on with."""
    return Path(shutil.copytree(done_run, tmp_path / "run", symlinks=True))
