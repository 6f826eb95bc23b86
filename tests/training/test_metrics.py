"""Reports: the console, metrics.jsonl and TensorBoard say the same."""

import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchtitan_lite.training.metrics import Metrics, MetricsConfig, StepStats


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
    with Metrics(config, folder, steps=steps, flops_per_token=3e3, peak_flops=6e6) as metrics:
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
        MetricsConfig(enable_tensorboard=False), tmp_path, steps=1, flops_per_token=1, peak_flops=1
    ) as metrics:
        metrics.log_validation(1, float("nan"))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "validation_loss": null}\n'


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_bar_is_for_terminals(tmp_path: Path, terminal: bool) -> None:
    code = (
        "from pathlib import Path; from torchtitan_lite.training.metrics import Metrics, MetricsConfig\n"
        "config = MetricsConfig(enable_tensorboard=False)\n"
        "Metrics(config, Path('.'), steps=3, flops_per_token=1, peak_flops=1).__exit__()"
    )
    root = Path(__file__).parents[2]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=theirs if terminal else subprocess.PIPE,
            check=True,
        )
        shown = os.read(ours, 10_000) if terminal else done.stderr
    finally:
        os.close(ours)
        os.close(theirs)
    assert (b"0/3" in shown) == terminal
    assert done.stdout == b""


@pytest.mark.parametrize("wrong", [{"log_freq": 0}, {"peak_flops": -1.0}])
def test_a_value_out_of_range_is_a_problem_named_by_its_key(wrong) -> None:
    (problem,) = MetricsConfig(**wrong).problems("metrics")
    assert problem.key == f"metrics.{next(iter(wrong))}"
