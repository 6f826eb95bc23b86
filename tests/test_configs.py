"""Every file in configs/ is a valid run."""

from pathlib import Path

import pytest

from torchtitan_lite import train
from torchtitan_lite.config.job import load_job

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.toml"))


def test_there_are_files_for_the_debug_run_and_for_both_families() -> None:
    assert "debugmodel.toml" in FILES
    assert {Path(file).parent.name for file in FILES} == {"", "qwen3", "llama3"}


@pytest.mark.parametrize("file", FILES)
def test_a_dry_run_prints_toml_that_loads_back_to_the_same_config(file: str, capsys, tmp_path: Path) -> None:
    argv = ["--config", str(CONFIGS / file), "--dry-run"]
    assert train.main(argv) == 0
    printed = tmp_path / "printed.toml"
    printed.write_text(capsys.readouterr().out)
    assert load_job(["--config", str(printed)]).config == load_job(argv).config


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["sdpa", "flex", "varlen"])
def test_every_run_accepts_every_attention_backend(file: str, kind: str) -> None:
    job = load_job(["--config", str(CONFIGS / file), "--model.attention", kind, "--job.device", "cpu"]).config
    assert job.decoder.attention.kind == kind


@pytest.mark.parametrize("file", [file for file in FILES if "debugmodel" not in file])
@pytest.mark.parametrize(("replicate", "cp", "tp"), [(1, 1, 1), (2, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
def test_every_large_run_accepts_meshes_of_eight_ranks(file: str, replicate: int, cp: int, tp: int) -> None:
    mesh = {
        "data-parallel-replicate-degree": replicate,
        "context-parallel-degree": cp,
        "tensor-parallel-degree": tp,
    }
    argv = [f"--parallelism.{name}={degree}" for name, degree in mesh.items()]
    loaded = load_job(["--config", str(CONFIGS / file), "--dry-run", "--world-size", "8", *argv])
    degrees = loaded.config.parallelism.degrees(loaded.world_size)
    assert degrees.sizes == (replicate, 8 // (replicate * cp * tp), cp, tp)


@pytest.mark.parametrize("file", [file for file in FILES if "debugmodel" not in file])
def test_a_file_is_named_after_its_preset(file: str) -> None:
    model = load_job(["--config", str(CONFIGS / file), "--dry-run"]).config.model
    assert f"{model.name}/{model.flavor.partition('_')[0]}.toml" == file
