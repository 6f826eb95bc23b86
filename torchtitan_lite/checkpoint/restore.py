"""Find the step to resume from, verify every byte of it, and only then load its tensors."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torchtitan_lite.checkpoint.manifest import (
    MANIFEST,
    Damaged,
    Manifest,
    Unreadable,
    check_files,
    check_hash,
    read_manifest,
    reading,
    refusing_damage,
)
from torchtitan_lite.checkpoint.state import STATE, State, read_state
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.checkpoint.tensors import Piece, Stored, differences, read_index, read_tensors
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.config.problem import printable
from torchtitan_lite.launch.world import World

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class VerifiedStep:
    """A step whose files have all been verified."""

    folder: Path
    manifest: Manifest
    state: State
    index: dict[str, Stored]


def verify(folder: Path, world: World) -> VerifiedStep:
    """Verify the step in `folder`. Each rank hashes some of the files.

    Raises Damaged or Unreadable, the same error on all ranks.
    """
    manifest = world.together(lambda: read_manifest(folder))
    world.together(lambda: check_files(folder, manifest))
    by_size = sorted(manifest.files.items(), key=lambda item: -item[1].size)
    world.together(lambda: [check_hash(folder, *file) for file in by_size[world.rank :: world.size]])
    return world.together(lambda: _read(folder, manifest, world))


def _read(folder: Path, manifest: Manifest, world: World) -> VerifiedStep:
    with reading(STATE):
        state = read_state((folder / STATE).read_bytes())
    if state.step != manifest.step:
        raise Damaged(f"{STATE} is of step {state.step}, and the manifest of step {manifest.step}")
    index = read_index(folder, manifest, world)
    return VerifiedStep(folder=folder, manifest=manifest, state=state, index=index)


def find_step(steps: Steps, load_step: int, world: World) -> VerifiedStep | None:
    """Return the step `load_step`, or for -1 the newest undamaged step, or None if no step was published.

    For -1, a damaged step is logged and passed over. `RunFolder.prepare` later moves the step to a folder
    "earlier". Raises ConfigError on all ranks if the step `load_step` is missing or damaged, or if all steps
    are damaged. Also raises ConfigError if a step cannot be read now: the step may be undamaged.
    """
    published = world.broadcast(world.together(lambda: _published(steps) if world.is_first else []))
    is_explicit = load_step >= 0
    if is_explicit and load_step not in published:
        there = ", ".join(map(str, published)) or "none"
        rule, remedy = f"is not in {steps.folder} (there: {there})", "use -1 for the newest that is there"
        raise ConfigError([Problem("checkpoint.load_step", load_step, rule, remedy)])
    problems = []
    for step in [load_step] if is_explicit else reversed(published):
        try:
            found = verify(steps.path(step), world)
            if found.state.step == step:
                return found
            raise Damaged(f"it is step {found.state.step} under another name")
        except Unreadable as problem:
            rule = f"holds step {step}, which cannot be told to be good or not: {problem}"
            remedy = "see to that and start again; where it stays so, move the step away"
            raise ConfigError([Problem("checkpoint.folder", str(steps.folder), rule, remedy)]) from None
        except Damaged as damage:
            if is_explicit:
                rule, remedy = f"is damaged: {damage}", "use -1 for the newest step that is not"
                raise ConfigError([Problem("checkpoint.load_step", step, rule, remedy)]) from None
            problems.append(f"step {step}: {damage}")
            if world.is_first:
                words = printable(str(damage))
                _LOG.error("step %d in %s is DAMAGED and is passed over: %s", step, steps.folder, words)
    if not problems:
        return None
    rule = f"holds no step that is what was written ({'; '.join(problems)})"
    remedy = "put back a copy of a step, or name another job.dump_folder to start anew"
    raise ConfigError([Problem("checkpoint.folder", str(steps.folder), rule, remedy)])


def _published(steps: Steps) -> list[int]:
    try:
        return steps.published()
    except OSError as error:
        rule, remedy = f"cannot be read ({error.strerror})", "see to that and start again"
        raise ConfigError([Problem("checkpoint.folder", str(steps.folder), rule, remedy)]) from None


def find_initial(path: str, world: World, key: str = "checkpoint.initial_load_path") -> VerifiedStep:
    """Return the step in the folder `path`, or the newest step if `path` is a folder of steps or of a run.

    Raises ConfigError if there is no step or if the step is damaged: an older step is not tried.
    """
    with refusing_bad_step(key, path):
        return verify(world.broadcast(world.together(lambda: _initial(path))), world)


def refusing_bad_step(key: str, path: str) -> AbstractContextManager[None]:
    """Return a context manager: Damaged or Unreadable inside becomes a ConfigError about `key` = `path`."""
    return refusing_damage(key, path, "holds no good step", "name the folder of a run or of a step")


def _initial(path: str) -> Path:
    try:
        folder = Path(path).expanduser().absolute()
        if not folder.is_dir():
            raise Damaged("there is no such folder")
        # The folders "earlier" hold steps that a run has moved aside.
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("earlier"))
        for place in (folder, *inside):
            if published := Steps(place).published():
                return Steps(place).path(published[-1])
    except (OSError, RuntimeError) as error:  # the name is too long, or ~ names no user
        raise Unreadable(f"it cannot be read ({error})") from None
    if not folder.name.startswith("step-") and not (folder / MANIFEST).exists():
        raise Damaged("no step was saved there, as checkpoint.enable was off")
    return folder


def load(
    found: VerifiedStep, pieces: Mapping[str, Piece], world: World, key: str = "checkpoint.folder"
) -> None:
    """Load values from the step into `pieces`: all or no stored tensors of each kind (model, optimizer).

    Raises ConfigError about `key` on all ranks if names, shapes or dtypes differ, or if a file can no longer
    be read.
    """
    kinds = {name.partition(".")[0] for name in pieces}
    index = {name: stored for name, stored in found.index.items() if name.partition(".")[0] in kinds}
    if lines := differences(pieces, index):
        rule, remedy = f"does not fit: {', '.join(lines)}", "use what it was saved from, in float32"
        raise ConfigError([Problem(key, str(found.folder), rule, remedy)])
    with refusing_damage(key, str(found.folder), "can no longer be read", "see to that and start again"):
        world.together(lambda: read_tensors(found.folder, pieces, index))
