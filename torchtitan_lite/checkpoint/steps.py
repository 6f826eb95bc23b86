"""The steps of a run on disk. A folder with the name of a step is complete and never written again.

    checkpoint/step-500/  step-1000/  step-1500.tmp-6f1c92ab/  latest

A step is written to a folder with another name. The folder is renamed when all of it is on the disk. `latest`
names the newest step and the hash of its manifest, for other programs. A run itself reads only the folders.
"""

import logging
import os
import re
import shutil
from hashlib import sha256
from pathlib import Path

from torchtitan_lite import durable
from torchtitan_lite.checkpoint.manifest import MANIFEST

LATEST = "latest"
_STEP = re.compile(r"step-(0|[1-9][0-9]*)", re.ASCII)
_SCRATCH = re.compile(r"step-[0-9]+\.tmp-[0-9a-f]{8}", re.ASCII)
_LOG = logging.getLogger(__name__)


class Steps:
    """The steps of one run, in their own folder inside the folder of the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """Return the path of the folder of `step`, which need not exist."""
        return self.folder / f"step-{step}"

    def published(self) -> list[int]:
        """Return the published steps in ascending order. A link to a folder is not a step."""
        paths = {step: self.path(step) for step in self.named()}
        return [step for step, path in paths.items() if path.is_dir() and not path.is_symlink()]

    def named(self) -> list[int]:
        """Return the steps whose names are taken by a folder, file or link, in ascending order."""
        try:
            names = os.listdir(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(found[1]) for found in map(_STEP.fullmatch, names) if found)

    def scratch(self, step: int) -> Path:
        """Make and return a new folder to write `step` to."""
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            durable.sync(self.folder.parent)
        place = durable.scratch_path(self.path(step))
        place.mkdir()
        return place

    def publish(self, scratch: Path, step: int) -> bool:
        """Rename `scratch` to the folder of `step`, and write the name of the step to `latest`.

        Returns whether the new name is on the disk, and logs a warning if it is not. Raises OSError if the
        step is not published.
        """
        target = self.path(step)
        if os.path.lexists(target):  # a rename would replace an empty folder
            raise FileExistsError(f"{target} is there already")
        try:
            for path in scratch.iterdir():
                if path.suffix != ".safetensors":  # each rank has synced its own file of tensors
                    durable.sync(path)
            durable.rename(scratch, target)
        except OSError as error:
            if scratch.exists():
                raise
            _LOG.warning("%s is there, but may not outlast a power cut (%s)", target, error.strerror)
            return False
        self.point_to(step)
        return True

    def latest_problem(self) -> str:
        """Return what is wrong with the file `latest`, or "" if nothing is wrong."""
        try:
            found = (self.folder / LATEST).read_bytes()
        except FileNotFoundError:
            return ""  # a run was killed after it published its first step and before it wrote this file
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
        """Remove the unfinished folders of steps that a killed run was writing or removing."""
        if not self.folder.is_dir() or self.folder.is_symlink():
            return
        for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False) and _SCRATCH.fullmatch(entry.name):
                shutil.rmtree(entry.path)
                _LOG.info("removed %s, which a run that was stopped had left", entry.path)

    def keep_latest(self, n: int) -> None:
        """Remove all steps except the newest `n`. Remove no step if the folder is a link."""
        for step in self.published()[:-n]:
            if self.folder.is_symlink():
                _LOG.warning("%s is a link: its old steps stay", self.folder)
                return
            # Rename the step first: a partly removed step must never have a step's name.
            doomed = durable.scratch_path(self.path(step))
            self.path(step).rename(doomed)
            shutil.rmtree(doomed)

    def set_aside(self, steps: list[int], to: Path) -> None:
        """Move `steps` to the folder `to` on the same disk: the run will save steps with the same names."""
        if steps and not self.latest_problem():
            (self.folder / LATEST).unlink(missing_ok=True)  # `latest` names one of `steps`
        for step in steps:
            to.mkdir(parents=True, exist_ok=True)
            self.path(step).rename(to / self.path(step).name)
            _LOG.warning("moved %s to %s", self.path(step), to)

    def point_to(self, step: int) -> None:
        """Write the published `step` to `latest`. Log a failure: no start of a run depends on `latest`."""
        if problem := self.latest_problem():
            _LOG.warning("%s in %s is DAMAGED and is written again: %s", LATEST, self.folder, problem)
        try:
            with durable.replaced(self.folder / LATEST) as stream:
                stream.write(self._pointer(step))
        except OSError as error:
            _LOG.warning("%s in %s cannot be written (%s)", LATEST, self.folder, error.strerror)

    def _pointer(self, step: int) -> bytes:
        digest = sha256((self.path(step) / MANIFEST).read_bytes()).hexdigest()
        return f"step-{step} manifest-sha256:{digest}\n".encode()
