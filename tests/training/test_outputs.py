"""The run's own folder."""

import errno
import fcntl
import json
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from torchtitan_lite.launch.end import End
from torchtitan_lite.training.outputs import (
    Lines,
    keep_lines,
    lock,
    make_folder,
    set_aside,
    write_exit,
    write_refusal,
)

DONE = End(rank=0, status=0, outcome="done")
REFUSED = End(rank=0, status=2, outcome="refused")


def test_a_given_folder_is_used_as_given(tmp_path: Path) -> None:
    assert make_folder(str(tmp_path / "a" / "b"), "qwen3", "debugmodel") == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert make_folder("~/run", "qwen3", "debugmodel") == tmp_path / "run"


def test_without_one_every_run_gets_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (make_folder("", "qwen3", "debugmodel") for _ in range(2))
    assert first != second
    assert first.parent == second.parent == tmp_path / "outputs"
    assert first.name.startswith("qwen3-debugmodel-")


@pytest.mark.parametrize(
    ("flavor", "size"),
    [
        ("8B", "8B"),
        (".", "here"),
        ("..", "above"),
        ("~/models/Llama", "Llama"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}" * 120, "\N{LATIN SMALL LETTER E WITH ACUTE}" * 60),
    ],
)
def test_the_folder_of_a_model_gives_a_part_of_the_name(
    flavor: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    assert re.fullmatch(rf"hf-{size}-\d{{8}}-\d{{6}}", make_folder("", "hf", flavor).name)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"n_layers": 4, "dim": 128}, "n_layers4-dim128"),
        ({"rope_scaling": {"factor": 8.0}, "qk_norm": False}, "rope_scaling.factor8.0-qk_norm_false"),
        ({"norm": "before / after: *"}, "norm_before_after"),
        ({"steps": [1, 2]}, "steps_1_2"),
        ({"a" * 70: 1, "b" * 70: 2, "c": 3}, "a" * 70 + "1-2more"),
        ({"a" * 300: 1, "c": 3}, "2overrides"),
    ],
)
def test_overrides_are_part_of_the_name(
    overrides: dict[str, object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = make_folder("", "qwen3", "8B_flex", overrides).name
    assert re.fullmatch(rf"qwen3-8B_flex-{re.escape(words)}-\d{{8}}-\d{{6}}", name)


def test_an_earlier_run_in_the_same_folder_is_moved_aside_whole(tmp_path: Path) -> None:
    for run in ("one", "two", "three"):
        folder = make_folder(str(tmp_path), "qwen3", "debugmodel")
        set_aside(folder, ("logs/tb", "traces"))
        assert not (folder / "metrics.jsonl").exists()
        (folder / "metrics.jsonl").write_text(run)
        (folder / "logs" / "tb").mkdir(parents=True)
        write_exit(folder, DONE)
    assert (tmp_path / "earlier" / "metrics.jsonl").read_text() == "one"
    assert (tmp_path / "earlier-2" / "metrics.jsonl").read_text() == "two"
    assert (tmp_path / "earlier" / "logs" / "tb").is_dir()
    assert (tmp_path / "earlier" / "exit.json").is_file()
    assert (tmp_path / "metrics.jsonl").read_text() == "three"


def test_what_no_run_has_made_stays_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    set_aside(make_folder(str(tmp_path), "qwen3", "debugmodel"), ("tb",))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_outcome_is_one_json_object(tmp_path: Path) -> None:
    write_exit(tmp_path, End(rank=1, outcome="non-finite", message="the loss is nan"), step=3)
    assert json.loads((tmp_path / "exit.json").read_text()) == {
        "status": 1,
        "outcome": "non-finite",
        "step": 3,
        "message": "the loss is nan",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


def test_the_outcome_is_written_although_the_folder_was_removed_during_the_run(tmp_path: Path) -> None:
    write_exit(tmp_path / "runs" / "removed", End(rank=0, message="out of memory"))
    assert json.loads((tmp_path / "runs" / "removed" / "exit.json").read_text())["outcome"] == "failed"


def test_lines_that_a_full_disk_does_not_take_are_told_once_and_no_more(caplog) -> None:
    lines = Lines(Path("/dev/full"))
    for step in range(1000):
        lines.write({"step": step})
    lines.close()
    (said,) = caplog.messages
    assert said == "lines of /dev/full are lost: it cannot be written (No space left on device)"


def test_a_refusal_after_a_refusal_keeps_nothing(tmp_path: Path) -> None:
    write_exit(tmp_path, DONE)
    for number in range(3):
        write_refusal(tmp_path, replace(REFUSED, message=f"refusal {number}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier", "exit.json", "lock"]
    assert json.loads((tmp_path / "earlier" / "exit.json").read_text())["outcome"] == "done"
    assert json.loads((tmp_path / "exit.json").read_text())["message"] == "refusal 2"


def test_a_refusal_is_not_left_in_the_folder_of_a_run_that_goes_on(tmp_path: Path) -> None:
    with lock(tmp_path):
        write_refusal(tmp_path, REFUSED)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    write_refusal(tmp_path, REFUSED)
    assert json.loads((tmp_path / "exit.json").read_text())["outcome"] == "refused"


def test_where_there_are_no_locks_a_run_goes_on_and_a_refusal_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOSYS, "no locks")))
    write_exit(tmp_path, DONE)
    lock(tmp_path).close()
    assert "this file system has no locks" in caplog.text
    write_refusal(tmp_path, REFUSED)
    assert json.loads((tmp_path / "exit.json").read_text())["outcome"] == "refused"
    assert json.loads((tmp_path / "earlier" / "exit.json").read_text())["outcome"] == "done"


def test_lines_that_are_not_kept_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\nno JSON\n{"step": "2"}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_lines(path, lambda line: line["step"] < 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    keep_lines(tmp_path / "none", lambda _: True)
    assert [path.name for path in tmp_path.iterdir()] == ["lines.jsonl"]
