"""Reports: the console, metrics.jsonl and TensorBoard say the same."""

import json
import os
import pty
import termios
from pathlib import Path

import programs
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from torchtitan_lite.training.metrics import Metrics, MetricsConfig, StepStats, cut


def stats(step: int, **changes) -> StepStats:
    values = {
        "loss": 2.5,
        "grad_norm": 1.25,
        "lr": 1e-3,
        "n_tokens": 100,
        "seconds": 0.5,
        "data_seconds": 0.05,
    }
    return StepStats(step=step, **{**values, **changes})


def report(folder: Path, config: MetricsConfig, *, steps: int = 4) -> list[dict]:
    with Metrics(config, folder, steps=steps, flops_per_token=3e3, peak_flops=lambda: 6e6) as metrics:
        for step in range(1, steps + 1):
            metrics.log(stats(step, seconds=0.5 * step), peak_memory_gib=0.75)
        metrics.log_validation(steps, 3.5)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_speed_is_tokens_over_the_time_of_the_steps_since_the_last_report(tmp_path: Path) -> None:
    _, _, last, _ = report(tmp_path, MetricsConfig(log_freq=2, enable_tensorboard=False))
    assert last == {
        "step": 4,
        "loss": 2.5,
        "grad_norm": 1.25,
        "lr": 1e-3,
        "n_tokens_seen": 400,
        "tokens_per_second": pytest.approx(200 / 3.5),
        "mfu": pytest.approx(200 / 3.5 * 3e3 / 6e6),
        "peak_memory_gib": 0.75,
        "data_wait_fraction": pytest.approx(0.1 / 3.5),
    }


def test_the_first_the_last_and_every_log_freqth_step_are_reported(tmp_path: Path) -> None:
    lines = report(tmp_path, MetricsConfig(log_freq=3, enable_tensorboard=False), steps=8)
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 6, 8]


def test_a_validation_line_holds_the_step_and_the_loss_alone(tmp_path: Path) -> None:
    assert report(tmp_path, MetricsConfig(enable_tensorboard=False))[-1] == {
        "step": 4,
        "validation_loss": 3.5,
    }


