"""Write files and folders that are complete or absent after a crash, and lock files.

This module needs only the standard library.
"""

import errno
import fcntl
import glob
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_LOG = logging.getLogger(__name__)
FOLDER_LOCK = "lock"
"""The name of the lock file inside of a folder that one process at a time may use, such as a run's folder."""
_OWNER = re.compile(rb"process \d+ on \S*\n")
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""The errno values of a file system that has no locks, such as Lustre mounted without locks."""


class InUse(Exception):
    """The error that another process holds a lock. The message has the id and the host of that process."""


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin_sync(stream: IO[bytes], start: int, stop: int) -> None:
    """Start writing the bytes [start, stop) of a file to the disk, so that a later `sync` waits less."""
    stream.flush()
    # DONTNEED says that nobody will read these bytes. Linux then starts to write them to the disk, and drops
    # from memory only bytes that are already on the disk. macOS has no such call.
    # https://man7.org/linux/man-pages/man2/posix_fadvise.2.html
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(stream.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)


def publish(built: Path, target: Path) -> None:
    """Wait until a file, or a folder and all of its content, is on the disk. Then rename it to `target`.

    Raises OSError like `rename`.
    """
    for path in built.rglob("*"):
        sync(path)
    rename(built, target)


def rename(built: Path, target: Path) -> None:
    """Rename a file, or a folder whose files are on the disk, to `target`.

    A file may replace a file. A folder may replace only an empty folder. Raises OSError. If `built` is gone
    when OSError is raised, the rename has been done, but a power cut may undo the rename.
    """
    sync(built)
    built.rename(target)
    sync(target.parent)


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for the block to write. After the block, the file replaces `path` once it is on the disk.

    If the block or the disk fails, `path` stays as it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
        rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def scratch_path(folder: Path) -> Path:
    """Return an unused path beside `folder`, for a folder that is being built or removed."""
    return folder.with_name(f"{folder.name}.tmp-{secrets.token_hex(4)}")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Make a new folder for the block to fill. After the block, the new folder is renamed to `folder`.

    If the block fails, the new folder is removed. Unfinished folders of killed processes are removed first.
    Raises OSError if `folder` exists and is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f"{glob.escape(folder.name)}.tmp-????????"):
        shutil.rmtree(left)
    scratch = scratch_path(folder)
    scratch.mkdir()
    try:
        yield scratch
        publish(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def lock(path: Path, seconds: float = 0, *, required: bool = True) -> IO[str]:
    """Lock the file at `path` until the returned file is closed or this process ends.

    Raises InUse if another process holds the lock for longer than `seconds`. If the file system has no locks,
    raises OSError if a lock is `required`, else warns and returns the file without a lock.
    """
    # The file is never removed. Otherwise one process could hold the lock of the removed file while the next
    # process locks a new file.
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
    try:
        _wait_for_lock(file, path, seconds)
    except BlockingIOError:
        with file:
            file.seek(0)
            raise InUse(file.read().strip()) from None
    except OSError as error:
        if required or error.errno not in _NO_LOCKS:
            file.close()
            raise
        _LOG.warning(
            "%s: this file system has no locks (%s): a second process would not be kept out",
            path,
            error.strerror,
        )
    # Write first and cut after that, so that the file always has an owner, which `is_lock` looks for.
    file.seek(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.truncate()
    file.flush()
    return file


def is_lock(path: Path) -> bool:
    """Return True if the file at `path` was written by `lock`, now or earlier."""
    try:
        with path.open("rb") as stream:
            return _OWNER.match(stream.read(400)) is not None
    except OSError:
        return False


def _wait_for_lock(file: IO[str], path: Path, seconds: float) -> None:
    deadline, is_first = time.monotonic() + seconds, True
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        if is_first:
            _LOG.info("waiting for another process that has locked %s", path)
            is_first = False
        time.sleep(0.1)
