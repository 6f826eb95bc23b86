"""A long command shows its progress on standard error."""

import sys

import pytest

from torchtitan_lite.inference import progress


def test_a_terminal_shows_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress.shown([5, 6], 2, "eval")) == [5, 6]
    shown = capsys.readouterr().err
    assert "eval:   0%|" in shown and "0/2" in shown


def test_a_file_gets_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0, 29, 31, 59])
    monkeypatch.setattr(progress, "monotonic", lambda: next(times, 60))
    assert list(progress.shown(range(4), 1000, "eval")) == [0, 1, 2, 3]
    assert capsys.readouterr().err == "eval: 2 of 1,000 batches\n"


def test_a_short_command_leaves_a_file_empty(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.shown(range(3), 3, "eval")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
