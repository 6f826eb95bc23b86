"""The folder of a run: the names of its files, its lock, and files that must survive a crash."""

import contextlib
import itertools
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from torchtitan_lite import durable
from torchtitan_lite.durable import InUse
from torchtitan_lite.launch.end import End

_LOG = logging.getLogger(__name__)

LOG = "log.txt"
"""The file with the lines that the run prints."""
_FILES = (
    "config.toml",
    "run.json",
    "metrics.jsonl",
    LOG,
    "exit.json",
    "sample_ids",
    "tokenizer",
    "hf",
    "hf_source.json",
)
_LONGEST_OVERRIDES = 80
"""The most characters that overrides of the model add to the name of a run's folder."""
_LONGEST_PART = 120
"""The most bytes of another folder's name in the name of a folder. A whole name may have 255 bytes."""
_EARLIER = "earlier"


def is_inside(subfolder: str) -> bool:
    """Return True if the path `subfolder` stays inside the run's folder and takes no name in use there."""
    path = Path(subfolder)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and path.parts[0].removesuffix(".partial") not in (*_FILES, _EARLIER, durable.FOLDER_LOCK)


def make_folder(dump_folder: str, name: str, flavor: str, overrides: Mapping[str, Any] | None = None) -> Path:
    """Make the run's folder: `dump_folder`, or a new folder in `outputs` if `dump_folder` is empty.

    The name of a new folder has the model's family, its size with the `overrides` of the size, and the time.
    """
    if not dump_folder:
        # The flavor is a path if the model is read from a folder.
        size = shortened(Path(os.path.abspath(os.path.expanduser(flavor))).name)
        stem = "-".join([name, size, *_short(overrides or {}), time.strftime("%Y%m%d-%H%M%S")])
        return free_folder(Path("outputs").absolute(), stem)
    folder = Path(dump_folder).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def shortened(name: str) -> str:
    """Return the start of a file's name, short enough to be a part of another name."""
    return os.fsencode(name)[:_LONGEST_PART].decode(errors="ignore")


def _short(overrides: Mapping[str, Any]) -> list[str]:
    """Return a word for each override, such as "n_layers4" and "qk_norm_false".

    The words are fit for a file name. Overrides whose words would make the name too long are only counted.
    """
    words = []
    for key, value in _leaves(overrides):
        text = json.dumps(value)
        word = key + text if text[0].isdigit() else f"{key}_{text}"
        words.append(re.sub(r"[^A-Za-z0-9.+-]+", "_", word).strip("_"))
    lengths = itertools.accumulate(len(word) + 1 for word in words)
    fitting = [word for word, length in zip(words, lengths, strict=True) if length <= _LONGEST_OVERRIDES]
    n_more = len(words) - len(fitting)
    return [*fitting, f"{n_more}{'more' if fitting else 'overrides'}"] if n_more else fitting


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the dotted key and the value of each value in nested tables."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def lock(folder: Path, seconds: float = 0) -> IO[str]:
    """Lock the folder for this process, until the returned file is closed or the process ends.

    Another process that holds the lock may be ending, so this waits up to `seconds`, then raises InUse. On a
    file system without locks the folder is not protected, and a warning says so.
    """
    return durable.lock(folder / durable.FOLDER_LOCK, seconds, required=False)


def set_aside(folder: Path, subfolders: tuple[str, ...] = (), used: Sequence[str] = ()) -> None:
    """Move the files and `subfolders` of an earlier run to the folder `earlier` inside of `folder`.

    Otherwise one metrics file would hold two runs. A file or folder stays if it is, or contains, one of the
    absolute paths in `used`, which this run reads.
    """
    names = (*_FILES, *(Path(subfolder).parts[0] for subfolder in subfolders))
    kept = {place for path in used for place in (Path(path), *Path(path).parents)}
    left = [folder / name for name in names if (folder / name).exists() and folder / name not in kept]
    if left:
        earlier = free_folder(folder, _EARLIER)
        for path in left:
            path.rename(earlier / path.name)


def write_exit(folder: Path, end: End, step: int = 0) -> None:
    """Write to `exit.json` how the run ended, for programs that get only 0 or 1 from torchrun.

    If this run was refused before it started, the `exit.json` of an earlier run is moved to `earlier`. If the
    disk is full, a line on stderr says so, and the old `exit.json` stays.
    """
    path = folder / "exit.json"
    record = {"status": end.status, "outcome": end.outcome, "step": step, "message": end.message}
    try:
        folder.mkdir(parents=True, exist_ok=True)  # it may have been removed during the run
        if end.outcome == "refused" and path.exists() and _outcome(path) != "refused":
            path.rename(free_folder(folder, _EARLIER) / path.name)
        with durable.replaced(path) as stream:
            stream.write((json.dumps(record, indent=2) + "\n").encode())
    except OSError as error:  # a missing exit.json must not change how the run ends
        print(f"exit.json in {folder} cannot be written ({error.strerror})", file=sys.stderr)


def write_refusal(folder: Path, end: End) -> None:
    """Write to `exit.json` that a run was refused before it started, unless another run holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(InUse), lock(folder):
        write_exit(folder, end)


def _outcome(path: Path) -> object:
    try:
        return json.loads(path.read_bytes()).get("outcome")
    except (OSError, ValueError, AttributeError):
        return None


class Lines:
    """A file to which JSON objects are appended, one per line.

    If writes fail, for example on a full disk, one warning says so and the run continues.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._has_failed = False

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record` as one line."""
        self._try(lambda: self._file.write(json.dumps(record) + "\n"))

    def close(self) -> None:
        """Close the file."""
        self._try(self._file.close)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if not self._has_failed:
                _LOG.warning("lines of %s are lost: it cannot be written (%s)", self._path, error.strerror)
            self._has_failed = True


def keep_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file of JSON objects, one per line, with only the objects for which `keep` returns True.

    A line is also dropped if it is no object with an integer "step": a killed run may leave half a line. Does
    nothing if the file does not exist.
    """
    if not path.exists():
        return
    with path.open("rb") as before, durable.replaced(path) as after:
        kept = (line for line in before if (record := _record(line)) is not None and keep(record))
        after.writelines(line.rstrip(b"\n") + b"\n" for line in kept)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def free_folder(parent: Path, stem: str) -> Path:
    """Make a new folder `stem` in `parent`. If the name is taken, a number is added to it."""
    for number in range(1, 10_000):
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent / stem} and 9998 more are taken")
