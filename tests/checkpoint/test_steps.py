"""Folders of steps: which of them count, how a step gets its name, and that only steps are removed."""

import logging
import os
from pathlib import Path

import pytest
from checkpoint_cases import tree

from torchtitan_lite.checkpoint.manifest import MANIFEST
from torchtitan_lite.checkpoint.steps import LATEST, Steps

NOT_STEPS = (
    "step-05",
    "step-5x",
    "step--5",
    " step-5",
    "step-5\n",
    "step-٣",
    "step-5.tmp-0123abcd",
)


@pytest.fixture
def steps(tmp_path: Path) -> Steps:
    """Steps 1, 2, 3 and 10."""
    found = Steps(tmp_path / "checkpoint")
    for number in (10, 1, 3, 2):
        made(found, number)
    return found


def made(steps: Steps, number: int) -> None:
    """Publish a folder with a manifest and a file in it."""
    scratch = steps.scratch(number)
    (scratch / MANIFEST).write_text(f"of {number}")
    (scratch / "shard").write_text("x")
    steps.publish(scratch, number)


def names(steps: Steps) -> list[str]:
    return sorted(os.listdir(steps.folder))


def test_steps_are_numbers_in_their_order(steps: Steps) -> None:
    assert steps.published() == [1, 2, 3, 10]
    made(steps, 0)
    assert steps.published() == [0, 1, 2, 3, 10]


def test_no_folder_is_no_step(tmp_path: Path) -> None:
    assert Steps(tmp_path / "none").published() == []
    Steps(tmp_path / "none").clean()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", NOT_STEPS)
def test_a_folder_of_another_name_is_no_step_and_stays(steps: Steps, name: str) -> None:
    (steps.folder / name).mkdir()
    assert steps.published() == [1, 2, 3, 10]
    steps.keep_latest(1)
    assert steps.published() == [10]
    assert (steps.folder / name).is_dir()


def test_files_and_links_are_no_steps_and_stay(steps: Steps, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    (steps.folder / "step-4").touch()
    (steps.folder / "step-5").symlink_to(tmp_path / "elsewhere")
    (steps.folder / "step-0").symlink_to(steps.path(1))
    (steps.folder / "step-6").symlink_to("nowhere")
    assert steps.published() == [1, 2, 3, 10]
    steps.keep_latest(1)
    assert names(steps) == ["latest", "step-0", "step-10", "step-4", "step-5", "step-6"]
    assert (tmp_path / "elsewhere" / "precious").exists()


def test_nothing_is_removed_through_a_link_inside_a_step(steps: Steps, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    (steps.path(1) / "link").symlink_to(tmp_path / "elsewhere")
    (steps.folder / "step-9.tmp-00000000").mkdir()
    (steps.folder / "step-9.tmp-00000000" / "link").symlink_to(tmp_path / "elsewhere")
    steps.keep_latest(1)
    steps.clean()
    assert names(steps) == ["latest", "step-10"]
    assert (tmp_path / "elsewhere" / "precious").exists()


def test_nothing_is_removed_where_the_folder_itself_is_a_link(
    steps: Steps, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "link").symlink_to(steps.folder)
    steps.scratch(4)
    before = tree(steps.folder)
    linked = Steps(tmp_path / "link")
    linked.keep_latest(1)
    linked.clean()
    assert tree(steps.folder) == before
    assert caplog.messages == [f"{tmp_path / 'link'} is a link: its old steps stay"]


def test_half_a_step_never_has_a_step_s_name(steps: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fails(path: object, *_: object, **__: object) -> None:
        seen.append(steps.published())
        raise OSError("no")

    monkeypatch.setattr("torchtitan_lite.checkpoint.steps.shutil.rmtree", fails)
    with pytest.raises(OSError, match="no"):
        steps.keep_latest(3)
    assert seen == [[2, 3, 10]] and steps.published() == [2, 3, 10]
    monkeypatch.undo()
    steps.clean()
    assert names(steps) == ["latest", "step-10", "step-2", "step-3"]


def test_what_was_left_is_removed_and_told_and_nothing_else(
    steps: Steps, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    stays = [
        "step-4.tmp-0123456",
        "step-4.tmp-0123abcg",
        "step-x.tmp-0123abcd",
        "step-4.tmp-0123abcd.bak",
        "tmp",
    ]
    for name in [*stays, "step-4.tmp-0123abcd", "step-1.tmp-ffffffff"]:
        (steps.folder / name).mkdir()
        (steps.folder / name / "shard").touch()
    (steps.folder / "step-7.tmp-0123abcd").symlink_to(steps.folder / "tmp")
    (steps.folder / "step-8.tmp-0123abcd").touch()
    steps.clean()
    links = ["step-7.tmp-0123abcd", "step-8.tmp-0123abcd"]
    assert names(steps) == sorted(["latest", "step-1", "step-2", "step-3", "step-10", *stays, *links])
    assert (steps.folder / "tmp" / "shard").exists()
    assert caplog.messages == [
        f"removed {steps.folder / name}, which a run that was stopped had left"
        for name in ("step-1.tmp-ffffffff", "step-4.tmp-0123abcd")
    ]


@pytest.mark.parametrize("kind", ["step", "empty folder", "file", "link", "dangling link"])
def test_a_name_that_is_there_is_never_published_over(steps: Steps, tmp_path: Path, kind: str) -> None:
    target = steps.path(4)
    make = {
        "step": lambda: made(steps, 4),
        "empty folder": target.mkdir,
        "file": target.touch,
        "link": lambda: target.symlink_to(steps.path(3)),
        "dangling link": lambda: target.symlink_to(tmp_path / "nowhere"),
    }
    make[kind]()
    before = tree(steps.folder)
    scratch = steps.scratch(4)
    (scratch / MANIFEST).write_text("another")
    with pytest.raises(FileExistsError, match="step-4 is there already"):
        steps.publish(scratch, 4)
    assert (scratch / MANIFEST).exists()
    (scratch / MANIFEST).unlink()
    scratch.rmdir()
    assert tree(steps.folder) == before
    assert not (tmp_path / "nowhere").exists()


def test_latest_names_the_step_that_was_published_last(steps: Steps) -> None:
    assert steps.latest_problem() == ""
    assert (steps.folder / LATEST).read_bytes().startswith(b"step-2 manifest-sha256:")
    steps.point_to(10)
    assert (steps.folder / LATEST).read_bytes().startswith(b"step-10 manifest-sha256:")
    assert steps.latest_problem() == "" and "latest.partial" not in names(steps)


def test_a_latest_that_names_nothing_good_is_told_and_written_again(
    steps: Steps, caplog: pytest.LogCaptureFixture
) -> None:
    (steps.path(2) / MANIFEST).write_text("changed")
    assert "names no step that is there with the manifest" in steps.latest_problem()
    (steps.folder / LATEST).unlink()
    assert steps.latest_problem() == ""  # no pointer misleads nobody
    (steps.folder / LATEST).write_bytes(b"step-3\n")
    steps.point_to(3)
    assert "latest in" in caplog.text and "DAMAGED" in caplog.text
    assert steps.latest_problem() == ""


def test_steps_set_aside_are_whole_where_they_are_moved_to(steps: Steps, tmp_path: Path) -> None:
    before = {step: tree(steps.path(step)) for step in (3, 10)}
    steps.set_aside([3, 10], tmp_path / "earlier" / "checkpoint")
    assert steps.published() == [1, 2]
    for step, content in before.items():
        assert tree(tmp_path / "earlier" / "checkpoint" / f"step-{step}") == content
