"""Garbage collection is rare before the first step, and usual afterwards."""

import gc

import pytest

from torchtitan_lite import train
from torchtitan_lite.training.step import Stepper
from torchtitan_lite.training.trainer import Trainer

USUAL = gc.get_threshold()


def test_garbage_collection_is_rare_until_training_begins(small_run, monkeypatch) -> None:
    seen = []
    begin, step = Trainer.__init__, Stepper.train_step
    look = lambda: seen.append(gc.get_threshold())
    monkeypatch.setattr(Trainer, "__init__", lambda *a, **k: (look(), begin(*a, **k))[1])
    monkeypatch.setattr(Stepper, "train_step", lambda *a: (look(), step(*a))[1])
    assert train.main([*small_run, "--training.steps", "2"]) == 0
    assert seen[0][0] >= 50 * USUAL[0] and seen[1:] == [USUAL, USUAL]
    assert gc.get_threshold() == USUAL and gc.isenabled() and not gc.get_freeze_count()


@pytest.mark.parametrize("words", [["--no-such-option"], ["--dry-run"]])
def test_garbage_collection_is_as_usual_after_a_start_that_fails_or_only_prints(words, capsys) -> None:
    train.main(words)
    assert gc.get_threshold() == USUAL
