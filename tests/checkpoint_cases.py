"""Shared by the tests of checkpoints: steps to damage, and starts of a run that die on purpose."""

import contextlib
import hashlib
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from programs import Program
from torch import Tensor

from torchtitan_lite.checkpoint import CheckpointConfig, SaveFailed
from torchtitan_lite.checkpoint.manifest import MANIFEST, Digest, read_manifest
from torchtitan_lite.checkpoint.save import Saver, Snapshot, probe, write_step
from torchtitan_lite.checkpoint.state import State
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.checkpoint.tensors import Piece, differences, read_index, read_tensors, write_tensors
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.launch.end import OnAnotherRank
from torchtitan_lite.launch.world import World

ROOT = Path(__file__).parents[1]
SMALL = {
    "model.w": torch.arange(12.0).view(4, 3),
    "model.norm": torch.arange(5.0).bfloat16(),
    "optimizer.w.step": torch.tensor(7.0),
}


# --- a step without a run -----------------------------------------------------------------------------


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    """Return tensors as the pieces of a single rank."""
    return {
        name: Piece(local=x, shape=x.shape, offsets=torch.Size([0] * x.dim())) for name, x in tensors.items()
    }


def snapshot(step: int, pieces: Mapping[str, Piece] | None = None) -> Snapshot:
    """Return a snapshot of `step`, of `SMALL` by default."""
    state = State(
        step=step,
        n_tokens_seen=100 * step,
        consumed_samples=4 * step,
        validated=-1,
        model_only=False,
        identity={"model": {"dim": 3}},
        schedule={},
        config={},
    )
    pieces = whole(SMALL) if pieces is None else pieces
    made = {"mesh": {"ranks": 1}}
    return Snapshot(pieces=pieces, state=state, made=made)


def publish(folder: Path, *numbers: int, pieces: Mapping[str, Piece] | None = None) -> Path:
    """Publish steps in `folder`; return the path of the last one."""
    for step in numbers:
        write_step(Steps(folder), snapshot(step, pieces), World())
    return Steps(folder).path(numbers[-1])


def digest(content: bytes) -> Digest:
    return Digest(len(content), hashlib.sha256(content).hexdigest())


def forge(folder: Path, file: str, content: bytes) -> None:
    """Give a step's file another content, and the step a manifest that fits."""
    (folder / file).write_bytes(content)
    manifest = read_manifest(folder)
    files = {**manifest.files, file: digest(content)}
    (folder / MANIFEST).write_text(replace(manifest, files=files).text())


def forged_manifest(folder: Path, **changes: Any) -> None:
    """Change entries of a step's manifest to values of any type, and give it the hash that fits."""
    content = json.loads((folder / MANIFEST).read_bytes())
    del content["sha256"]
    content |= changes
    text = json.dumps(content, indent=2) + "\n"
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def tree(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below `folder`, and the target of every link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}".encode()
        else:
            found[name] = b"folder" if path.is_dir() else path.read_bytes()
    return found


# --- on ranks ---------------------------------------------------------------------------------------


def here() -> World:
    """Return this rank among the ranks of the test."""
    return World(rank=dist.get_rank(), size=dist.get_world_size(), group=dist.group.WORLD)


TENSORS = {
    "model.rows": torch.arange(35, dtype=torch.float64).view(7, 5),
    "model.few": torch.arange(6.0).view(2, 3),
    "model.vector": torch.arange(9, dtype=torch.int64),
    "model.half": torch.linspace(-3, 3, 24).bfloat16().view(4, 3, 2),
    "model.scalar": torch.tensor(0.1),
    "model.flag": torch.tensor([True, False, True]),
}


