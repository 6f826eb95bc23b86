"""TensorBoard shows the numbers of metrics.jsonl, also after a run has resumed."""

from pathlib import Path
from typing import Any

import pytest
from hook_cases import DONE, job_with, json_lines, run_info, stats, validation
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from torchtitan_lite.training.hooks import Hooks, jsonl
from torchtitan_lite.training.hooks.jsonl import JsonlConfig
from torchtitan_lite.training.hooks.tensorboard import TensorBoardConfig
from torchtitan_lite.training.metrics import MetricsConfig


def test_tensorboard_has_the_numbers_of_the_file(tmp_path: Path) -> None:
    lines = run(tmp_path, None, 4, loss=2.0)
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    shown = {(e.step, tag): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    written = {(line["step"], tag): value for line in lines for tag, value in line.items() if tag != "step"}
    assert shown == pytest.approx(written)
    assert {tag for _, tag in shown} >= {"loss", "validation_loss", "hooks_fraction"}


def test_a_number_that_is_not_known_is_null_in_the_file_and_no_point(tmp_path: Path) -> None:
    lines = run(tmp_path, None, 4, loss=2.0, peak_flops=1.0)
    assert [line["mfu"] for line in lines if "mfu" in line] == [None] * 4
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert "mfu" not in events.Tags()["scalars"] and "loss" in events.Tags()["scalars"]


@pytest.mark.parametrize(("rank", "enable"), [(0, False), (1, True)])
def test_tensorboard_is_left_out_on_request_and_on_other_ranks(rank: int, enable: bool) -> None:
    job = job_with(metrics=MetricsConfig(enable_tensorboard=enable))
    assert TensorBoardConfig().build(run_info(rank=rank, job=job)) is None


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Step and value of each point that TensorBoard shows."""
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def run(
    folder: Path, resumed_step: int | None, last: int, loss: float, peak_flops: float = 1e9
) -> list[dict[str, Any]]:
    """Report the steps after `resumed_step` (None: a new run) up to `last`, with a validation every third."""
    done = resumed_step or 0
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
    """Rename the file: the names of two files made within a second do not show which one is older."""
    (events,) = (folder / "tb").iterdir()
    events.rename(events.with_name("events.out.tfevents.0000000001.earlier"))


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
    assert (scalars(tmp_path, "loss"), scalars(tmp_path, "validation_loss")) == (shown, validated)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tb"]


def test_a_run_resumed_from_step_0_shows_each_step_once(tmp_path: Path) -> None:
    run(tmp_path, None, 6, loss=1.0)
    make_events_older(tmp_path)
    run(tmp_path, 0, 4, loss=2.0)
    assert scalars(tmp_path, "loss") == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 2.0)]
    # The validation before the first step stays.
    assert scalars(tmp_path, "validation_loss") == [(0, 1.0), (3, 2.0)]


@pytest.mark.parametrize(("resumed_step", "purged_from"), [(None, None), (0, 1), (5, 6)])
def test_only_a_resumed_run_has_tensorboard_hide_earlier_points(
    tmp_path: Path, resumed_step: int | None, purged_from: int | None
) -> None:
    run(tmp_path, resumed_step, 6, loss=1.0)
    (path,) = (tmp_path / "tb").iterdir()
    events = EventFileLoader(str(path)).Load()
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == ([] if purged_from is None else [purged_from])
