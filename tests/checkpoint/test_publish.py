"""A run killed at any point of a save goes on from the last published step as if nothing had happened."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import Start, Starts, die_in_save, publish
from ranks import RankFailed, RanksOf

from torchtitan_lite.checkpoint.manifest import read_manifest
from torchtitan_lite.checkpoint.restore import find_step, verify
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.launch.world import World

CHECKPOINT = "torchtitan_lite.checkpoint"
SAVING = {"armed_by": f"{CHECKPOINT}.save.write_step"}
SCRATCH = re.compile(r"step-\d+\.tmp-")

Options = Callable[..., list[str]]


def dies(at: str, when: str, n: int = 1, **others: str) -> dict[str, Any]:
    return {**SAVING, "at": at.replace("checkpoint:", f"{CHECKPOINT}."), "when": when, "n": n, **others}


SYNC = "torchtitan_lite.durable.sync"
# Where a process dies while it saves step 4, by what is on the disk then; and whether step 4 is published.
# It syncs the file of tensors, then the three other files and the folder, then the folder of steps.
POINTS = {
    "nothing": (dies("checkpoint:steps.Steps.scratch", "before"), False),
    "empty scratch folder": (dies("checkpoint:steps.Steps.scratch", "after"), False),
    "half of the tensors": (dies("checkpoint:tensors._bytes_of", "after", 40), False),
    "tensors": (dies(SYNC, "before", 1), False),
    "index": (dies("checkpoint:save.write_tensors", "after"), False),
    "state": (dies("checkpoint:save._write_state", "after"), False),
    "half a manifest": (
        dies("checkpoint:steps.Steps.publish", "before", halve=f"{CHECKPOINT}.manifest.Manifest.text"),
        False,
    ),
    "manifest": (dies(SYNC, "after", 3), False),
    "all but the name": (dies("pathlib.Path.rename", "before", 1), False),
    "the name": (dies(SYNC, "before", 6), True),
    "the name, for good": (dies(SYNC, "after", 6), True),
    "half of the new latest": (
        dies("pathlib.Path.rename", "before", 2, halve=f"{CHECKPOINT}.steps.Steps._pointer"),
        True,
    ),
    "the new latest under another name": (dies("pathlib.Path.rename", "before", 2), True),
    "the new latest": (dies("pathlib.Path.rename", "after", 2), True),
    "the oldest step under another name": (dies("shutil.rmtree", "before"), True),
    "half of the oldest step": (dies("os.unlink", "after", 2), True),
    "no oldest step": (dies("shutil.rmtree", "after"), True),
}
IN_BACKGROUND = (
    "half of the tensors",
    "half a manifest",
    "all but the name",
    "the name",
    "half of the oldest step",
)


@pytest.fixture(scope="module")
def straight(starts: Starts, options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last step of the same run, never killed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    assert starts(options(folder, 5)).status == 0
    return folder / "checkpoint" / "step-5"


def resumed_from(start: Start) -> int:
    found = re.search(r"^goes on from step (\d+) in ", start.out, re.MULTILINE)
    assert found, start
    return int(found[1])


def left_over(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoint").iterdir() if SCRATCH.match(path.name)]


def tensors(step: Path) -> dict[str, Any]:
    """Return the digests of a step's files of tensors."""
    return {name: file for name, file in read_manifest(step).files.items() if name.endswith(".safetensors")}


def check_goes_on(folder: Path, start: Start, expected: int, left: list[str]) -> None:
    """Assert that the `start` after a kill removed `left`, went on from step `expected` and did the rest."""
    assert (start.status, resumed_from(start)) == (0, expected), start
    assert "Traceback" not in start.err and "DAMAGED" not in start.err
    for name in left:
        assert f"removed {folder / 'checkpoint' / name}, which a run that was stopped had left" in start.err
    assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["latest", "step-4", "step-5"]
    steps = Steps(folder / "checkpoint")
    assert [verify(steps.path(step), World()).state.step for step in (4, 5)] == [4, 5]
    assert steps.latest_problem() == ""
    logged = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("mode", "point"),
    [("disabled", name) for name in POINTS] + [("async", name) for name in IN_BACKGROUND],
)
def test_a_run_killed_while_it_saves_goes_on_from_the_last_published_step(
    starts: Starts, options: Options, run_folder: Path, straight: Path, mode: str, point: str
) -> None:
    fault, is_published = POINTS[point]
    words = options(run_folder, 5, checkpoint__async_mode=mode)
    assert starts(words, fault).status == -9
    left = left_over(run_folder)
    assert len(left) <= 1
    assert (run_folder / "checkpoint" / "step-4").exists() == is_published
    check_goes_on(run_folder, starts(words), 4 if is_published else 3, left)
    assert tensors(run_folder / "checkpoint" / "step-5") == tensors(straight)


