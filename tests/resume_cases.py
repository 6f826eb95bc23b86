"""Starts of a run inside this process or inside ranks, for the tests of resuming."""

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from parallel_cases import here, precision, whole
from programs import words_of
from torch import Tensor

from torchtitan_lite import train
from torchtitan_lite.checkpoint import CheckpointConfig, SaveFailed, save
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.launch import process
from torchtitan_lite.launch.signals import StopRequest
from torchtitan_lite.launch.world import World
from torchtitan_lite.run_folder import RunFolder
from torchtitan_lite.training import outputs
from torchtitan_lite.training.state import TrainState
from torchtitan_lite.training.step import Stepper
from torchtitan_lite.training.trainer import Trainer

MODEL = {"n_layers": 2, "dim": 32, "head_dim": 8, "ffn_dim": 48}


def options(**values: object) -> list[str]:
    """The words of a command line: `data__path="x"` becomes --data.path x."""
    return words_of({key.replace("__", ".").replace("_", "-"): value for key, value in values.items()})


def run_of(texts: Path, cache: Path, **changes: object) -> list[str]:
    """The options of a run of 12 steps of 8 samples that saves, validates often, and logs every step."""
    values: dict[str, object] = {
        "job__device": "cpu",
        "model__overrides": MODEL,
        "data__dataset": "jsonl",
        "data__path": texts,
        "data__cache_dir": cache,
        "data__validation_fraction": 0.2,
        "training__steps": 12,
        "training__seq_len": 64,
        "training__global_batch_size": 8,
        "training__mixed_precision_param": "float32",
        "lr_scheduler__warmup_steps": 2,
        "validation__enable": "true",
        "validation__freq": 3,
        "validation__steps": 1,
        "metrics__log_freq": 1,
        "metrics__peak_flops": 1e11,
        "metrics__enable_tensorboard": "false",
        "checkpoint__enable": "true",
        "checkpoint__interval": 9,
        "debug__log_sample_ids": "true",
    }
    return options(**{**values, **changes})


class Crash(Exception):
    """A crash in the middle of a step."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """The record of one start of a run, on one rank."""

    began: int
    ended: int
    status: int | None
    """None if the run crashed."""
    at_start: dict[str, str]
    """Hashes of the whole weights and optimizer state before the first step."""
    at_end: dict[str, str]
    lr: float
    """The optimizer's learning rate at the end."""
    batches: list[tuple[str, int, tuple[int, ...], str]]
    """What for, of which step, the global sample ids, and a hash of tokens, positions and labels."""
    has_drawn: bool
    """Whether the training has used a global generator of random numbers: Python's, numpy's or torch's."""
    failure: str = ""


