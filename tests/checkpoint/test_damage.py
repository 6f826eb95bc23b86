"""Any damage to the files of a published step is found and named, and the step is not used."""

import errno
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from checkpoint_cases import Start, Starts, forged_manifest, publish, tree, whole

from torchtitan_lite.checkpoint.manifest import FORMAT_VERSION, MANIFEST, Damaged, Unreadable, read_manifest
from torchtitan_lite.checkpoint.restore import find_step, load, verify
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.checkpoint.tensors import read_index
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.launch.world import World

FILES = ("index.json", "manifest.json", "state.json", "tensors-0.safetensors")
N_FLIPS = 200

Options = Callable[..., list[str]]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good step, which no test changes."""
    x = torch.linspace(0, 1, 4000)
    return publish(tmp_path_factory.mktemp("good"), 5, pieces=whole({"model.x": x, "optimizer.x.a": x + 1}))


@pytest.fixture
def step(good: Path, tmp_path: Path) -> Path:
    """A copy of the good step, to damage."""
    shutil.copy(good.parent / "latest", tmp_path)
    return Path(shutil.copytree(good, tmp_path / good.name))


def damage_of(folder: Path) -> str:
    with pytest.raises(Damaged) as caught:
        verify(folder, World())
    return str(caught.value)


def test_a_step_that_nothing_happened_to_is_good(good: Path) -> None:
    assert verify(good, World()).state.step == 5
    assert sorted(path.name for path in good.iterdir()) == sorted(FILES)
    assert Steps(good.parent).latest_problem() == ""


def test_every_flipped_byte_is_found_and_the_file_named(step: Path) -> None:
    rng = random.Random(0)
    for number in range(N_FLIPS):
        file = step / FILES[number % len(FILES)]
        content = file.read_bytes()
        flipped = bytearray(content)
        # Formats often leave bytes at the ends of a file unchecked.
        place = rng.choice((rng.randrange(len(content)), rng.randrange(100), -rng.randrange(1, 100)))
        flipped[place] ^= rng.randrange(1, 256)
        file.write_bytes(flipped)
        assert damage_of(step).startswith(f"{file.name} "), place
        file.write_bytes(content)
    verify(step, World())


def test_every_flipped_bit_of_latest_is_found(step: Path) -> None:
    latest = step.parent / "latest"
    content = latest.read_bytes()
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        latest.write_bytes(flipped)
        assert Steps(step.parent).latest_problem().startswith("latest "), place


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("what", ["a byte less", "half", "empty", "a byte more", "missing", "a folder"])
def test_a_file_of_another_length_is_found(step: Path, name: str, what: str) -> None:
    content = (step / name).read_bytes()
    (step / name).unlink()
    if what == "a folder":
        (step / name).mkdir()
    elif what != "missing":
        new = {
            "a byte less": content[:-1],
            "half": content[: len(content) // 2],
            "empty": b"",
            "a byte more": content + b"\0",
        }
        (step / name).write_bytes(new[what])
    assert damage_of(step).startswith(f"{name} ")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_a_link_is_found_even_to_what_was_written(step: Path, name: str) -> None:
    (step / name).rename(step.parent / "elsewhere")
    (step / name).symlink_to(step.parent / "elsewhere")
    assert damage_of(step) == f"{name} is not a file"


def test_a_manifest_that_is_a_pipe_is_found_and_not_waited_for(step: Path) -> None:
    (step / "manifest.json").unlink()
    os.mkfifo(step / "manifest.json")
    assert damage_of(step) == "manifest.json is not a file"


def test_two_files_that_changed_places_are_found(step: Path) -> None:
    content = (step / "state.json").read_bytes()
    (step / "index.json").rename(step / "state.json")
    (step / "index.json").write_bytes(content)
    assert damage_of(step).startswith(("state.json ", "index.json "))


@pytest.mark.parametrize(
    "name", ["tensors-1.safetensors", "notes.txt", ".hidden", "manifest.json.partial", "\udcff\n"]
)
@pytest.mark.parametrize("kind", ["file", "folder", "link", "pipe"])
def test_what_does_not_belong_there_is_found(step: Path, name: str, kind: str) -> None:
    path = step / name
    make = {
        "file": path.touch,
        "folder": path.mkdir,
        "link": lambda: path.symlink_to(step / "state.json"),
        "pipe": lambda: os.mkfifo(path),
    }
    make[kind]()
    assert damage_of(step) == f"{name} does not belong there"


@pytest.mark.parametrize("load_step", [-1, 5])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_refuses_the_start_and_nothing_else_is_taken(
    step: Path, name: str, load_step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def fails(path: Path, *words: Any, **named: Any) -> Any:
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *words, **named)

    monkeypatch.setattr(Path, "open", fails)
    shutil.copytree(step, step.parent / "step-4", dirs_exist_ok=True)
    with pytest.raises(ConfigError, match=rf"{name} cannot be read \(Input/output error\)") as refused:
        find_step(Steps(step.parent), load_step, World())
    assert "holds step 5, which cannot be told to be good or not" in str(refused.value)


def test_an_index_that_only_this_rank_cannot_read_is_not_called_damaged(step: Path, monkeypatch) -> None:
    manifest = read_manifest(step)
    monkeypatch.setattr(Path, "read_bytes", mock.Mock(side_effect=OSError(errno.ESTALE, "Stale file handle")))
    with pytest.raises(Unreadable, match=r"^index\.json cannot be read \(Stale file handle\)$"):
        read_index(step, manifest, World())


def test_a_step_that_cannot_be_read_any_more_after_it_was_verified_is_a_line(step: Path, monkeypatch) -> None:
    found = verify(step, World())
    pieces = whole({name: torch.zeros(x.shape, dtype=x.dtype) for name, x in found.index.items()})
    (step / "tensors-0.safetensors").write_bytes(b"short")
    with pytest.raises(
        ConfigError, match=r"can no longer be read: tensors-0\.safetensors has become shorter"
    ):
        load(found, pieces, World())
    (step / "tensors-0.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"can no longer be read: tensors-0\.safetensors is missing"):
        load(found, pieces, World())
    monkeypatch.setattr(Path, "open", mock.Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(ConfigError, match=r"tensors-0\.safetensors cannot be read \(Input/output error\)"):
        load(found, pieces, World())


def test_a_folder_of_steps_that_cannot_be_read_is_not_taken_for_empty(step: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "listdir", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(ConfigError, match=r"cannot be read \(Permission denied\): see to that"):
        find_step(Steps(step.parent), -1, World())


def test_a_step_of_a_later_version_is_not_passed_over(step: Path) -> None:
    forged_manifest(step, format_version=FORMAT_VERSION + 1)
    with pytest.raises(ConfigError, match=f"{MANIFEST} has format {FORMAT_VERSION + 1}"):
        find_step(Steps(step.parent), -1, World())


def test_a_step_under_the_name_of_another_is_found(step: Path) -> None:
    step.rename(step.parent / "step-6")
    with pytest.raises(ConfigError, match="it is step 5 under another name"):
        find_step(Steps(step.parent), 6, World())
    with pytest.raises(ConfigError, match="it is step 5 under another name"):
        find_step(Steps(step.parent), -1, World())


# --- which step a start takes ---


def flip(step: Path) -> None:
    file = step / "tensors-0.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(step: Path) -> None:
    with (step / "manifest.json").open("r+b") as stream:
        stream.truncate(10)


def link(step: Path) -> None:
    (step / "state.json").rename(step.parent / "state.json")
    (step / "state.json").symlink_to("../state.json")


# By its name, a damage to the newest step and the words that report it.
DAMAGES = {
    "a flipped bit": (flip, "tensors-0.safetensors is not what was written (its SHA-256 differs)"),
    "a short manifest": (truncate, "manifest.json is not what was written"),
    "a missing file": (
        lambda step: (step / "tensors-0.safetensors").unlink(),
        "tensors-0.safetensors is missing",
    ),
    "a foreign file": (lambda step: (step / "x").touch(), "x does not belong there"),
    "a folder inside": (lambda step: (step / "x").mkdir(), "x does not belong there"),
    "a link": (link, "state.json is not a file"),
    "no manifest": (lambda step: (step / "manifest.json").unlink(), "manifest.json is missing"),
}


def said(start: Start) -> str:
    assert "Traceback" not in start.err, start.err
    return start.err


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_step_is_passed_over_loudly_or_refused_where_it_is_asked_for(
    name: str, step: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage, words = DAMAGES[name]
    publish(step.parent, 4)
    damage(step)
    before = tree(step.parent)
    found = find_step(Steps(step.parent), -1, World())
    assert found is not None and found.state.step == 4
    (line,) = caplog.messages
    assert line.startswith(f"step 5 in {step.parent} is DAMAGED and is passed over: {words}")
    with pytest.raises(ConfigError) as refused:
        find_step(Steps(step.parent), 5, World())
    assert str(refused.value).startswith(f"checkpoint.load_step = 5 is damaged: {words}")
    assert tree(step.parent) == before


@pytest.mark.parametrize("name", ["a flipped bit", "no manifest"])
def test_the_newest_good_step_is_taken_loudly_and_the_damaged_one_is_kept_aside(
    starts: Starts, options: Options, run_folder: Path, name: str
) -> None:
    damage, words = DAMAGES[name]
    damage(run_folder / "checkpoint" / "step-3")
    before = tree(run_folder / "checkpoint" / "step-3")
    start = starts(options(run_folder, 4))
    folder = run_folder / "checkpoint"
    assert f"step 3 in {folder} is DAMAGED and is passed over: {words}" in said(start)
    assert f"goes on from step 2 in {folder / 'step-2'}\n" in start.out
    assert f"moved {folder / 'step-3'} to {run_folder / 'earlier' / 'checkpoint'}" in start.err
    assert start.status == 0
    assert tree(run_folder / "earlier" / "checkpoint" / "step-3") == before
    assert Steps(folder).published() == [3, 4]
    assert [verify(Steps(folder).path(step), World()).state.step for step in (3, 4)] == [3, 4]


def test_a_damaged_latest_is_reported_and_written_again(
    starts: Starts, options: Options, run_folder: Path
) -> None:
    (run_folder / "checkpoint" / "latest").write_text("step-1")
    start = starts(options(run_folder, 4))
    assert f"latest in {run_folder / 'checkpoint'} is DAMAGED and is written again" in said(start)
    assert (start.status, "goes on from step 3 " in start.out) == (0, True)
    assert Steps(run_folder / "checkpoint").latest_problem() == ""


def test_a_damaged_step_that_is_asked_for_is_refused(
    starts: Starts, options: Options, run_folder: Path
) -> None:
    damage, words = DAMAGES["a flipped bit"]
    damage(run_folder / "checkpoint" / "step-2")
    before = tree(run_folder / "checkpoint")
    metrics = (run_folder / "metrics.jsonl").read_bytes()
    start = starts(options(run_folder, 4, checkpoint__load_step=2))
    assert start.status == 2
    line = f"checkpoint.load_step = 2 is damaged: {words}"
    assert said(start).startswith(line) and len(start.err.splitlines()) == 1
    assert tree(run_folder / "checkpoint") == before
    assert (run_folder / "metrics.jsonl").read_bytes() == metrics


def test_a_run_whose_steps_are_all_damaged_is_refused_and_nothing_is_touched(
    starts: Starts, options: Options, run_folder: Path
) -> None:
    flip(run_folder / "checkpoint" / "step-2")
    truncate(run_folder / "checkpoint" / "step-3")
    (run_folder / "checkpoint" / "step-1").mkdir()
    before = tree(run_folder)
    start = starts(options(run_folder, 4))
    assert start.status == 2
    last = said(start).splitlines()[-1]
    problems = (
        "step 3: manifest.json is not what was written; step 2: tensors-0.safetensors is not what was written"
    )
    assert re.match(rf"checkpoint\.folder = .* holds no step that is what was written \({problems}", last)
    after = tree(run_folder)
    assert after["earlier/exit.json"] == before["exit.json"]
    outcome = {"exit.json", "lock", "earlier", "earlier/exit.json"}
    assert {name: before[name] for name in before.keys() - outcome} == {
        name: after[name] for name in after.keys() - outcome
    }
