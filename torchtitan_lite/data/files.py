"""The files of a dataset: which ones are below a folder, which of them hold text, and what is left out."""

import codecs
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from torchtitan_lite import durable
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.data import kinds
from torchtitan_lite.data.kinds import HEAD_BYTES, Kind, TextCheck, is_json_line, json_kind, kind_of
from torchtitan_lite.data.leftout import BadByte, LeftOut

CACHED = re.compile(r"([A-Za-z0-9_]+-[0-9a-f]{24})(\.tmp-[0-9a-f]{8}|\.lock)?")
"""The pattern of the folder and file names in the cache of token shards. Other files may be beside them."""
_NOTHING = frozenset(hashlib.sha256(content).digest() for content in (b"", codecs.BOM_UTF8))
_RUN_CONFIG, _RUN_RECORDS = "config.toml", {"metrics.jsonl", "exit.json"}
"""Files of a run, which tell the folder of a run even if it was copied without its lock file."""
_BLOCK_BYTES = 256 << 10
_MOST_LOOKED_INTO = 1000
"""The number of files with another ending that are opened to find out their kind."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of a dataset, with its hash and its state at the time of hashing."""

    path: Path
    name: str
    """The path relative to the dataset's folder, with forward slashes."""
    sha256: bytes
    stamp: tuple[int, int, int]
    """The size, the time of the last change and the inode, which change when something writes to the file."""

    @property
    def size(self) -> int:
        return self.stamp[0]


@dataclass(frozen=True, kw_only=True)
class Place:
    """A file, or the files below a folder, that may hold text."""

    root: Path
    suffix: str = ""
    """The ending, in any case, of the names of the files that are read from a folder."""
    without: frozenset[str] = frozenset()
    """The names of folders that are no part of the dataset. They are not counted as left out."""
    is_json_lines: bool = False
    """True if each line of a file is JSON, and errors in the text are therefore found line by line."""

    def has_files(self, left_out: LeftOut | None = None) -> bool:
        """Return True if there is a file, or if a folder cannot be read. `read` then raises the error.

        If there is no file, `left_out` has all that is there.
        """
        try:
            return next(self._paths(left_out or LeftOut()), None) is not None
        except ConfigError:
            return True

    def read(self) -> tuple[list[SourceFile], LeftOut]:
        """Read and hash the files. Return the files with text in the order of their names, and the others.

        Raises ConfigError if a file or folder cannot be read, if the root is a file without text, or if a
        file that should have JSON lines has something else.
        """
        left_out = LeftOut()
        names, kept = self._named(left_out), []
        for name in sorted(names):
            file, kind, bad = self._inspect(names[name], name)
            if file.sha256 in _NOTHING:
                kind = kinds.EMPTY
            if kind is None:
                kept.append(file)
            elif not self.root.is_dir() or (self.is_json_lines and kind is not kinds.EMPTY):
                where = f" ({bad.where()})" if bad else ""
                raise config_error("data.path", str(file.path), kind.rule + where, kind.remedy(file.path))
            else:
                left_out.add(kind, name, file.size, bad)
        return kept, left_out

    def _inspect(self, path: Path, name: str) -> tuple[SourceFile, Kind | None, BadByte | None]:
        """Return a file with its hash. If the file is not text, return its kind, and its first bad byte."""
        whole, check, head = hashlib.sha256(), TextCheck(), b""
        try:
            with path.open("rb") as stream:
                stamp = stamp_of(stream)
                while block := stream.read(_BLOCK_BYTES):
                    whole.update(block)
                    head = head or block[:HEAD_BYTES]
                    if not self.is_json_lines:
                        check.add(block)
        except OSError as error:
            unreadable(error, path)
        check.add(b"", final=True)
        kind = kind_of(head) or (json_kind(head) if self.is_json_lines else check.kind())
        bad = None
        if kind is kinds.NOT_UTF_8 and check.bad is not None:
            offset, value = check.bad
            bad = BadByte(path=path, offset=offset, value=value)
        return SourceFile(path=path, name=name, sha256=whole.digest(), stamp=stamp), kind, bad

    def _named(self, left_out: LeftOut) -> dict[str, Path]:
        """Return the files by relative path. Each is there once: by its own path, else by its first link."""
        base = self.root if self.root.is_dir() else self.root.parent
        names = {path.relative_to(base).as_posix(): path for path in self._paths(left_out)}
        links = {name for name, path in names.items() if path.is_symlink()}
        real_base = os.path.realpath(base)
        # `_paths` does not follow links to folders, so only the last part of a name can be a link.
        taken = {os.path.join(real_base, name) for name in names.keys() - links}
        for name in sorted(links):
            real = os.path.realpath(names[name])
            if real in taken:
                del names[name]
            taken.add(real)
        return names

    def _paths(self, left_out: LeftOut) -> Iterator[Path]:
        """Yield the files at or below the root that may hold text, in no particular order.

        Everything else below the root is added to `left_out`.
        """
        if not self.root.is_dir():
            yield self.root
            return
        other = _Others(self.root, self.suffix, left_out)
        for folder, subfolders, names in os.walk(self.root, onerror=unreadable):
            if folder != os.fspath(self.root) and _is_run(folder, names):
                other.add(kinds.RUN, folder)
                subfolders.clear()
                continue
            subfolders[:] = [name for name in subfolders if self._enters(folder, name, other)]
            for name in names:
                path = os.path.join(folder, name)
                if name.startswith("."):
                    other.add(kinds.HIDDEN_FILE, path)
                elif CACHED.fullmatch(name):
                    continue  # the lock of a token cache
                elif (size := other.size_of(path)) is None:
                    continue
                elif name.lower().endswith(self.suffix):
                    yield Path(path)
                else:
                    other.add_file(path, size)

    def _enters(self, folder: str, name: str, other: "_Others") -> bool:
        """Return True if the subfolder `name` of `folder` is read."""
        path = os.path.join(folder, name)
        if name in self.without:
            return False
        if CACHED.fullmatch(name):  # the cache is not part of the text, but may lie in the dataset's folder
            other.add(kinds.CACHE, path)
        elif name.startswith("."):
            other.add(kinds.HIDDEN_FOLDER, path)
        elif os.path.islink(path):
            other.add(kinds.FOLDER_LINK, path)
        else:
            return True
        return False