class _Seen:
    """Records a run, and stops or crashes it at a given step."""

    def __init__(self, stop_at: int, crash_at: int) -> None:
        self.stop_at, self.crash_at = stop_at, crash_at
        self.stop = SimpleNamespace(asked=False, signal_name="", ignore_signals=lambda: None)
        if stop_at == 0:
            self._ask()
        self.batches: list[tuple[str, int, tuple[int, ...], str]] = []
        self.generators = ""
        """A hash of the global generators' states before the first step."""
        self.at_start: dict[str, str] = {}
        self.checkpoint, self.folder = CheckpointConfig(), Path()
        self._trains = False

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Record all trainers that run in this context."""
        seen, run, step, loss_of = self, Trainer.run, Stepper.train_step, Stepper.loss_of

        def seen_run(trainer: Trainer) -> None:
            seen.at_start, seen.generators = hashes(trainer.state), hash_of_generators()
            seen.checkpoint = trainer.job.checkpoint
            seen.folder = Path(trainer.job.job.dump_folder)
            run(trainer)

        def seen_step(stepper: Stepper, *words: Any) -> Any:
            seen._begin(stepper.state)
            stats = step(stepper, *words)
            seen._trains = False
            return stats

        def seen_loss(stepper: Stepper, batch: Any) -> Any:
            parts = (batch.tokens_BS, batch.positions_BS, batch.labels_BS)
            done = stepper.state.step
            what, number = ("training", done + 1) if seen._trains else ("validation", done)
            seen.batches.append((what, number, tuple(batch.sample_ids), hash_of(*parts)))
            return loss_of(stepper, batch)

        with (
            mock.patch.object(Trainer, "run", seen_run),
            mock.patch.object(Stepper, "train_step", seen_step),
            mock.patch.object(Stepper, "loss_of", seen_loss),
        ):
            yield

    def _begin(self, state: TrainState) -> None:
        number = state.step + 1
        if number == self.crash_at:
            wait_for_save(state, self.checkpoint, self.folder)
            raise Crash
        if number == self.stop_at:
            self._ask()
        self._trains = True

    def _ask(self) -> None:
        # Only the last rank is asked; the other ranks must hear of the request.
        world = here()
        self.stop.asked = world.rank == world.size - 1


def wait_for_save(state: TrainState, checkpoint: CheckpointConfig, folder: Path) -> None:
    """Wait until the last due step is saved: a save in the background may still be running."""
    due = state.step // checkpoint.interval * checkpoint.interval
    if due > state.steps_before:
        steps = Steps(folder / checkpoint.folder)
        assert wait_until(lambda: due in steps.published()), f"step {due} is not saved after a minute"


def hash_of_generators() -> str:
    states = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state().tolist()
    return hashlib.sha256(repr(states).encode()).hexdigest()


def hash_of(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(x.numpy().tobytes() for x in tensors)).hexdigest()


def hashes(state: TrainState) -> dict[str, str]:
    """A hash of each whole weight and of each whole tensor of the optimizer."""
    found = {name: hash_of(whole(weight)) for name, weight in state.parameters.items()}
    for name, weight in state.parameters.items():
        of_weight = state.optimizer.state.get(weight, {})
        found |= {f"{name}.{key}": hash_of(whole(value)) for key, value in of_weight.items()}
    return found


class Unguarded(nullcontext[Any]):
    """Stands in for the Guard of a start: the tests watch over the ranks."""

    def __init__(self, folder: RunFolder, stop: SimpleNamespace) -> None:
        super().__init__(self)
        self.folder, self.stop = folder, stop


def start(argv: Sequence[str], stop_at: int = -1, crash_at: int = -1, double: bool = False) -> Start:
    """One start of a run on all ranks, to its end, or until asked to stop in a step (0: before the first)."""
    world = here()
    if world.size > 1:
        world = replace(world, saving_group=dist.new_group(backend="gloo"))
    seen = _Seen(stop_at, crash_at)
    status, failure = None, ""
    with precision(double), seen.looking():
        guards: list[Unguarded] = []

        def guard(*_: Any, on_end: Any, **__: Any) -> Unguarded:
            guards.append(Unguarded(on_end.__self__, seen.stop))
            return guards[0]

        with (
            mock.patch("torchtitan_lite.launch.world.world_size", lambda: world.size),
            mock.patch("torchtitan_lite.launch.world.join", lambda *_, **__: world),
            mock.patch("torchtitan_lite.launch.world.leave"),
            mock.patch("torchtitan_lite.launch.guard.Guard", guard),
            mock.patch("torchtitan_lite.launch.process.show_log"),
        ):
            try:
                status = train.run(argv, "train")
            except Crash:
                pass
            except SaveFailed as error:
                failure = str(error)
            finally:
                folder = guards[0].folder
                if folder._lock is not None:
                    folder._lock.close()
        trainer = folder.trainer
        assert trainer is not None
        return Start(
            began=trainer.state.steps_before,
            ended=trainer.state.step,
            status=status,
            at_start=seen.at_start,
            at_end=hashes(trainer.state),
            lr=trainer.state.optimizer.param_groups[0]["lr"],
            batches=seen.batches,
            has_drawn=seen.generators != hash_of_generators(),
            failure=failure,
        )


def starts(runs: Sequence[tuple[Sequence[str], Mapping[str, int]]], double: bool = False) -> list[Start]:
    """Several starts, one after the other."""
    return [start(argv, **ends, double=double) for argv, ends in runs]


def lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without measured times."""
    names = ("step", "loss", "grad_norm", "lr", "n_tokens_seen", "validation_loss")
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: record[name] for name in names if name in record} for record in records]


def sample_ids(folder: Path) -> dict[int, Counter[int]]:
    """By step, how often each global sample id was logged, over all ranks."""
    found: dict[int, Counter[int]] = {}
    for path in sorted((folder / "sample_ids").iterdir()):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({record["step"] for record in records}) == len(records), f"{path} has a step twice"
        for record in records:
            found.setdefault(record["step"], Counter()).update(record["sample_ids"])
    return found


def outcome(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "exit.json").read_text())


def steps_in(folder: Path) -> list[str]:
    """The names in the checkpoint folder of a run."""
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def main(*words: object) -> int:
    """Run a command line in this process, without signal handlers, log and locks, and return its status."""
    locks, lock = [], outputs.lock

    def kept(*arguments: Any) -> Any:
        locks.append(lock(*arguments))
        return locks[-1]

    with ExitStack() as stack:
        for target, name in (
            (StopRequest, "install"),
            (StopRequest, "ignore_signals"),
            (process, "show_log"),
        ):
            stack.enter_context(mock.patch.object(target, name))
        stack.enter_context(mock.patch.object(outputs, "lock", kept))
        try:
            return train.main([str(word) for word in words])
        finally:
            for file in locks:
                file.close()


def wait_until(is_so: Callable[[], bool]) -> bool:
    """Wait until `is_so()`, for at most a minute. Returns whether it is so."""
    deadline = time.monotonic() + 60
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def start_with_a_failing_rank(argv: Sequence[str], rank: int) -> Start:
    """A start in which `rank` cannot write the first step, which the others hear from it in a later step."""
    write, write_tensors, here = save.write_step, save.write_tensors, dist.get_rank()
    step, saves_failed, n_written = Stepper.train_step, [], 0

    def write_step(*words: Any) -> int:
        nonlocal n_written
        n_written += 1
        try:
            return write(*words)
        finally:
            if here != rank and n_written == 1:
                wait_until(lambda: any(saves_failed))

    def full(folder: Path, pieces: Any, ranks: World) -> Any:
        if here == rank and n_written == 1:
            ranks.gather({})
            ranks.together(lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        return write_tensors(folder, pieces, ranks)

    def train_step(stepper: Stepper, votes: Callable[[], tuple[bool, bool]]) -> Any:
        if here == rank and stepper.state.step == 24:
            wait_until(lambda: votes()[1])
        stats = step(stepper, votes)
        saves_failed.append(stats.votes[1])
        return stats

    with (
        mock.patch.object(Stepper, "train_step", train_step),
        mock.patch.object(save, "write_step", write_step),
        mock.patch.object(save, "write_tensors", full),
    ):
        return start(argv)
