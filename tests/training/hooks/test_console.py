"""Lines on the console, and the progress bar."""

import math
import os
import pty
import re
import termios
from pathlib import Path

import programs
import pytest
from hook_cases import DONE, job_with, run_info, started, stats, validation

from torchtitan_lite.training.hooks import console
from torchtitan_lite.training.hooks.console import Console, ConsoleConfig
from torchtitan_lite.training.metrics import MetricsConfig

JOB = job_with(metrics=MetricsConfig(log_freq=4, peak_flops=6e6))


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that a run of four steps prints."""
    hooks = started(ConsoleConfig(), run_info(job=JOB))
    for step in range(1, 5):
        hooks.step(stats(step, seconds=0.5 * step, data_seconds=0.0))
    hooks.validated(validation(4, 3.5))
    hooks.end(DONE)
    return capsys.readouterr().out.splitlines()


def test_a_report_is_a_row_below_the_names_of_its_columns(capsys) -> None:
    names, first, last, _ = lines(capsys)
    assert " ".join(names.split()) == "time step loss norm lr tok/s MFU memory elapsed left"
    assert re.fullmatch(r"\d\d:\d\d:\d\d", last.split()[0])
    assert first.split()[1:8] == ["1", "2.5000", "1.250", "1.00e-03", "200", "10.0%", "0.75G"]
    assert last.split()[1:8] == ["4", "2.5000", "1.250", "1.00e-03", "67", "3.3%", "0.75G"]
    assert len({len(names), len(first), len(last)}) == 1


def test_a_validation_is_a_row_with_the_loss_in_its_column(capsys) -> None:
    *_, last, validated = lines(capsys)
    assert validated[8:].endswith("       4  3.5000 validation loss per token; 1.7500 per byte")
    assert validated.index("3.5000") == last.index("2.5000")


@pytest.mark.parametrize(
    ("data_seconds", "hook_seconds", "notes"),
    [
        (0.01, 0.01, []),
        (0.5, 0.0, ["33% of the time waiting for data"]),
        (0.05, 0.25, ["17% of the time in hooks"]),
        (0.5, 0.5, ["33% of the time waiting for data, 33% of the time in hooks"]),
    ],
)
def test_waiting_and_hooks_are_mentioned_only_from_a_notable_share_of_the_time_on(
    data_seconds: float, hook_seconds: float, notes: list[str], capsys
) -> None:
    hooks = started(ConsoleConfig(), run_info(job=JOB, n_steps=9))
    hooks.step(stats(4, seconds=1.5, hook_seconds=hook_seconds, data_seconds=data_seconds))
    hooks.end(DONE)
    assert [line.strip() for line in capsys.readouterr().out.splitlines()[2:]] == notes


EXTREMES: list[dict[str, float]] = [
    {"step": 1, "loss": 0.0, "grad_norm": 0.0, "lr": 0.0, "tokens_per_second": 0.4, "mfu": 0.0},
    {"step": 10_000_000, "loss": 1e5, "grad_norm": 1e5, "lr": 1e-10, "tokens_per_second": 1e9, "mfu": 1.0},
    {"step": 99_999_999, "loss": 1e30, "grad_norm": 1e300, "lr": 1e-300, "tokens_per_second": 1e15},
    {"step": 10**12, "loss": -1e-9, "grad_norm": 1e-9, "lr": 123456.0, "tokens_per_second": 999.6},
    {"loss": math.nan, "grad_norm": math.inf, "lr": math.nan, "tokens_per_second": math.inf, "mfu": math.nan},
    {"loss": -math.inf, "grad_norm": 99999.96, "lr": 1.0, "tokens_per_second": 99_960, "mfu": 0.99951},
    {"loss": -12345.678, "grad_norm": 9999.9999, "lr": -1e-100, "tokens_per_second": 1e40, "mfu": 1e-9},
]


@pytest.mark.parametrize("seconds", [0.0, 59.6, 36_000.0, 9e5, 8.64e7, 1e12])
@pytest.mark.parametrize("numbers", EXTREMES)
@pytest.mark.parametrize("memory", [0.0, 0.004, 139.25, 1e5, 1e9])
def test_no_number_makes_a_line_longer_than_78_columns_or_joins_two_columns(
    numbers: dict[str, float], memory: float, seconds: float, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, *[seconds] * 9])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    hook = Console(MetricsConfig())
    hook.start(run_info(job=JOB, n_steps=10**12 + 1))
    hook._reported.append((0, 0.0))
    record = {"step": 7, "mfu": 0.5, "data_wait_fraction": 0.99, "hooks_fraction": 0.99, **numbers}
    hook.write({**record, "peak_memory_gib": memory})
    hook.validated(validation(int(record["step"]), record["loss"]))
    names, row, note, validated = capsys.readouterr().out.splitlines()
    assert max(map(len, (names, row, note, validated))) <= 78
    assert len(row.split()) == len(names.split()) == 10
    ends = [match.end() for match in re.finditer(r"\S+", names)]
    assert [match.end() for match in re.finditer(r"\S+", row)] == ends


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.4, "0"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (9_996, "10.0k"),
        (123_456, "123k"),
        (1e9, "1.00G"),
    ],
)
def test_a_speed_has_three_digits(value: float, shown: str) -> None:
    assert console._count(value, 5) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.4, "0:00:00"),
        (3_599.6, "1:00:00"),
        (35_999, "9:59:59"),
        (36_000, "10h00m"),
        (359_999, "99h59m"),
        (360_000, "4d04h"),
        (math.nan, "-"),
    ],
)
def test_a_duration_has_the_unit_that_fits(seconds: float, shown: str) -> None:
    assert console.duration(seconds) == shown


def test_the_time_left_follows_from_the_recent_speed_of_this_process(
    capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    job = job_with(metrics=MetricsConfig(log_freq=10, peak_flops=6e6))
    hooks = started(ConsoleConfig(), run_info(job=job, n_steps=1000, resumed_step=500))
    for step in range(501, 1001):
        now += 100.0 if step == 501 else 4.0 if step < 700 else 1.0
        hooks.step(stats(step, data_seconds=0.0))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "loss" not in line]
    left = {int(row[1]): row[-1] for row in rows}
    elapsed = {int(row[1]): row[-2] for row in rows}
    assert left[510] == "0:32:40"  # 490 steps of 4 s: neither the slow first step nor the 500 before count
    assert elapsed[510] == "0:02:16"
    assert (left[999 // 10 * 10], left[1000]) == ("0:00:10", "0:00:00")


def test_after_its_first_step_a_process_does_not_know_how_much_time_is_left(capsys) -> None:
    hooks = started(ConsoleConfig(), run_info(job=JOB))
    hooks.step(stats(1, data_seconds=0.0))
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "-"
    hooks.end(DONE)


def test_the_names_of_the_columns_come_again(capsys) -> None:
    job = job_with(metrics=MetricsConfig(log_freq=1, peak_flops=6e6))
    hooks = started(ConsoleConfig(), run_info(job=job, n_steps=50))
    for step in range(1, 51):
        hooks.step(stats(step, data_seconds=0.0))
    hooks.end(DONE)
    shown = capsys.readouterr().out.splitlines()
    assert [number for number, line in enumerate(shown) if "elapsed" in line] == [0, 21, 42]


def test_other_ranks_print_nothing() -> None:
    assert ConsoleConfig().build(run_info(rank=1)) is None


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_has_a_progress_bar(tmp_path: Path, terminal: bool) -> None:
    code = (
        "from hook_cases import *; from torchtitan_lite.training.hooks.console import *\n"
        "job = job_with(metrics=MetricsConfig(peak_flops=1.0))\n"
        "started(ConsoleConfig(), run_info(n_steps=3, resumed_step=2, job=job)).end(DONE)"
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
