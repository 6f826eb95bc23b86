"""Saves during a run: in the background, and saves that fail."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import checkpoint_cases as cases_of_steps
import parallel_cases
import pytest
import resume_cases as cases
import torch
from checkpoint_cases import no_space, whole
from resume_cases import main, options, outcome, steps_in

from torchtitan_lite import durable
from torchtitan_lite.checkpoint import CheckpointConfig, SaveFailed, save
from torchtitan_lite.checkpoint.restore import load, verify
from torchtitan_lite.checkpoint.save import Saver, Snapshot
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.launch import world
from torchtitan_lite.launch.world import World
from torchtitan_lite.training.step import Stepper

MODES = pytest.mark.parametrize("mode", ["disabled", "async"])
BACKGROUND = pytest.mark.parametrize("mode", ["async", "async_with_pinned_mem"])
WITHIN = 30.0
"""Seconds that a test waits for a thread."""


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """Wait for all saves: a process that ends with a thread inside torch may crash."""
    yield
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(WITHIN)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options of a run of six steps that saves every second."""
    folder = tmp_path_factory.mktemp("texts")
    parallel_cases.write_documents(folder / "short.jsonl")
    changes = {"training__steps": 6, "training__local_batch_size": 8, "checkpoint__interval": 2}
    off = ["--validation.no-enable", "--validation.freq", "500"]
    return [*cases.run_of(folder / "short.jsonl", folder / "cache", **changes), *off]


@pytest.fixture
def go(words: list[str], tmp_path: Path) -> Callable[..., int]:
    """`go(key=value)` starts the run in `tmp_path / "run"`: its status."""

    def go(**changes: object) -> int:
        return main(*words, *options(job__dump_folder=tmp_path / "run", **changes))

    return go


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`full_at(4)`: the disk is full while step 4 is written."""

    write = save.write_step

    def full_at(step: int) -> None:
        def write_step(steps: Steps, snapshot: Snapshot, *more: Any) -> int:
            if snapshot.state.step != step:
                return write(steps, snapshot, *more)
            with no_space(2**14):  # less than a step needs
                return write(steps, snapshot, *more)

        monkeypatch.setattr(save, "write_step", write_step)

    return full_at


def known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every training step know whether the save before it has failed."""
    failed = Saver.has_failed.fget
    assert failed is not None
    monkeypatch.setattr(Saver, "has_failed", property(lambda saver: saver.wait() or failed(saver)))


def trained(folder: Path) -> list[int]:
    return [line["step"] for line in cases.lines(folder)]


def good_steps(folder: Path) -> list[int]:
    """Return the published steps, after asserting that all are good and nothing else is there."""
    steps = Steps(folder / "checkpoint")
    assert steps_in(folder) == sorted(["latest", *(f"step-{step}" for step in steps.published())])
    assert [verify(steps.path(step), World()).state.step for step in steps.published()] == steps.published()
    assert steps.latest_problem() == ""
    return steps.published()


