"""Save a step: every rank writes its tensors, then rank 0 publishes the step. A thread may do this work."""

import contextlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from torchtitan_lite.checkpoint import CheckpointConfig, SaveFailed
from torchtitan_lite.checkpoint.manifest import (
    MANIFEST,
    Damaged,
    Digest,
    Manifest,
    Unreadable,
    check_files,
    write_file,
)
from torchtitan_lite.checkpoint.state import STATE, State
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.checkpoint.tensors import Piece, read_index, read_tensors, write_tensors
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.launch.end import OnAnotherRank
from torchtitan_lite.launch.world import World, in_thread

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The content of a step on one rank."""

    pieces: Mapping[str, Piece]
    state: State
    made: dict[str, Any]
    """The value of `Manifest.made`: fingerprints, mesh and version of torch."""


class Saver:
    """The writer of the steps of a run. All ranks call the same methods at the same steps."""

    def __init__(
        self,
        config: CheckpointConfig,
        steps: Steps,
        world: World,
        *,
        say: Callable[[str], None],
        saved: int | None = None,
        on_published: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.config, self.steps, self.world, self.say = config, steps, world, say
        self.on_published = on_published
        """The function that each rank calls with a published step, once the rank has waited for the save."""
        self.saved = saved
        """The last published step."""
        self._pinned = {} if config.async_mode == "async_with_pinned_mem" else None
        self._writing: Future[None] | None = None
        self._failure: SaveFailed | None = None
        self._is_cut_off = False
        """True if a collective of the ranks has failed. gloo groups do not recover from that."""

    @property
    def has_failed(self) -> bool:
        """True if a save in the background has failed and `report` has not reported the failure yet."""
        return self._failure is not None and (self._writing is None or self._writing.done())

    def save(self, step: int, take: Callable[[], Snapshot], *, last: bool = False) -> None:
        """Save `step`, whose snapshot `take` returns. With `async_mode`, do not wait for it unless `last`.

        The method first waits for the previous save. It raises SaveFailed if this save fails, or with
        `async_mode` if the previous save has failed (see `report`).
        """
        began = perf_counter()
        self.wait()
        if step == self.saved:
            return
        self.report(quiet=last)
        in_foreground = last or self.config.async_mode == "disabled"
        try:
            snapshot = self.world.together(take if in_foreground else lambda: _copy(take(), self._pinned))
        except Exception as error:  # noqa: BLE001 - `report` raises any error, such as no memory
            self._failure = self._failed(step, error)
        else:
            stood_still = None if in_foreground else perf_counter() - began
            # Both modes use a thread: a write may take longer than the timeout of a progress report.
            self._writing = in_thread(lambda: self._write(snapshot, began, stood_still))
        if in_foreground:
            self.report(fatal=last)
        # In background mode ranks notice a failure at different times, so they agree on when to `report` it.

    def wait(self) -> None:
        """Wait until the current save has published its step or has failed."""
        if self._writing is not None:
            self.world.wait_for(self._writing)
            self._writing = None
            if self._failure is None and self.saved is not None:
                self.on_published(self.saved)

    def finish(self) -> None:
        """Finish the current save when another error ends the run. Log the failure if the save fails."""
        if self._writing is not None and not self._writing.done():
            self.say("finishing the save that is under way")
        self.report(quiet=True)

    def report(self, *, fatal: bool = False, quiet: bool = False) -> None:
        """If the last save has failed, log that, or raise SaveFailed if the failure ends the run.

        A failure with `fatal` and a failed collective always end the run. Any other failure is only logged if
        `quiet`, because the present step is saved next or another error ends the run. Otherwise
        `on_failure` decides.
        """
        self.wait()
        failure, self._failure = self._failure, None
        if failure is None:
            return
        if fatal or self._is_cut_off or (self.config.on_failure == "stop" and not quiet):
            raise failure
        if self.world.is_first:
            _LOG.error("%s%s", failure, "" if quiet else "; the run goes on")

    def _write(self, snapshot: Snapshot, began: float, stood_still: float | None) -> None:
        """Write and publish a step. Keep an error for `report`."""
        step = snapshot.state.step
        try:
            n_bytes = write_step(self.steps, snapshot, self.world, self.config.keep_latest_k)
        except Exception as error:  # noqa: BLE001 - `report` raises any error
            self._failure = self._failed(step, error)
            # If one rank's work fails, every rank raises one of these. Otherwise a collective has failed.
            known = OSError | OnAnotherRank | Damaged | Unreadable
            self._is_cut_off = self.world.size > 1 and not isinstance(error, known)
            return
        self.saved = step
        seconds = perf_counter() - began
        self.say(
            f"step {step} saved: {n_bytes / 2**20:,.1f} MiB in {seconds:.2f} s; "
            f"training stood still for {seconds if stood_still is None else stood_still:.2f} s"
        )

    def _failed(self, step: int, error: Exception) -> SaveFailed:
        newest = []
        with contextlib.suppress(OSError):
            newest = self.steps.published()
        before = f"step {newest[-1]} is the newest that was" if newest else "none was before"
        return SaveFailed(f"step {step} could not be saved ({_line(error)}); {before}")


def write_step(steps: Steps, snapshot: Snapshot, world: World, keep_latest_k: int = 0) -> int:
    """Write a step to a new folder, publish it, and remove old steps. Return the bytes of all ranks' files.

    If a rank fails, every rank raises, and the new folder is removed.
    """
    with _scratch(steps, snapshot.state.step, world) as scratch:
        digests = write_tensors(scratch, snapshot.pieces, world)
        digests |= world.together(lambda: _write_state(scratch, snapshot.state) if world.is_first else {})
        manifest = _manifest(snapshot.state.step, digests, world, snapshot.made)

        def publish() -> None:
            # Files of other ranks are missing if each machine has its own folder of this name.
            check_files(scratch, manifest)
            (scratch / MANIFEST).write_bytes(manifest.text().encode())
            is_durable = steps.publish(scratch, manifest.step)
            if keep_latest_k and is_durable:
                try:
                    steps.keep_latest(keep_latest_k)
                except OSError as error:
                    _LOG.warning("old steps in %s could not be removed (%s)", steps.folder, error.strerror)

        # The other ranks wait here while old steps are removed. In a training step the timeout is shorter.
        world.together(lambda: publish() if world.is_first else None)
    return sum(digest.size for digest in manifest.files.values())


def probe(steps: Steps, world: World) -> None:
    """Check that a step can be saved: every rank writes a tensor, and reads the tensor of another rank.

    Raises ConfigError on all ranks if that fails, so that the run ends before its first step and not at its
    first save. The files are removed.
    """
    own = torch.full((1,), float(world.rank))
    other = (world.rank + 1) % world.size

    def piece(local: torch.Tensor, rank: int) -> dict[str, Piece]:
        return {"probe": Piece(local=local, shape=torch.Size([world.size]), offsets=torch.Size([rank]))}

    try:
        with _scratch(steps, 0, world, keep=False) as scratch:
            manifest = _manifest(0, write_tensors(scratch, piece(own, world.rank), world), world, {})
            world.together(lambda: check_files(scratch, manifest) if world.is_first else None)
            read = torch.full((1,), -1.0)
            index = world.together(lambda: read_index(scratch, manifest, world))
            world.together(lambda: read_tensors(scratch, piece(read, other), index))
            assert read.item() == other
    except (OSError, OnAnotherRank, Damaged, Unreadable) as error:
        rule = f"cannot hold what all ranks write and read ({_line(error)})"
        remedy = "name a folder that every rank can write to, and in which it sees what the others write"
        raise ConfigError([Problem("job.dump_folder", str(steps.folder.parent), rule, remedy)]) from None


@contextlib.contextmanager
def _scratch(steps: Steps, step: int, world: World, *, keep: bool = True) -> Iterator[Path]:
    """A context manager: yield a new folder for `step`. If the block raises, or without `keep`, remove it."""
    scratch = world.broadcast(world.together(lambda: steps.scratch(step) if world.is_first else None))
    assert scratch is not None
    done = False
    try:
        yield scratch
        done = True
    finally:
        if not (done and keep):
            if world.is_first:
                with contextlib.suppress(OSError):
                    shutil.rmtree(scratch)
            with contextlib.suppress(Exception):
                world.gather(None)  # the other ranks wait here until the folder is gone


def _write_state(folder: Path, state: State) -> dict[str, Digest]:
    return {STATE: write_file(folder / STATE, (json.dumps(asdict(state), indent=1) + "\n").encode())}


def _manifest(step: int, digests: Mapping[str, Digest], world: World, made: dict[str, Any]) -> Manifest:
    files = {name: digest for of_rank in world.gather(digests) for name, digest in of_rank.items()}
    return Manifest(step=step, files=dict(sorted(files.items())), made=made)


def _copy(snapshot: Snapshot, pinned: dict[str, torch.Tensor] | None) -> Snapshot:
    """Return a copy of the snapshot in host memory, which does not change while training continues.

    `pinned` keeps the pinned memory for the next copy. If `pinned` is None, the memory is not pinned.
    """
    copies = {}
    for name, piece in snapshot.pieces.items():
        x = piece.local.detach()
        if pinned is None:
            copy = x.to("cpu", copy=True)
        else:
            if name not in pinned:
                pinned[name] = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
            copy = pinned[name].copy_(x, non_blocking=True)
        copies[name] = replace(piece, local=copy)
    if any(piece.local.is_cuda for piece in snapshot.pieces.values()):
        torch.cuda.current_stream().synchronize()
    return replace(snapshot, pieces=copies)


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
