"""Sources of text: files, listed and hashed, or texts that a program yields."""

import codecs
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.data import cache
from torchtitan_lite.data.documents import (
    PIECE_BYTES,
    Document,
    SourceFile,
    Stamp,
    json_documents,
    text_document,
    unreadable,
    whole_file,
)

_NOTHING = frozenset(hashlib.sha256(content).digest() for content in (b"", codecs.BOM_UTF8))


class Source(Protocol):
    """The text of a dataset."""

    @property
    def digest(self) -> str:
        """Changes whenever the text changes."""
        ...

    @property
    def n_bytes(self) -> int:
        """Bytes of UTF-8, exactly or nearly."""
        ...

    def documents(self) -> Iterator[Document]:
        """All documents, the same at each call. Read one document's pieces before you ask for the next."""
        ...


class Texts:
    """Texts in memory, or texts that a function yields: each text is a document.

    The function must yield the same texts at every call. `digest` must change whenever the texts change; by
    default it is the hash of all texts. Give a digest if reading all texts takes long.
    """

    def __init__(self, texts: Sequence[str] | Callable[[], Iterable[str]], digest: str = "") -> None:
        self._texts, self._digest = texts, digest

    @property
    def digest(self) -> str:
        return self._digest or self._measured[0]

    @property
    def n_bytes(self) -> int:
        return self._measured[1]

    def documents(self) -> Iterator[Document]:
        texts = self._texts() if callable(self._texts) else self._texts
        return (text_document(text.encode()) for text in texts)

    @cached_property
    def _measured(self) -> tuple[str, int]:
        """The hash of all texts, and their size in bytes."""
        whole, n_bytes = hashlib.sha256(), 0
        for document in self.documents():
            whole.update(hashlib.sha256(document.identity).digest())
            n_bytes += document.size
        return whole.hexdigest(), n_bytes


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """The files of a dataset, each of which holds some text."""

    files: tuple[SourceFile, ...]
    json_field: str | None
    """The key of a line's document, if the files are JSON lines."""

    @property
    def digest(self) -> str:
        """Hash of every file's name and content."""
        whole = hashlib.sha256()
        for file in self.files:
            whole.update(os.fsencode(file.name) + b"\0" + file.sha256)
        return whole.hexdigest()

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(file.stamp.size for file in self.files)

    def documents(self) -> Iterator[Document]:
        """All documents, file by file."""
        for file in self.files:
            if self.json_field is None:
                yield whole_file(file)
            else:
                yield from json_documents(file, self.json_field)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A file, or the files below a folder, that may hold text."""

    root: Path
    suffix: str = ""
    """The ending of the names of files in a folder."""
    left_out: frozenset[str] = frozenset()
    """Names of folders that are left out."""

    def has_files(self) -> bool:
        """True if there is a file, or part of the place cannot be read: `read` then says why."""
        try:
            return next(self._paths(), None) is not None
        except ConfigError:
            return True

    def read(self, *, only_text: bool) -> tuple[list[SourceFile], int, int]:
        """Read and hash the files: (files with text, number of empty files, number that are not UTF-8).

        With `only_text`, files that are not UTF-8 text are left out and counted.
        """
        kept, n_empty, n_not_text = [], 0, 0
        names = self._named()
        for name in sorted(names):
            file, is_text = _inspect(names[name], name)
            if file.sha256 in _NOTHING:
                n_empty += 1
            elif only_text and not is_text:
                n_not_text += 1
            else:
                kept.append(file)
        return kept, n_empty, n_not_text

    def _named(self) -> dict[str, Path]:
        """The files by relative path: each once, by its own path, else by the first link to it."""
        base = self.root if self.root.is_dir() else self.root.parent
        names = {path.relative_to(base).as_posix(): path for path in self._paths()}
        links = {name for name, path in names.items() if path.is_symlink()}
        real_base = os.path.realpath(base)
        # Folders below the base are never links.
        taken = {os.path.join(real_base, name) for name in names.keys() - links}
        for name in sorted(links):
            real = os.path.realpath(names[name])
            if real in taken:
                del names[name]
            taken.add(real)
        return names

    def _paths(self) -> Iterator[Path]:
        """The files at or below the root that may hold text, in no particular order."""
        if not self.root.is_dir():
            yield self.root
            return
        for folder, subfolders, names in os.walk(self.root, onerror=unreadable):
            subfolders[:] = [
                name for name in subfolders if name not in self.left_out and not _is_hidden(name)
            ]
            names = (name for name in names if name.endswith(self.suffix) and not _is_hidden(name))
            yield from (path for name in names if os.path.isfile(path := Path(folder, name)))


def _is_hidden(name: str) -> bool:
    # The cache is not part of the text, but may lie in the dataset's folder.
    return name.startswith(".") or cache.is_ours(name)


def _inspect(path: Path, name: str) -> tuple[SourceFile, bool]:
    """A file with its hash, and whether all of it is text: UTF-8 without a NUL byte."""
    whole, decoder, is_text = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), True
    try:
        with path.open("rb") as stream:
            stamp = Stamp.of(stream)
            while block := stream.read(PIECE_BYTES):
                whole.update(block)
                is_text = is_text and _decodes(decoder, block)
    except OSError as error:
        unreadable(error, path)
    is_text = is_text and _decodes(decoder, b"", final=True)
    return SourceFile(path=path, name=name, stamp=stamp, sha256=whole.digest()), is_text


def _decodes(decoder: codecs.IncrementalDecoder, block: bytes, *, final: bool = False) -> bool:
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError:
        return False
    return b"\0" not in block
