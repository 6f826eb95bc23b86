"""Folders that are either complete or not there, whoever builds them and whatever kills the builder."""

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOG = logging.getLogger(__name__)
_OURS = re.compile(r"[A-Za-z0-9_]+-[0-9a-f]{24}(\.tmp|\.lock)?")


def name(kind: str, key: str) -> str:
    """The name of the folder for what `key`, a hash, stands for."""
    made = f"{kind}-{key[:24]}"
    assert is_ours(made), made
    return made


def is_ours(name: str) -> bool:
    """Whether a file or folder of this name belongs to a cache: the folder may hold other things too."""
    return _OURS.fullmatch(name) is not None


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the right to build `folder`, waiting for it; it ends with the process, however that ends."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock_file(folder).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.info("waiting for another process that builds %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A fresh folder beside `folder` to build it in, for who holds the right; gone if not published."""
    place = folder.with_name(f"{folder.name}.tmp")
    for left in (place, folder):
        if left.exists():
            shutil.rmtree(left)
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def publish(built: Path, folder: Path) -> None:
    """Put what was built in `scratch(folder)` in its place, at once and for good."""
    for file in built.iterdir():
        _sync(file)
    _sync(built)
    built.rename(folder)
    _sync(folder.parent)


def sweep(parent: Path) -> None:
    """Remove what killed builders left in `parent`; what a living one is building stays."""
    for left in parent.glob("*.tmp"):
        if is_ours(left.name):
            # Also where the folder can only be read.
            with suppress(OSError), _lock_file(left.with_suffix("")).open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)


def _lock_file(folder: Path) -> Path:
    # Never removed: a process could hold the lock of a file that the next one no longer finds.
    return folder.with_name(f"{folder.name}.lock")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