class _Others:
    """The files and folders below `root` that are not read because of their names or places.

    There may be millions, so paths are strings, and each file costs one call of the system.
    """

    def __init__(self, root: Path, suffix: str, left_out: LeftOut) -> None:
        self._left_out, self._n_looked_into = left_out, 0
        self._n_before_name = len(os.path.join(root, ""))
        ending = f"without the ending {suffix}"
        self._json_lines = Kind(noun="JSON Lines file", detail=ending)
        self._other = Kind(noun="file", detail=ending)

    def add(self, kind: Kind, path: str, n_bytes: int = 0) -> None:
        """Add a file or folder."""
        self._left_out.add(kind, path[self._n_before_name :], n_bytes)

    def size_of(self, path: str) -> int | None:
        """Return the size of a file in bytes. If `path` is no file, add it and return None."""
        try:
            status = os.stat(path)
        except OSError:
            self.add(kinds.BROKEN_LINK, path)
            return None
        if stat.S_ISREG(status.st_mode):
            return status.st_size
        self.add(kinds.SPECIAL, path)
        return None

    def add_file(self, path: str, n_bytes: int) -> None:
        """Add a file whose name has another ending. The content tells the kind, for the first files."""
        kind = self._other
        if n_bytes == 0:
            kind = kinds.EMPTY
        elif self._n_looked_into < _MOST_LOOKED_INTO:
            self._n_looked_into += 1
            # A file that is not read need not be readable.
            with suppress(OSError), open(path, "rb") as stream:
                kind = self._kind_of(stream.read(HEAD_BYTES))
        self.add(kind, path, n_bytes)

    def _kind_of(self, head: bytes) -> Kind:
        if kind := kind_of(head):
            return kind
        check = TextCheck()
        check.add(head)
        if kind := check.kind():
            return kind
        return self._json_lines if is_json_line(head) else json_kind(head) or self._other


def _is_run(folder: str, names: list[str]) -> bool:
    """Return True if `folder`, with files of these names, is the folder of a run of this package.

    Such a folder has a lock file before the run reads its text. The files of runs are no text: they change
    from one start to the next, and the text must be the same when a run resumes.
    """
    if _RUN_CONFIG in names and not _RUN_RECORDS.isdisjoint(names):
        return True
    return durable.FOLDER_LOCK in names and durable.is_lock(Path(folder, durable.FOLDER_LOCK))


def stamp_of(stream: BinaryIO) -> tuple[int, int, int]:
    """Return the `SourceFile.stamp` of an open file."""
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ino


def unreadable(error: OSError, path: Path | None = None) -> NoReturn:
    """Raise the ConfigError for a file or folder of the dataset that cannot be read."""
    rule, remedy = f"cannot be read ({error.strerror or error})", "change its permissions, or name another"
    # Unlike an error from open(), an error from read() does not name the file.
    raise config_error("data.path", str(path or error.filename), rule, remedy)


def config_error(key: str, value: object, rule: str, remedy: str) -> ConfigError:
    """Return the error with this one problem."""
    return ConfigError([Problem(key, value, rule, remedy)])
