"""Lines on the console, and the progress bar."""

import os
import pty
import termios
from pathlib import Path

import programs
import pytest
from hook_cases import DONE, job_with, run_info, started, stats, validation

from torchtitan_lite.training.hooks.console import ConsoleConfig
from torchtitan_lite.training.metrics import MetricsConfig

JOB = job_with(metrics=MetricsConfig(log_freq=4, peak_flops=6e6))


def lines(capsys: pytest.CaptureFixture[str], hook_seconds: float = 0.0) -> list[str]:
    """The lines that a run of four steps prints."""
    hooks = started(ConsoleConfig(), run_info(job=JOB))
    for step in range(1, 5):
        hooks.step(stats(step, seconds=0.5 * step, hook_seconds=hook_seconds))
    hooks.validated(validation(4, 3.5))
    hooks.end(DONE)
    return capsys.readouterr().out.splitlines()


def test_a_report_is_one_readable_line(capsys) -> None:
    first, last, _ = lines(capsys)
    assert first.startswith("step 1/4 ")
    for part in (
        "step 4/4",
        "loss  2.5000",
        "gradient norm   1.250",
        "lr 1.00e-03",
        "67 tokens/s",
        "0.75 GiB",
        "MFU 3.3%",
    ):
        assert part in last


def test_a_validation_is_a_line_with_the_loss_and_that_of_byte_frequencies(capsys) -> None:
    assert lines(capsys)[-1] == (
        "step 4/4  validation loss 3.5000 nats per token, 1.7500 per byte (byte frequencies alone: 3.0000)"
    )


@pytest.mark.parametrize(("hook_seconds", "end"), [(0.014, "data wait 3.3%"), (0.06, "  hooks 4.0%")])
def test_hooks_are_mentioned_only_from_one_percent_of_the_time_on(
    hook_seconds: float, end: str, capsys
) -> None:
    assert lines(capsys, hook_seconds)[1].endswith(end)


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