def box(tensor: Tensor, rank: int, size: int, layout: str) -> Piece:
    """Return part `rank` of `size` of a tensor, cut by rows, columns or both."""
    n_columns = {"rows": 1, "columns": size, "grid": max(1, size // 2)}[layout] if tensor.dim() > 1 else 1
    n_rows = size // n_columns
    places = [slice(None)] * tensor.dim()
    for dim, part, n in ((0, rank // n_columns, n_rows), (1, rank % n_columns, n_columns))[: tensor.dim()]:
        length = -(-tensor.shape[dim] // n)
        places[dim] = slice(min(part * length, tensor.shape[dim]), (part + 1) * length)
    local = tensor[tuple(places)].clone()
    return Piece(local=local, shape=tensor.shape, offsets=torch.Size(place.start or 0 for place in places))


def boxes(layout: str, ranks: World) -> dict[str, Piece]:
    return {name: box(x, ranks.rank, ranks.size, layout) for name, x in TENSORS.items()}


def write_layouts(folder: Path, layouts: list[str]) -> None:
    """Publish a step for each layout, numbered in order."""
    for step, layout in enumerate(layouts):
        write_step(Steps(folder), snapshot(step, boxes(layout, here())), here())


def digests_of_a_write(folder: Path, layout: str) -> dict[str, Digest]:
    """Write `TENSORS`, cut as `layout` says or "whole" on every rank; return what this rank has written."""
    pieces = whole(TENSORS) if layout == "whole" else boxes(layout, here())
    return write_tensors(folder, pieces, here())


def differing_reads(folder: Path, step: int, layout: str) -> list[str]:
    """Read a step in a layout; return the names of the pieces that are not, bit by bit, as written."""
    place = Steps(folder).path(step)
    expected = boxes(layout, here())
    pieces = {
        name: replace(piece, local=torch.full_like(piece.local, 77)) for name, piece in expected.items()
    }
    index = read_index(place, read_manifest(place), here())
    assert differences(pieces, index) == []
    read_tensors(place, pieces, index)
    same = {name: _bits(pieces[name].local) == _bits(expected[name].local) for name in pieces}
    return [name for name, is_same in same.items() if not is_same]


def _bits(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.shape, x.contiguous().view(-1).view(torch.uint8).tolist()


def save_without_space(folder: Path, full: list[int], async_mode: Any, on_failure: Any) -> list[str]:
    """Save three steps, the second without space on the ranks `full`; return what came of each."""
    config = CheckpointConfig(enable=True, async_mode=async_mode, on_failure=on_failure)
    ranks = here() if dist.is_initialized() else World()
    saver = Saver(config, Steps(folder), ranks, say=lambda _: None)
    said = []
    for step in (1, 2, 3):
        with no_space() if step == 2 and ranks.rank in full else contextlib.nullcontext():
            try:
                saver.save(step, partial(snapshot, step))
                saver.report()
                said.append(f"saved {saver.saved}")
            except SaveFailed as error:
                said.append(str(error))
    return said


def left_after_a_failure(folder: Path) -> list[str]:
    """Fail to write a step, which the first rank removes slowly; return what this rank finds of it then."""
    remove = shutil.rmtree

    def slowly(path: Path) -> None:
        time.sleep(0.5)
        remove(path)

    with (
        mock.patch.object(shutil, "rmtree", slowly),
        no_space() if dist.get_rank() == 1 else contextlib.nullcontext(),
        contextlib.suppress(OSError, OnAnotherRank),
    ):
        write_step(Steps(folder), snapshot(1, boxes("rows", here())), here())
    return [path.name for path in folder.iterdir()]


def probe_folders(folders: list[Path]) -> str:
    """Probe a folder of each rank, as on machines with folders of one name; return the refusal."""
    ranks = here()
    own = Steps(folders[ranks.rank] / "checkpoint")
    with mock.patch.object(World, "broadcast", _broadcast_in(folders)):
        try:
            probe(own, ranks)
        except ConfigError as error:
            return str(error)
    return ""


def _broadcast_in(folders: list[Path]) -> Callable[[World, Any], Any]:
    broadcast = World.broadcast

    def shared(ranks: World, path: Path) -> Path:
        """Return the same name in the rank's own file system."""
        return folders[ranks.rank] / broadcast(ranks, path).relative_to(folders[0])

    return shared


@contextlib.contextmanager
def no_space(n_bytes: int = 100) -> Iterator[None]:
    """Let no file of this process grow beyond `n_bytes`, nor the file that it prints to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def die_in_save(folder: Path, rank: int, fault: dict[str, Any]) -> None:
    """Save step 2 on two ranks, of which `rank` dies by `fault`."""
    if dist.get_rank() == rank:
        apply_fault(fault)
    write_step(Steps(folder), snapshot(2, boxes("rows", here())), here())


# --- starts of a real run -----------------------------------------------------------------------------


class Start(NamedTuple):
    """How a start of a run ended."""

    status: int
    """Negative: the signal that killed it."""
    out: str
    err: str


class Starts:
    """Real starts of training; `fault` is for `apply_fault`: where one dies."""

    def __call__(self, words: list[str], fault: dict[str, Any] | None = None) -> Start:
        """Start a run with the options `words`."""
        fault, before = fault or {}, []
        program = Program(["-c", _RUN, json.dumps(fault), *words])
        if "delay" in fault:
            assert program.stdout is not None
            for line in program.stdout:
                if line == ARMED:
                    time.sleep(fault["delay"])
                    break
                before.append(line)
            program.kill()
        out, err = program.communicate()
        return Start(program.returncode, "".join(before) + out, err)


_RUN = "import sys, checkpoint_cases; sys.exit(checkpoint_cases.main_with_fault(sys.argv[1:]))"
ARMED = "armed\n"
"""A run prints this line when the delay before its kill begins."""


def main_with_fault(words: list[str]) -> int:
    """Train in a process of its own; `words` are a fault as JSON, and the options of the run."""
    from torchtitan_lite.train import main

    apply_fault(json.loads(words[0]))
    return main(words[1:])


def apply_fault(fault: dict[str, Any]) -> None:
    """Let this process die by SIGKILL `when` ("before", "after") the `n`-th call of `at`, a dotted name.

    Calls count from the first one of `armed_by` on, where that is given. With `halve`, a function that gives
    a text gives half of it.
    """
    counts = {"armed": "armed_by" not in fault, "calls": 0}

    def arming(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if not counts["armed"]:
                counts["armed"] = True
                if "delay" in fault:
                    sys.stdout.flush()
                    os.write(1, ARMED.encode())
            return real(*args, **options)

        return call

    def mortal(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            counts["calls"] += counts["armed"]
            is_the_one = counts["armed"] and counts["calls"] == fault["n"]
            if is_the_one and fault["when"] == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **options)
            if is_the_one:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def halving(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            result = real(*args, **options)
            return result[: len(result) // 2] if counts["armed"] else result

        return call

    def waiting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            while not list(Path(fault["folder"]).glob(fault["until"])):
                time.sleep(0.01)
            return real(*args, **options)

        return call

    changes = {"at": mortal, "armed_by": arming, "halve": halving, "waits": waiting}
    for key, change in changes.items():
        if key in fault:
            owner, name = _owner(fault[key])
            setattr(owner, name, change(getattr(owner, name)))


def _owner(dotted: str) -> tuple[Any, str]:
    """The module or class that holds what a dotted name means."""
    *parents, name = dotted.split(".")
    for n in range(len(parents), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            owner: Any = importlib.import_module(".".join(parents[:n]))
            for parent in parents[n:]:
                owner = getattr(owner, parent)
            return owner, name
    raise ModuleNotFoundError(dotted)
