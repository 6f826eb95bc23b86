"""The run's own folder."""

import json
from pathlib import Path

import pytest

from torchtitan_lite.training.metrics import MetricsConfig
from torchtitan_lite.training.outputs import new_folder, write_exit
from torchtitan_lite.training.profiling import ProfilingConfig


def test_a_given_folder_is_used_as_given(tmp_path: Path) -> None:
    assert new_folder(str(tmp_path / "a" / "b"), "qwen3", "debugmodel") == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert new_folder("~/run", "qwen3", "debugmodel") == tmp_path / "run"


def test_without_one_every_run_gets_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (new_folder("", "qwen3", "debugmodel") for _ in range(2))
    assert first != second
    assert first.parent == second.parent == tmp_path / "outputs"
    assert first.name.startswith("qwen3-debugmodel-")


def test_an_earlier_run_in_the_same_folder_is_moved_aside_whole(tmp_path: Path) -> None:
    for run in ("one", "two", "three"):
        folder = new_folder(str(tmp_path), "qwen3", "debugmodel", ("logs/tb", "traces"))
        assert not (folder / "metrics.jsonl").exists()
        (folder / "metrics.jsonl").write_text(run)
        (folder / "logs" / "tb").mkdir(parents=True)
        write_exit(folder, 0, "done")
    assert (tmp_path / "earlier" / "metrics.jsonl").read_text() == "one"
    assert (tmp_path / "earlier-2" / "metrics.jsonl").read_text() == "two"
    assert (tmp_path / "earlier" / "logs" / "tb").is_dir()
    assert (tmp_path / "earlier" / "exit.json").is_file()
    assert (tmp_path / "metrics.jsonl").read_text() == "three"


def test_what_no_run_has_made_stays_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    new_folder(str(tmp_path), "qwen3", "debugmodel", ("tb",))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_outcome_is_one_json_object(tmp_path: Path) -> None:
    write_exit(tmp_path, 1, "non-finite", step=3, message="the loss is nan")
    assert json.loads((tmp_path / "exit.json").read_text()) == {
        "status": 1,
        "outcome": "non-finite",
        "step": 3,
        "message": "the loss is nan",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


@pytest.mark.parametrize(
    "folder", ["", ".", "..", "../tb", "tb/../../tb", "/tmp/tb", "metrics.jsonl", "earlier/tb"]
)
def test_a_subfolder_outside_the_runs_folder_is_a_problem(folder: str) -> None:
    (problem,) = MetricsConfig(save_tb_folder=folder).problems("metrics")
    assert problem.key == "metrics.save_tb_folder"
    (problem,) = ProfilingConfig(save_traces_folder=folder).problems("profiling")
    assert problem.key == "profiling.save_traces_folder"
