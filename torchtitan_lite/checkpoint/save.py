"""Saving a step: all ranks write, the first one publishes, and in the background if that is asked for."""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from torchtitan_lite.checkpoint import CheckpointConfig, SaveFailed
from torchtitan_lite.checkpoint.files import HashedFiles
from torchtitan_lite.checkpoint.manifest import (
    MANIFEST,
    Damaged,
    Manifest,
    Unreadable,
    check_names,
    check_size,
)
from torchtitan_lite.checkpoint.state import RANDOM, STATE, State
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.checkpoint.tensors import Piece, read_index, read_tensors, write_tensors
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.launch.background import in_thread, result
from torchtitan_lite.launch.world import OnAnotherRank, World

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What is saved of one step, as one rank has it."""

    step: int
    pieces: Mapping[str, Piece]
    state: State
    random: dict[str, Any]
    """This rank's generators."""
    made: dict[str, Any]
    """For the manifest: what it was made of and on."""


class Saver:
    """Saves the steps of a run. All ranks call the same methods at the same steps."""

    def __init__(
        self,
        config: CheckpointConfig,
        steps: Steps,
        ranks: World,
        *,
        say: Callable[[str], None],
        alive: Callable[[], None],
        saved: int | None = None,
        on_published: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.config, self.steps, self.ranks, self.say, self.alive = config, steps, ranks, say, alive
        self.on_published = on_published
        """Called with each step that was published: by all ranks, when all of them have waited for it."""
        self.saved = saved
        """The step that was published last."""
        self._staging = _Staging(pinned=config.async_mode == "async_with_pinned_mem")
        self._writing: Future[None] | None = None
        self._failure: SaveFailed | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a step saved in the background has failed, and that was not reported yet."""
        return self._failure is not None and (self._writing is None or self._writing.done())

    def save(self, step: int, take: Callable[[], Snapshot], *, last: bool = False) -> None:
        """Save `step`, which `take` gives; in the background, where configured, unless it is the `last` one.

        Raises SaveFailed when it fails, at once or, in the background, as `report` says. One save at a time:
        this one waits for the one before.
        """
        began = perf_counter()
        self.wait()
        if step == self.saved:
            return
        self.report(quiet=last)  # of the one before, which all ranks have waited for
        in_foreground = last or self.config.async_mode == "disabled"
        snapshot = self._take(step, take if in_foreground else lambda: self._staging.copy(take()))
        stood_still = None if in_foreground else perf_counter() - began
        if snapshot is not None:
            # In a thread anyhow: one write may take longer than a rank may go without a sign of life.
            self._writing = in_thread(lambda: self._write(snapshot, began, stood_still))
        if in_foreground:
            self.report(fatal=last)
        # Else the ranks learn at different moments what came of it: they agree on when to `report` it.

    def wait(self) -> None:
        """Until the step that is being saved is published, or has failed."""
        if self._writing is not None:
            result(self._writing, self.alive)
            self._writing = None
            if self._failure is None and self.saved is not None:
                self.on_published(self.saved)

    def finish(self) -> None:
        """Finish the save that is under way, where another error ends the run, and say what came of it."""
        if self._writing is not None and not self._writing.done():
            self.say("finishing the save that is under way")
        self.report(quiet=True)

    def report(self, *, fatal: bool = False, quiet: bool = False) -> None:
        """Say that the last save has failed, if it has; raise SaveFailed if that is to end the run.

        `quiet`: it is not to, as the present step is about to be saved for good.
        """
        self.wait()
        failure, self._failure = self._failure, None
        if failure is None:
            return
        if fatal or (self.config.on_failure == "stop" and not quiet):
            raise failure
        if self.ranks.is_first:
            _LOG.error("%s%s", failure, "" if quiet else "; the run goes on")

    def _take(self, step: int, take: Callable[[], Snapshot]) -> Snapshot | None:
        """What `take` gives; None, on all ranks, where there is no room for it on one."""
        try:
            return self.ranks.together(take)
        except Exception as error:  # noqa: BLE001 - whatever it is, the run hears of it
            self._failure = self._failed(step, error)
            return None

    def _write(self, snapshot: Snapshot, began: float, stood_still: float | None) -> None:
        """Write and publish; what goes wrong is kept for `report`."""
        try:
            n_bytes = write_step(self.steps, snapshot, self.ranks, self.config.keep_latest_k)
        except Exception as error:  # noqa: BLE001 - whatever it is, the run hears of it
            self._failure = self._failed(snapshot.step, error)
            return
        self.saved = snapshot.step
        seconds = perf_counter() - began
        self.say(
            f"step {snapshot.step} saved: {n_bytes / 2**20:,.1f} MiB in {seconds:.2f} s; "
            f"training stood still for {seconds if stood_still is None else stood_still:.2f} s"
        )

    def _failed(self, step: int, error: Exception) -> SaveFailed:
        newest = []
        with contextlib.suppress(OSError):
            newest = self.steps.published()
        before = f"step {newest[-1]} is the newest that was" if newest else "none was before"
        return SaveFailed(f"step {step} could not be saved ({_line(error)}); {before}")


def write_step(steps: Steps, snapshot: Snapshot, ranks: World, keep_latest_k: int = 0) -> int:
    """Write a step beside the published ones, publish it and remove old ones; the bytes of all ranks.

    Raises on every rank what went wrong on one, and leaves nothing of it.
    """
    with _scratch(steps, snapshot.step, ranks) as scratch:
        files = HashedFiles()
        write_tensors(scratch, snapshot.pieces, files, ranks)
        ranks.together(lambda: _write_documents(scratch, snapshot, files, ranks))
        manifest = _manifest(snapshot.step, files, ranks, snapshot.made)

        def publish() -> None:
            is_durable = _publish(steps, scratch, manifest)
            if keep_latest_k and is_durable:
                _remove_old(steps, keep_latest_k)

        # The others wait until old steps are gone, however long: here they are patient, in a step not.
        ranks.together(lambda: publish() if ranks.is_first else None)
    return sum(digest.size for digest in manifest.files.values())


def probe(steps: Steps, ranks: World) -> None:
    """Write a tensor of all ranks as a step is written, read it, and remove it.

    Raises ConfigError, on all ranks alike, where that fails: before the run, and not at its first save.
    """
    own = torch.full((1,), float(ranks.rank))
    other = (ranks.rank + 1) % ranks.size

    def piece(local: torch.Tensor, rank: int) -> dict[str, Piece]:
        return {"probe": Piece(local=local, shape=torch.Size([ranks.size]), offsets=torch.Size([rank]))}

    try:
        with _scratch(steps, 0, ranks, keep=False) as scratch:
            files = HashedFiles()
            write_tensors(scratch, piece(own, ranks.rank), files, ranks)
            manifest = _manifest(0, files, ranks, {})
            ranks.together(lambda: _check(scratch, manifest) if ranks.is_first else None)
            read = torch.full((1,), -1.0)
            ranks.together(lambda: read_tensors(scratch, piece(read, other), read_index(scratch, manifest)))
            assert read.item() == other
    except (OSError, OnAnotherRank, Damaged, Unreadable) as error:
        rule = f"cannot hold what all ranks write and read ({_line(error)})"
        remedy = "name a folder that every rank can write to, and in which it sees what the others write"
        raise ConfigError([Problem("job.dump_folder", str(steps.folder.parent), rule, remedy)]) from None


@contextlib.contextmanager
def _scratch(steps: Steps, step: int, ranks: World, *, keep: bool = True) -> Iterator[Path]:
    """A new folder for `step`, which the first rank makes; it goes when that fails, or is not to be kept."""
    scratch = ranks.share(ranks.together(lambda: steps.scratch(step) if ranks.is_first else None))
    assert scratch is not None
    done = False
    try:
        yield scratch
        done = True
    finally:
        if not (done and keep):
            if ranks.is_first:
                with contextlib.suppress(OSError):
                    shutil.rmtree(scratch)
            with contextlib.suppress(Exception):
                ranks.gather(None)  # the others wait for that, as nobody else would wait so long


def _manifest(step: int, files: HashedFiles, ranks: World, made: dict[str, Any]) -> Manifest:
    """Of the files of all ranks."""
    digests = {name: digest for of_rank in ranks.gather(files.digests) for name, digest in of_rank.items()}
    return Manifest(step=step, files=dict(sorted(digests.items())), made=made)


def _check(folder: Path, manifest: Manifest) -> None:
    """Raise Damaged unless the files are there, whoever wrote them: machines may have folders of one name."""
    check_names(folder, manifest)
    for name, digest in manifest.files.items():
        check_size(folder, name, digest)


def _write_documents(scratch: Path, snapshot: Snapshot, files: HashedFiles, ranks: World) -> None:
    files.write_json(scratch / RANDOM.format(rank=ranks.rank), snapshot.random)
    if ranks.is_first:
        files.write_json(scratch / STATE, asdict(snapshot.state))


def _publish(steps: Steps, scratch: Path, manifest: Manifest) -> bool:
    """Whether the step outlasts a power cut, too."""
    _check(scratch, manifest)
    with (scratch / MANIFEST).open("wb") as stream:
        stream.write(manifest.text().encode())
        stream.flush()
        os.fsync(stream.fileno())
    return steps.publish(scratch, manifest.step)


def _remove_old(steps: Steps, keep_latest_k: int) -> None:
    try:
        steps.keep_latest(keep_latest_k)
    except OSError as error:
        _LOG.warning("old steps in %s could not be removed (%s)", steps.folder, error.strerror)


class _Staging:
    """Memory of the host that a step waits in while it is written; pinned memory is used again each time."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._kept: dict[str, torch.Tensor] = {}

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """The step as it is now."""
        pieces = snapshot.pieces
        copies = {name: self._copy(name, piece.local.detach()) for name, piece in pieces.items()}
        if any(piece.local.is_cuda for piece in pieces.values()):
            torch.cuda.current_stream().synchronize()
        copied = {name: replace(piece, local=copies[name]) for name, piece in pieces.items()}
        return replace(snapshot, pieces=copied)

    def _copy(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if not self._pinned:
            return x.to("cpu", copy=True)
        if name not in self._kept:
            self._kept[name] = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        return self._kept[name].copy_(x, non_blocking=True)


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
