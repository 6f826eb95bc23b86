"""The run's own folder: config.toml, metrics.jsonl, the TensorBoard and trace folders, and exit.json."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

_LOG = logging.getLogger(__name__)

_FILES = ("config.toml", "metrics.jsonl", "exit.json", "sample_ids", "tokenizer", "hf", "hf_source.json")
_EARLIER = "earlier"
_LOCK = "lock"
# What file systems answer that have no locks, such as Lustre that is mounted without them.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def is_inside(subfolder: str) -> bool:
    """Whether a configured subfolder stays within the run's folder and is nothing else that is there."""
    path = Path(subfolder)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and path.parts[0].removesuffix(".partial") not in (*_FILES, _EARLIER, _LOCK)


class InUse(Exception):
    """Another run has the folder; the message says which, as far as that is known."""


def make_folder(dump_folder: str, name: str, flavor: str) -> Path:
    """Make the run's folder: `dump_folder` as given, `outputs/<name>-<flavor>-<time>` when that is empty."""
    if not dump_folder:
        size = Path(flavor).name  # a model in a folder has its path for a flavor
        return free_folder(Path("outputs").absolute(), f"{name}-{size}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = Path(dump_folder).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def lock(folder: Path, seconds: float = 0) -> IO[str]:
    """Take the folder for this process, until it ends or the file that is returned is closed.

    Raises InUse when another process has it for longer than `seconds`: one that was killed may take a moment.
    Where the file system has no locks, nobody is kept out, and a warning says so.
    """
    file = (folder / _LOCK).open("a+", encoding="utf-8")
    try:
        _wait_for(file, time.monotonic() + seconds)
    except BlockingIOError:
        with file:
            file.seek(0)
            raise InUse(file.read().strip()) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            file.close()
            raise
        _LOG.warning(
            "%s: this file system has no locks (%s): a second run in the folder would not be refused",
            folder / _LOCK,
            error.strerror,
        )
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _wait_for(file: IO[str], deadline: float) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.1)


def set_aside(folder: Path, subfolders: tuple[str, ...] = (), used: Sequence[str] = ()) -> None:
    """Move what an earlier run left, `subfolders` included, to a folder `earlier` inside of `folder`.

    Two runs in one metrics file would read as one. What `used`, absolute paths, is in stays.
    """
    names = (*_FILES, *(Path(subfolder).parts[0] for subfolder in subfolders))
    kept = {place for path in used for place in (Path(path), *Path(path).parents)}
    left = [folder / name for name in names if (folder / name).exists() and folder / name not in kept]
    if left:
        earlier = free_folder(folder, _EARLIER)
        for path in left:
            path.rename(earlier / path.name)


def write_exit(
    folder: Path, status: int, outcome: str, *, step: int | None = None, message: str = ""
) -> None:
    """Say in `exit.json` how the run ended, for programs that torchrun tells no more than 0 or 1.

    Raises OSError where there is no room for it, and leaves nothing of it then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {"status": status, "outcome": outcome, "step": step, "message": message}
    partial = folder / "exit.json.partial"
    try:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / "exit.json")
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_refusal(folder: Path, message: str) -> None:
    """Say in `exit.json` that a start was refused; what it said of an earlier run moves to `earlier`.

    Nothing is said in the folder of a run that goes on, as far as there are locks to know one by.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        own = lock(folder)
    except InUse:
        return
    with own:
        keep_exit(folder)
        write_exit(folder, 2, "refused", step=0, message=message)


def keep_exit(folder: Path) -> None:
    """Move what `exit.json` says of an earlier run to `earlier`; what it says of a refusal is not kept."""
    path = folder / "exit.json"
    if path.exists() and _outcome(path) != "refused":
        path.rename(free_folder(folder, _EARLIER) / "exit.json")


def _outcome(path: Path) -> object:
    try:
        return json.loads(path.read_bytes()).get("outcome")
    except (OSError, ValueError, AttributeError):
        return None


class Lines:
    """Appends JSON objects to a file, one a line.

    Where that fails, as on a full disk, a warning says so once: the run is worth more than its reports.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._has_failed = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Append an object."""
        self._try(lambda: self._file.write(json.dumps(record) + "\n"))

    def close(self) -> None:
        """Nothing more is appended."""
        self._try(self._file.close)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if not self._has_failed:
                _LOG.warning("lines of %s are lost: it cannot be written (%s)", self._path, error.strerror)
            self._has_failed = True


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop from a file of JSON objects, one a line, those that `keep` is not true of, all at once.

    It is asked of lines with a whole number as "step". Others go: a killed run leaves half of one.
    Nothing happens where there is no file.
    """
    if not path.exists():
        return
    partial = path.with_name(f"{path.name}.partial")
    with path.open("rb") as before, partial.open("wb") as after:
        kept = (line for line in before if (record := _record(line)) is not None and keep(record))
        after.writelines(line.rstrip(b"\n") + b"\n" for line in kept)
        after.flush()
        os.fsync(after.fileno())
    partial.replace(path)
    _sync(path.parent)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_folder(parent: Path, stem: str) -> Path:
    """A new folder in `parent`, with a number added to its name when that is taken."""
    for number in range(1, 10_000):
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent / stem} and 9998 more are taken")
