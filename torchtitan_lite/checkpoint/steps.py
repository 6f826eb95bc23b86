"""The steps of a run on disk: one that is there was published whole, and is never written into again.

    checkpoint/step-500/  step-1000/  step-1500.tmp-6f1c92ab/  latest

A step is written into a folder of another name, which gets its own when all of it is on the disk. `latest`
names the newest one with the hash of its manifest, for other programs; what counts is what is published.
"""

import logging
import os
import re
import secrets
import shutil
from hashlib import sha256
from pathlib import Path

from torchtitan_lite.checkpoint.manifest import MANIFEST

LATEST = "latest"
_STEP = re.compile(r"step-(0|[1-9][0-9]*)", re.ASCII)
_SCRATCH = re.compile(r"step-[0-9]+\.tmp-[0-9a-f]{8}", re.ASCII)
_LOG = logging.getLogger(__name__)


class Steps:
    """The steps of one run, in a folder of their own inside the run's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """Where `step` is, or will be."""
        return self.folder / f"step-{step}"

    def published(self) -> list[int]:
        """The steps that are there, in order; what links point to does not count."""
        try:
            names = [entry.name for entry in os.scandir(self.folder) if entry.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(found[1]) for found in map(_STEP.fullmatch, names) if found)

    def named(self) -> list[int]:
        """The steps whose names are taken, in order: by steps, or by anything else."""
        try:
            found = map(_STEP.fullmatch, os.listdir(self.folder))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(match[1]) for match in found if match)

    def scratch(self, step: int) -> Path:
        """A new folder to write `step` into."""
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            sync(self.folder.parent)
        place = self._scratch_name(step)
        place.mkdir()
        return place

    def publish(self, scratch: Path, step: int) -> bool:
        """Give what was written into `scratch` its name, at once and for good; its files are on the disk.

        Whether its name is on the disk too. Raises OSError only where the step is not published.
        """
        target = self.path(step)
        if os.path.lexists(target):  # a rename would put it in the place of an empty folder
            raise FileExistsError(f"{target} is there already")
        sync(scratch)
        scratch.rename(target)
        try:
            sync(self.folder)
        except OSError as error:
            _LOG.warning("%s is there, but may not outlast a power cut (%s)", target, error.strerror)
            return False
        self.point_to(step)
        return True

    def latest_problem(self) -> str:
        """What is wrong with `latest`; empty if nothing is."""
        try:
            found = (self.folder / LATEST).read_bytes()
        except FileNotFoundError:
            return ""  # killed between the first step's name and this file
        except OSError as error:
            return f"{LATEST} cannot be read ({error.strerror})"
        for step in reversed(self.published()):
            try:
                if found == self._pointer(step):
                    return ""
            except OSError:
                continue
        return f"{LATEST} names no step that is there with the manifest that it was published with"

    def clean(self) -> None:
        """Remove what was written of steps that were not published, or was being removed."""
        if not self.folder.is_dir() or self.folder.is_symlink():
            return
        for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False) and _SCRATCH.fullmatch(entry.name):
                shutil.rmtree(entry.path)
                _LOG.info("removed %s, which a run that was stopped had left", entry.path)

    def keep_latest(self, n: int) -> None:
        """Remove all but the newest `n` steps; none where the folder is reached through a link."""
        for step in self.published()[:-n]:
            if self.folder.is_symlink():
                _LOG.warning("%s is a link: its old steps stay", self.folder)
                return
            # Half a step must never have a step's name.
            doomed = self._scratch_name(step)
            self.path(step).rename(doomed)
            shutil.rmtree(doomed)

    def set_aside(self, steps: list[int], to: Path) -> None:
        """Move `steps` to the folder `to` of the same disk: their names are needed, and nothing is lost."""
        if steps and not self.latest_problem():
            (self.folder / LATEST).unlink(missing_ok=True)  # it names one of them
        for step in steps:
            to.mkdir(parents=True, exist_ok=True)
            self.path(step).rename(to / self.path(step).name)
            _LOG.warning("moved %s to %s", self.path(step), to)

    def point_to(self, step: int) -> None:
        """Let `latest` name a step that is there; a warning where it cannot: nothing depends on it."""
        try:
            self._point_to(step)
        except OSError as error:
            _LOG.warning("%s in %s cannot be written (%s)", LATEST, self.folder, error.strerror)

    def _point_to(self, step: int) -> None:
        if problem := self.latest_problem():
            _LOG.warning("%s in %s is DAMAGED and is written again: %s", LATEST, self.folder, problem)
        partial = self.folder / f"{LATEST}.partial"
        with partial.open("wb") as stream:
            stream.write(self._pointer(step))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self.folder / LATEST)
        sync(self.folder)

    def _scratch_name(self, step: int) -> Path:
        return self.folder / f"step-{step}.tmp-{secrets.token_hex(4)}"

    def _pointer(self, step: int) -> bytes:
        digest = sha256((self.path(step) / MANIFEST).read_bytes()).hexdigest()
        return f"step-{step} manifest-sha256:{digest}\n".encode()


def sync(folder: Path) -> None:
    """See to it that the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