def test_tensorboard_holds_what_the_file_holds(tmp_path: Path) -> None:
    lines = report(tmp_path, MetricsConfig(log_freq=1, save_tb_folder="logs/tb"))
    events = EventAccumulator(str(tmp_path / "logs" / "tb"))
    events.Reload()
    shown = {(e.step, tag): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    written = {(line["step"], tag): value for line in lines for tag, value in line.items() if tag != "step"}
    assert shown == pytest.approx(written)


def test_tensorboard_can_be_left_out(tmp_path: Path) -> None:
    report(tmp_path, MetricsConfig(enable_tensorboard=False))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_the_console_has_one_readable_line_for_each_report(tmp_path: Path, capsys) -> None:
    report(tmp_path, MetricsConfig(log_freq=4, enable_tensorboard=False))
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/4 ")
    for part in (
        "step 4/4",
        "loss  2.5000",
        "gradient norm   1.250",
        "lr 1.00e-03",
        "67 tokens/s",
        "0.75 GiB",
    ):
        assert part in last
    assert "MFU 3.3%" in last


def test_a_loss_that_is_no_number_is_null_in_the_file(tmp_path: Path) -> None:
    with Metrics(
        MetricsConfig(enable_tensorboard=False), tmp_path, steps=1, flops_per_token=1, peak_flops=lambda: 1.0
    ) as metrics:
        metrics.log_validation(1, float("nan"))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "validation_loss": null}\n'


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Step and value of what TensorBoard shows."""
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def run(folder: Path, resumed_step: int | None, last: int, loss: float) -> list[dict]:
    """Report the steps after `resumed_step`, or of a new run, to `last`, with a validation every third."""
    done = resumed_step or 0
    if resumed_step is not None:
        cut(folder, resumed_step, validated=resumed_step // 3 * 3)
    with Metrics(
        MetricsConfig(log_freq=1),
        folder,
        steps=12,
        flops_per_token=1,
        peak_flops=lambda: 1.0,
        resumed_step=resumed_step,
        n_tokens_seen=100 * done,
    ) as metrics:
        if resumed_step is None:
            metrics.log_validation(0, loss)
        for step in range(done + 1, last + 1):
            metrics.log(stats(step, loss=loss), peak_memory_gib=0.0)
            if step % 3 == 0:
                metrics.log_validation(step, loss)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def make_events_older(folder: Path) -> None:
    """Within a second, names do not tell TensorBoard which file is the older one."""
    (events,) = (folder / "tb").iterdir()
    events.rename(events.with_name("events.out.tfevents.0000000001.earlier"))


@pytest.mark.parametrize(
    "torn", [b'{"step": 10, "lo', b'{"step": 3', b"\0\0\0", b"\xff\n", b"7\n", b'{"loss": 1}\n', b""]
)
def test_a_run_that_goes_on_reports_each_step_once(tmp_path: Path, torn: bytes) -> None:
    run(tmp_path, None, 9, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    make_events_older(tmp_path)
    lines = run(tmp_path, 6, 12, loss=2.0)
    shown = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert shown == [(step, 1.0 if step < 7 else 2.0) for step in range(1, 13)]
    # One at the very step from which it goes on stays.
    validated = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    assert validated == [(0, 1.0), (3, 1.0), (6, 1.0), (9, 2.0), (12, 2.0)]
    assert [line["n_tokens_seen"] for line in lines if "loss" in line] == list(range(100, 1300, 100))
    assert (scalars(tmp_path, "loss"), scalars(tmp_path, "validation_loss")) == (shown, validated)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tb"]


def test_a_run_that_goes_on_before_its_first_step_shows_each_step_once(tmp_path: Path) -> None:
    run(tmp_path, None, 6, loss=1.0)
    make_events_older(tmp_path)
    run(tmp_path, 0, 4, loss=2.0)
    assert scalars(tmp_path, "loss") == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 2.0)]
    # One of a validation before the first step stays.
    assert scalars(tmp_path, "validation_loss") == [(0, 1.0), (3, 2.0)]


@pytest.mark.parametrize(("resumed_step", "purged_from"), [(None, None), (0, 1), (5, 6)])
def test_tensorboard_is_told_to_forget_only_by_a_run_that_goes_on(
    tmp_path: Path, resumed_step: int | None, purged_from: int | None
) -> None:
    run(tmp_path, resumed_step, 6, loss=1.0)
    (path,) = (tmp_path / "tb").iterdir()
    events = EventFileLoader(str(path)).Load()
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == ([] if purged_from is None else [purged_from])


@pytest.mark.parametrize(("validated", "left"), [(-1, []), (0, [0]), (2, [0, 2]), (3, [0, 2, 3])])
def test_a_validation_that_the_resumed_step_does_not_know_of_is_dropped(
    tmp_path: Path, validated: int, left: list[int]
) -> None:
    for step in range(5):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": {step}, "loss": 1.0}}\n')
            file.write(f'{{"step": {step}, "validation_loss": null}}\n' if step != 1 else "")
    cut(tmp_path, 3, validated)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_loss" in line] == left
    assert [line["step"] for line in lines if "loss" in line] == [0, 1, 2, 3]


def test_a_whole_last_line_stays_also_without_its_end(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    cut(tmp_path, 2, -1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_cut_that_fails_leaves_what_was_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError("the disk is full")

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="full"):
        cut(tmp_path, 1, -1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_nothing_is_cut_where_nothing_was_reported(tmp_path: Path) -> None:
    cut(tmp_path, 3, 3)
    cut(tmp_path / "nowhere", 3, 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_bar_is_for_terminals(tmp_path: Path, terminal: bool) -> None:
    code = (
        "from pathlib import Path; from torchtitan_lite.training.metrics import Metrics, MetricsConfig\n"
        "config = MetricsConfig(enable_tensorboard=False)\n"
        "Metrics(config, Path('.'), steps=3, flops_per_token=1, peak_flops=float, resumed_step=2).__exit__()"
    )
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    try:
        done = programs.run(["-c", code], cwd=tmp_path, stderr=theirs if terminal else programs.PIPE)
        assert done.returncode == 0
        shown = os.read(ours, 10_000).decode() if terminal else done.stderr
    finally:
        os.close(ours)
        os.close(theirs)
    assert ("2/3" in shown) == terminal
    assert done.stdout == ""


@pytest.mark.parametrize("wrong", [{"log_freq": 0}, {"peak_flops": -1.0}])
def test_a_value_out_of_range_is_a_problem_named_by_its_key(wrong) -> None:
    (problem,) = MetricsConfig(**wrong).problems("metrics")
    assert problem.key == f"metrics.{next(iter(wrong))}"