def test_the_points_leave_what_they_say(starts: Starts, options: Options, run_folder: Path) -> None:
    """Without this, the test above could kill at one harmless moment again and again."""
    newest = run_folder / "checkpoint" / "step-3"
    assert starts(options(run_folder, 5), POINTS["half of the tensors"][0]).status == -9
    (scratch,) = left_over(run_folder)
    (half,) = (run_folder / "checkpoint" / scratch).iterdir()
    assert 0 < half.stat().st_size < (newest / half.name).stat().st_size
    assert starts(options(run_folder, 5), POINTS["half a manifest"][0]).status == -9
    (scratch,) = left_over(run_folder)
    size = (run_folder / "checkpoint" / scratch / "manifest.json").stat().st_size
    assert 0 < size < (newest / "manifest.json").stat().st_size
    assert starts(options(run_folder, 5), POINTS["half of the new latest"][0]).status == -9
    pointer = run_folder / "checkpoint" / "latest"
    assert 0 < pointer.with_name("latest.partial").stat().st_size < pointer.stat().st_size
    assert starts(options(run_folder, 6), POINTS["half of the oldest step"][0]).status == -9
    (scratch,) = left_over(run_folder)
    assert 0 < len(list((run_folder / "checkpoint" / scratch).iterdir())) < 4


@pytest.mark.parametrize(
    "fault",
    [
        {"at": "pathlib.Path.rename", "when": "before", "n": 1},
        {"at": "pathlib.Path.rename", "when": "after", "n": 1},
        {"at": "torchtitan_lite.training.hooks.jsonl.cut", "when": "before", "n": 1},
    ],
    ids=["before", "after", "before the metrics are cut"],
)
def test_a_run_killed_while_it_sets_a_damaged_step_aside_loses_nothing(
    starts: Starts, options: Options, run_folder: Path, fault: dict[str, Any]
) -> None:
    shard = run_folder / "checkpoint" / "step-3" / "tensors-0.safetensors"
    shard.write_bytes(damaged := shard.read_bytes()[:-1])
    fault = {**fault, "armed_by": f"{CHECKPOINT}.steps.Steps.set_aside"}
    assert starts(options(run_folder, 4), fault).status == -9
    start = starts(options(run_folder, 4))
    assert (start.status, resumed_from(start)) == (0, 2), start
    assert "Traceback" not in start.err
    aside = list(run_folder.glob("earlier*/checkpoint/step-3/tensors-0.safetensors"))
    assert [path.read_bytes() for path in aside] == [damaged]
    assert Steps(run_folder / "checkpoint").published() == [3, 4]


def sweep(starts: Starts, words: list[str], folder: Path, delays: list[float]) -> list[str]:
    """Kill a run `delays` seconds after a save began, again and again; return what each kill left behind."""
    steps, seen = Steps(folder / "checkpoint"), []
    for delay in delays:
        newest = steps.published()[-1]
        start = starts(words, {**SAVING, "delay": delay})
        assert start.status == -9, start
        assert "Traceback" not in start.err and "DAMAGED" not in start.err
        assert resumed_from(start) == newest
        seen += left_over(folder) or ["nothing"]
        assert len(left_over(folder)) <= 1
        for step in steps.published():
            assert verify(steps.path(step), World()).state.step == step
    return seen


BIGGER = '{"n_layers": 4, "dim": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "ffn_dim": 1024}'


def check_sweep(starts: Starts, options: Options, folder: Path, mode: str, n: int) -> None:
    bigger: dict[str, object] = {"model__overrides": BIGGER, "training__seq_len": 16}
    first = starts(options(folder, 1, **bigger))
    found = re.search(r"step 1 saved: .* MiB in (.*) s; training", first.out)
    assert found, first
    rng, seconds = random.Random(n), 0.05 + 1.5 * float(found[1])
    delays = [seconds * (part + rng.random()) / n for part in range(n)]
    rng.shuffle(delays)
    words = options(folder, 2000, checkpoint__async_mode=mode, **bigger)
    assert set(sweep(starts, words, folder, delays)) != {"nothing"}, "no kill hit a save"
    last = Steps(folder / "checkpoint").published()[-1]
    end = starts(options(folder, last + 1, checkpoint__async_mode=mode, **bigger))
    assert (end.status, resumed_from(end)) == (0, last), end
    assert left_over(folder) == []


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_run_killed_at_any_moment_goes_on_from_the_last_published_step(
    starts: Starts, options: Options, tmp_path: Path, mode: str
) -> None:
    check_sweep(starts, options, tmp_path / "run", mode, 6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_run_killed_at_many_moments_goes_on_each_time(
    starts: Starts, options: Options, tmp_path: Path, mode: str
) -> None:
    check_sweep(starts, options, tmp_path / "run", mode, 24)


@pytest.mark.parametrize(
    ("rank", "fault"),
    [
        (1, {"at": "os.fsync", "when": "before", "n": 1, "until": "*/tensors-0.safetensors"}),
        (1, {"at": "os.fsync", "when": "after", "n": 1}),
        (0, {"at": "os.fsync", "when": "before", "n": 1, "until": "*/tensors-1.safetensors"}),
        (0, {"at": f"{CHECKPOINT}.steps.Steps.publish", "when": "before", "n": 1}),
    ],
    ids=["before its file", "after its file", "the first, before its file", "the first, before the name"],
)
def test_a_rank_killed_between_the_files_leaves_the_step_before(
    ranks: RanksOf, tmp_path: Path, rank: int, fault: dict[str, Any]
) -> None:
    publish(tmp_path, 1)
    if "until" in fault:
        fault = {**fault, "folder": str(tmp_path), "waits": fault["at"]}
    with pytest.raises(RankFailed, match=f"rank {rank} of 2 failed:\nthe process died with exit code -9"):
        ranks(2).run(die_in_save, tmp_path, rank, fault)
    steps = Steps(tmp_path)
    steps.clean()
    found = find_step(steps, -1, World())
    assert found is not None and found.state.step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1"]