def test_a_full_disk_ends_the_run_and_keeps_the_steps_before(go, full_at, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    full_at(4)
    assert go() == 1
    message = (
        f"step 4 could not be saved ([Errno {errno.EFBIG}] File too large); step 2 is the newest that was"
    )
    assert outcome(folder) == {"status": 1, "outcome": "not-saved", "step": 4, "message": message}
    assert capsys.readouterr().err == f"error: {message}\n"
    assert good_steps(folder) == [2]
    full_at(0)
    assert go() == 0
    assert good_steps(folder) == [2, 4, 6]
    assert trained(folder) == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_in_the_background_ends_the_run_at_the_next_step(
    go, full_at, tmp_path: Path, monkeypatch
) -> None:
    folder = tmp_path / "run"
    known_at_once(monkeypatch)
    full_at(2)
    assert go(checkpoint__async_mode="async", checkpoint__interval=2) == 1
    left = outcome(folder)
    assert (left["status"], left["outcome"], left["step"]) == (1, "not-saved", 3)
    assert left["message"].endswith("File too large); none was before")
    assert steps_in(folder) == []


def test_where_not_even_the_outcome_can_be_written_it_is_said(
    go, full_at, tmp_path: Path, monkeypatch, capsys
) -> None:
    full_at(4)
    replaced = durable.replaced

    def full(path: Path) -> Any:
        if path.name == "exit.json":
            raise OSError(errno.ENOSPC, "No space left")
        return replaced(path)

    monkeypatch.setattr(durable, "replaced", full)
    assert go() == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"exit.json in {tmp_path / 'run'} cannot be written (No space left)"
    assert second.startswith("error: step 4 could not be saved (")
    full_at(0)
    assert go() == 0
    assert capsys.readouterr().err.splitlines()[-1] == first


@MODES
def test_where_the_run_is_to_go_on_it_says_so_and_saves_when_there_is_room(
    mode: str, go, full_at, tmp_path: Path, caplog
) -> None:
    folder = tmp_path / "run"
    full_at(2)
    assert go(checkpoint__on_failure="continue", checkpoint__async_mode=mode) == 0
    said = [record.getMessage() for record in caplog.records if "could not be saved" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("step 2 could not be saved (") and said[0].endswith("; the run goes on")
    assert good_steps(folder) == [4, 6]
    assert outcome(folder)["outcome"] == "done"


@MODES
def test_the_last_step_has_to_be_saved_whatever_the_policy(mode: str, go, full_at, tmp_path: Path) -> None:
    full_at(6)
    assert go(checkpoint__on_failure="continue", checkpoint__async_mode=mode) == 1
    assert outcome(tmp_path / "run")["message"].endswith("step 4 is the newest that was")
    assert good_steps(tmp_path / "run") == [2, 4]


def test_a_failure_on_one_rank_ends_all_at_the_same_step(ranks, words: list[str], tmp_path: Path) -> None:
    mesh = options(
        job__dump_folder=tmp_path,
        training__local_batch_size=4,
        training__steps=60,
        checkpoint__async_mode="async",
        checkpoint__interval=20,  # the next save would bring all together by itself
        parallelism__data_parallel_shard_degree=2,
    )
    argv = [*words, *mesh, "--lr-scheduler.total-steps", "60"]
    first, second = ranks(2).run(cases.start_with_a_failing_rank, argv, 1, timeout=60)
    assert 20 < first.ended == second.ended < 40
    assert "No space left on device" in first.failure and "No space left on device" in second.failure
    assert "step 20 could not be saved (rank 1: OSError: " in first.failure


class Held:
    """Holds back the writing of steps until a training step is reached, and counts the writes at a time."""

    def __init__(self, patch: pytest.MonkeyPatch, *, until: int, only: int = -1) -> None:
        self.reached, self.at_a_time, self.most = threading.Event(), 0, 0
        self.wrote: dict[int, int] = {}
        """By published step, the training step at that time."""
        self.hashes: dict[int, dict[str, str]] = {}
        """By training step, the hashes of the weights after it."""
        self.until, self.only, self.step = until, only, 0
        write, step = save.write_step, Stepper.train_step

        def write_step(steps: Steps, snapshot: Snapshot, *more: Any) -> int:
            self.at_a_time += 1
            self.most = max(self.most, self.at_a_time)
            if only in (-1, snapshot.state.step):
                assert self.reached.wait(WITHIN)
            n_bytes = write(steps, snapshot, *more)
            self.wrote[snapshot.state.step] = self.step
            self.at_a_time -= 1
            return n_bytes

        def train_step(stepper: Stepper, *words: Any) -> Any:
            stats, state = step(stepper, *words), stepper.state
            self.step = state.step
            self.hashes[state.step] = {
                f"model.{name}": cases.hash_of(weight.detach()) for name, weight in state.parameters.items()
            }
            if state.step == until:
                self.reached.set()
            return stats

        patch.setattr(save, "write_step", write_step)
        patch.setattr(Stepper, "train_step", train_step)


def saved_hashes(folder: Path) -> dict[str, str]:
    """Return a hash of each weight in a step."""
    found = verify(folder, World())
    pieces = whole({name: torch.zeros(x.shape, dtype=x.dtype) for name, x in found.index.items()})
    load(found, pieces, World())
    return {name: cases.hash_of(piece.local) for name, piece in pieces.items() if name.startswith("model.")}


@BACKGROUND
def test_training_goes_on_while_a_copy_is_written(mode: str, go, tmp_path: Path, monkeypatch, capsys) -> None:
    held = Held(monkeypatch, until=4, only=2)
    assert go(checkpoint__async_mode=mode, checkpoint__interval=2, training__steps=6) == 0
    assert held.wrote[2] >= 4
    assert good_steps(tmp_path / "run") == [2, 4, 6]
    for step in (2, 4, 6):
        assert saved_hashes(tmp_path / "run" / "checkpoint" / f"step-{step}") == held.hashes[step]
    assert held.hashes[2] != held.hashes[4]
    said = [line for line in capsys.readouterr().out.splitlines() if " saved: " in line]
    assert [line.split()[1] for line in said] == ["2", "4", "6"]
    words = said[0].split()
    seconds, still = float(words[words.index("in") + 1]), float(words[-2])
    assert still <= seconds
    assert said[0].endswith(f"; training stood still for {words[-2]} s")


def test_one_step_is_written_at_a_time(go, tmp_path: Path, monkeypatch) -> None:
    held = Held(monkeypatch, until=1)
    write = save.write_step

    def slowly(*words: Any) -> int:
        time.sleep(0.1)
        return write(*words)

    monkeypatch.setattr(save, "write_step", slowly)
    assert go(checkpoint__async_mode="async", checkpoint__interval=1) == 0
    assert held.most == 1
    assert good_steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    for step in range(1, 7):
        assert saved_hashes(tmp_path / "run" / "checkpoint" / f"step-{step}") == held.hashes[step]


@MODES
def test_numbers_that_are_not_finite_keep_the_steps_before(
    mode: str, go, tmp_path: Path, monkeypatch, capsys
) -> None:
    folder = tmp_path / "run"
    began, loss_of, write = threading.Event(), Stepper.loss_of, save.write_step

    def nan_at_five(stepper: Stepper, batch: Any) -> Any:
        loss, count = loss_of(stepper, batch)
        began.set() if stepper.state.step == 4 else None
        return loss * (float("nan") if stepper.state.step == 4 else 1.0), count

    def write_step(steps: Steps, snapshot: Snapshot, *more: Any) -> int:
        if mode == "async" and snapshot.state.step == 4:  # still written when the loss is nan
            assert began.wait(WITHIN)
            time.sleep(0.3)
        return write(steps, snapshot, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "loss_of", nan_at_five)
        patch.setattr(save, "write_step", write_step)
        assert go(checkpoint__async_mode=mode) == 1
    assert "of step 5 is nan" in capsys.readouterr().err
    assert (outcome(folder)["outcome"], outcome(folder)["step"]) == ("non-finite", 4)
    assert good_steps(folder) == [2, 4]
    assert go(checkpoint__async_mode=mode) == 0
    assert trained(folder) == [1, 2, 3, 4, 5, 6]
    assert good_steps(folder) == [2, 4, 6]


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_stop_saves_the_present_step_although_the_one_before_failed(
    policy: str, go, full_at, tmp_path: Path, monkeypatch, caplog
) -> None:
    folder, step = tmp_path / "run", Stepper.train_step

    def stopped(stepper: Stepper, flags: Callable[[], tuple[bool, bool]]) -> Any:
        is_asked = stepper.state.step == 2
        return step(stepper, lambda: (is_asked, flags()[1]))

    known_at_once(monkeypatch)
    monkeypatch.setattr(Stepper, "train_step", stopped)
    full_at(2)
    assert go(checkpoint__async_mode="async", checkpoint__on_failure=policy) == 75
    assert good_steps(folder) == [3]
    (said,) = (record.getMessage() for record in caplog.records if "could not be" in record.getMessage())
    assert said.startswith("step 2 could not be saved (") and said.endswith("; none was before")


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_step_that_is_being_written_is_finished_before_an_exception_ends_the_run(
    error: type[BaseException], go, tmp_path: Path, monkeypatch
) -> None:
    folder, failing = tmp_path / "run", threading.Event()
    write, step = save.write_step, Stepper.train_step

    def write_step(steps: Steps, snapshot: Snapshot, *more: Any) -> int:
        if snapshot.state.step == 4:
            assert failing.wait(WITHIN)
            time.sleep(0.3)
        return write(steps, snapshot, *more)

    def fail(stepper: Stepper, *words: Any) -> Any:
        if stepper.state.step == 5:
            failing.set()
            raise error
        return step(stepper, *words)

    with monkeypatch.context() as patch:
        patch.setattr(save, "write_step", write_step)
        patch.setattr(Stepper, "train_step", fail)
        with pytest.raises(KeyError) if error is KeyError else nullcontext():
            assert go(checkpoint__async_mode="async") == 130
    assert good_steps(folder) == [2, 4]


def snapshot(step: int, value: float = 0.0) -> Snapshot:
    return cases_of_steps.snapshot(step, whole({"model.weight": torch.full((4,), value)}))


def saver(folder: Path, said: list[str] | None = None, **changes: Any) -> Saver:
    words: list[str] = [] if said is None else said
    config = CheckpointConfig(enable=True, **changes)
    return Saver(config, Steps(folder), World(), say=words.append)


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    said: list[str] = []
    own = saver(tmp_path, said)
    own.save(3, lambda: snapshot(3))
    own.save(3, lambda: snapshot(3, 1.0), last=True)
    assert len(said) == 1 and Steps(tmp_path).published() == [3]


@pytest.mark.parametrize(("n", "left"), [(1, [5]), (2, [4, 5]), (0, [1, 2, 3, 4, 5])])
def test_only_the_newest_steps_are_kept(n: int, left: list[int], tmp_path: Path) -> None:
    own = saver(tmp_path, keep_latest_k=n)
    for step in range(1, 6):
        own.save(step, partial(snapshot, step))
    assert Steps(tmp_path).published() == left
    assert json.loads((tmp_path / "step-5" / "state.json").read_text())["step"] == 5


def test_old_steps_that_cannot_be_removed_are_a_warning(tmp_path: Path, monkeypatch, caplog) -> None:
    own = saver(tmp_path, keep_latest_k=1)
    own.save(1, lambda: snapshot(1))
    monkeypatch.setattr(save.Steps, "keep_latest", lambda *_: (_ for _ in ()).throw(OSError(5, "gone")))
    own.save(2, lambda: snapshot(2))
    assert "old steps in" in caplog.text and Steps(tmp_path).published() == [1, 2]


def test_a_published_step_whose_name_may_not_last_is_told_and_the_one_before_is_kept(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    own = saver(tmp_path, keep_latest_k=1)
    own.save(1, lambda: snapshot(1))

    def sync(path: Path) -> None:
        if path == tmp_path:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(durable, "sync", sync)
    own.save(2, lambda: snapshot(2))
    assert f"{tmp_path / 'step-2'} is there, but may not outlast a power cut" in caplog.text
    assert own.saved == 2 and Steps(tmp_path).published() == [1, 2]


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_step_with_a_file_that_is_not_there_is_not_published(
    harm: str, tmp_path: Path, monkeypatch
) -> None:
    gather = World.gather

    def lose(ranks: World, value: Any) -> Any:
        for file in tmp_path.glob("step-*/*.safetensors"):  # as on a machine that does not share the folder
            file.unlink() if harm == "gone" else os.truncate(file, 10)
        return gather(ranks, value)

    monkeypatch.setattr(World, "gather", lose)
    words = {"gone": "tensors-0.safetensors is missing", "cut": "tensors-0.safetensors has 10 bytes, and "}[
        harm
    ]
    with pytest.raises(SaveFailed, match=rf"step 1 could not be saved \({words}"):
        saver(tmp_path).save(1, lambda: snapshot(1))
    assert list(tmp_path.iterdir()) == []


def test_a_rank_gives_signs_of_life_while_one_write_takes_long(tmp_path: Path, monkeypatch) -> None:
    alive, sync, seen = [], os.fsync, []

    def slow_sync(descriptor: int) -> None:
        if not seen:
            seen.append(len(alive))
            cases.wait_until(lambda: len(alive) >= seen[0] + 2)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow_sync)
    monkeypatch.setattr(world, "_PERIOD", 0.02)
    monkeypatch.setattr(World, "alive", lambda ranks: alive.append(1))
    own = saver(tmp_path)
    own.save(1, lambda: snapshot(1))
    assert len(alive) >= 2 and Steps(tmp_path).published() == [1]


@BACKGROUND
def test_where_there_is_no_room_for_a_copy_the_save_has_failed(
    mode: str, tmp_path: Path, monkeypatch
) -> None:
    own = saver(tmp_path, async_mode=mode)
    with monkeypatch.context() as patch:
        patch.setattr(save, "_copy", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
        own.save(1, lambda: snapshot(1))
    assert own.has_failed
    with pytest.raises(SaveFailed, match=r"step 1 could not be saved \(no room\); none was before"):
        own.report()


class AtOnce(threading.Thread):
    """A thread whose `start` returns when the thread has ended."""

    def start(self) -> None:
        super().start()
        self.join()


@pytest.fixture
def failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Saver:
    """A saver whose save of step 1 has failed in the background, which is not reported yet."""
    own = saver(tmp_path, async_mode="async")
    with monkeypatch.context() as patch:
        patch.setattr(world.threading, "Thread", AtOnce)
        patch.setattr(save, "write_step", lambda *_: (_ for _ in ()).throw(OSError(28, "no room")))
        own.save(1, lambda: snapshot(1))  # must not raise: another rank may not know yet
    assert own.has_failed
    return own


def test_a_failure_in_the_background_is_reported_by_the_next_save(tmp_path: Path, failed: Saver) -> None:
    with pytest.raises(SaveFailed, match=r"step 1 could not be saved \(.*no room\); none was before"):
        failed.save(2, lambda: snapshot(2))
    assert not failed.has_failed
    failed.save(2, lambda: snapshot(2), last=True)
    assert Steps(tmp_path).published() == [2]


def test_the_last_step_is_saved_although_the_one_before_failed(tmp_path: Path, failed: Saver, caplog) -> None:
    failed.save(2, lambda: snapshot(2), last=True)
    assert "step 1 could not be saved" in caplog.text
    assert Steps(tmp_path).published() == [2]


def test_a_failed_exchange_between_the_ranks_ends_the_run_in_any_case(tmp_path: Path, monkeypatch) -> None:
    own = saver(tmp_path, on_failure="continue")
    own.world = World(size=2)
    monkeypatch.setattr(save, "write_step", mock.Mock(side_effect=RuntimeError("Timed out waiting")))
    own._write(snapshot(1), 0.0, None)
    with pytest.raises(SaveFailed, match="Timed out waiting"):
        own.report()
