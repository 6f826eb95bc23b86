"""TensorBoard shows the numbers of metrics.jsonl, also after a run has resumed."""

import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hook_cases import DONE, job_with, json_lines, run_info, stats, validation
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from torch.utils.tensorboard import SummaryWriter

from torchtitan_lite.training.hooks import Hooks, jsonl
from torchtitan_lite.training.hooks.jsonl import JsonlConfig
from torchtitan_lite.training.hooks.tensorboard import TensorBoard, TensorBoardConfig
from torchtitan_lite.training.metrics import MetricsConfig
from torchtitan_lite.training.validation import ValidationConfig

TAGS = {
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/lr",
    "n_tokens_seen": "speed/n_tokens_seen",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "data_wait_fraction": "speed/data_wait_fraction",
    "hooks_fraction": "speed/hooks_fraction",
    "peak_memory_gib": "memory/peak_memory_gib",
}


def test_tensorboard_has_the_numbers_of_the_file_in_groups(tmp_path: Path) -> None:
    lines = run(tmp_path / "mine", None, 4, loss=2.0)
    events = shown_in(tmp_path / "mine" / "tb" / "mine")
    shown = {(e.step, tag): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    written = {
        (line["step"], TAGS[key]): value
        for line in lines
        for key, value in line.items()
        if key not in ("step", "time")
    }
    assert shown == pytest.approx(written)
    assert {tag for _, tag in shown} == set(TAGS.values())


def test_a_number_without_a_group_of_its_own_is_shown_too(tmp_path: Path) -> None:
    board = TensorBoard(MetricsConfig(peak_flops=1.0))
    board.start(run_info(folder=tmp_path))
    board.write({"step": 3, "temperature": 70.0})
    board.end(DONE)
    assert [e.value for e in shown_in(tmp_path / "tb" / tmp_path.name).Scalars("other/temperature")] == [70.0]


def test_a_number_that_is_not_known_is_no_point(tmp_path: Path) -> None:
    board = TensorBoard(MetricsConfig(peak_flops=1.0))
    board.start(run_info(folder=tmp_path))
    board.write({"step": 3, "loss": 2.0, "mfu": math.nan})
    board.end(DONE)
    assert shown_in(tmp_path / "tb" / tmp_path.name).Tags()["scalars"] == ["loss/train"]


def test_the_losses_of_training_and_validation_are_two_runs_of_one_chart(tmp_path: Path) -> None:
    run(tmp_path, None, 3, loss=2.0)
    place = tmp_path / "tb" / tmp_path.name
    assert [e.step for e in shown_in(place / "train").Scalars("loss")] == [1, 2, 3]
    assert [e.step for e in shown_in(place / "validation").Scalars("loss")] == [0, 3]


def test_a_run_without_validation_is_one_run(tmp_path: Path) -> None:
    board = TensorBoard(MetricsConfig(peak_flops=1.0))
    board.start(run_info(folder=tmp_path, job=job_with(validation=ValidationConfig())))
    board.step(stats(1))
    board.end(DONE)
    (events,) = (path for path in (tmp_path / "tb").rglob("*") if path.is_file())
    assert events.parent == tmp_path / "tb" / tmp_path.name


def test_configuration_and_plan_are_texts_of_each_start(tmp_path: Path) -> None:
    run(tmp_path, None, 6, loss=1.0)
    for _ in range(2):
        make_events_older(tmp_path)
        run(tmp_path, 3, 6, loss=1.0)
    events = shown_in(tmp_path / "tb" / tmp_path.name)
    texts = {  # a set, because this reader does not purge texts as TensorBoard's own does
        tag: {(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)}
        for tag in events.Tags()["tensors"]
    }
    configuration = "    # ranks: 1\n\n    [job]\n    note = '```'\n"
    plan = "    ranks: 1\n    plan"
    assert texts == {
        "configuration/text_summary": {(1, configuration), (4, configuration)},
        "plan/text_summary": {(1, plan), (4, plan)},
    }


def test_a_resumed_run_keeps_its_name_when_its_folder_has_moved(tmp_path: Path) -> None:
    folder = tmp_path / "first"
    run(folder, None, 6, loss=1.0)
    for name, resumed in (("second", 3), ("third", 0)):
        folder = folder.rename(tmp_path / name)
        make_events_older(folder)
        run(folder, resumed, 6, loss=2.0)
    assert [path.name for path in (folder / "tb").iterdir()] == ["first"]
    assert scalars(folder, "loss/train") == [(step, 2.0) for step in range(1, 7)]


def test_a_full_disk_is_reported_once_and_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    board = TensorBoard(MetricsConfig(peak_flops=1.0))
    board.start(run_info(folder=tmp_path))
    monkeypatch.setattr(SummaryWriter, "add_scalar", Mock(side_effect=OSError(28, "no space")))
    for step in (1, 2):
        board.step(stats(step))
    board.end(DONE)
    assert caplog.messages == ["nothing more is written for TensorBoard (no space)"]


def test_a_number_that_is_not_known_is_null_in_the_file_and_no_point(tmp_path: Path) -> None:
    lines = run(tmp_path, None, 4, loss=2.0, peak_flops=1.0)
    assert [line["mfu"] for line in lines if "mfu" in line] == [None] * 4
    (board,) = (tmp_path / "tb").iterdir()
    events = EventAccumulator(str(board))
    events.Reload()
    assert "speed/mfu" not in events.Tags()["scalars"] and "loss/train" in events.Tags()["scalars"]


@pytest.mark.parametrize(("rank", "enable"), [(0, False), (1, True)])
def test_tensorboard_is_left_out_on_request_and_on_other_ranks(rank: int, enable: bool) -> None:
    job = job_with(metrics=MetricsConfig(enable_tensorboard=enable))
    assert TensorBoardConfig().build(run_info(rank=rank, job=job)) is None


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Step and value of each point that TensorBoard shows."""
    (place,) = (folder / "tb").iterdir()
    return [(event.step, event.value) for event in shown_in(place).Scalars(tag)]


def shown_in(folder: Path) -> EventAccumulator:
    """Return the data that TensorBoard reads from `folder`."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def run(
    folder: Path, resumed_step: int | None, last: int, loss: float, peak_flops: float = 1e9
) -> list[dict[str, Any]]:
    """Report the steps after `resumed_step` (None: a new run) up to `last`, with a validation every third."""
    done = resumed_step or 0
    folder.mkdir(exist_ok=True)
    if resumed_step is not None:
        jsonl.cut(folder, resumed_step, validated=resumed_step // 3 * 3)
    metrics = MetricsConfig(log_freq=1, peak_flops=peak_flops)
    info = run_info(folder=folder, n_steps=12, resumed_step=resumed_step, job=job_with(metrics=metrics))
    hooks = Hooks({"file": JsonlConfig(), "board": TensorBoardConfig()}, info)
    hooks.start()
    if resumed_step is None:
        hooks.validated(validation(0, loss))
    for step in range(done + 1, last + 1):
        hooks.step(stats(step, loss=loss))
        if step % 3 == 0:
            hooks.validated(validation(step, loss))
    hooks.end(DONE)
    return json_lines(folder / "metrics.jsonl")


def make_events_older(folder: Path) -> None:
    """Rename the files: the names of two files made within a second do not show which one is older."""
    for place in {path.parent for path in (folder / "tb").rglob("events.*")}:
        for number, path in enumerate(sorted(place.glob("events.*"))):
            path.rename(path.with_name(f"events.out.tfevents.000000000{number}.earlier"))


@pytest.mark.parametrize(
    "torn", [b'{"step": 10, "lo', b'{"step": 3', b"\0\0\0", b"\xff\n", b"7\n", b'{"loss": 1}\n', b""]
)
def test_a_resumed_run_reports_each_step_once(tmp_path: Path, torn: bytes) -> None:
    run(tmp_path, None, 9, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    make_events_older(tmp_path)
    lines = run(tmp_path, 6, 12, loss=2.0)
    shown = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert shown == [(step, 1.0 if step < 7 else 2.0) for step in range(1, 13)]
    # The validation at the step that the run resumes from stays.
    validated = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    assert validated == [(0, 1.0), (3, 1.0), (6, 1.0), (9, 2.0), (12, 2.0)]
    assert [line["n_tokens_seen"] for line in lines if "loss" in line] == list(range(100, 1300, 100))
    assert (scalars(tmp_path, "loss/train"), scalars(tmp_path, "loss/validation")) == (shown, validated)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tb"]


def test_a_run_resumed_from_step_0_shows_each_step_once(tmp_path: Path) -> None:
    run(tmp_path, None, 6, loss=1.0)
    make_events_older(tmp_path)
    run(tmp_path, 0, 4, loss=2.0)
    assert scalars(tmp_path, "loss/train") == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 2.0)]
    # The validation before the first step stays.
    assert scalars(tmp_path, "loss/validation") == [(0, 1.0), (3, 2.0)]


@pytest.mark.parametrize(("resumed_step", "purged_from"), [(None, None), (0, 1), (5, 6)])
def test_only_a_resumed_run_has_tensorboard_hide_earlier_points(
    tmp_path: Path, resumed_step: int | None, purged_from: int | None
) -> None:
    run(tmp_path, resumed_step, 6, loss=1.0)
    for path in (tmp_path / "tb").rglob("events.*"):
        events = EventFileLoader(str(path)).Load()
        starts = [event.step for event in events if event.HasField("session_log")]
        assert starts == ([] if purged_from is None else [purged_from])
