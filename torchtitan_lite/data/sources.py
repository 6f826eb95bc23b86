"""Sources of text: documents from files, JSON lines or a program, as UTF-8 pieces that fit into memory."""

import codecs
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol

from torchtitan_lite.config.load import ConfigError, Problem, near

PIECE_BYTES = 256 << 10
# Cut before a single space between words, or after a single line break between lines. Common pre-tokenizers
# split the text there anyway, so the pieces of a document encode to the ids of the whole document.
_SAFE_CUTS = (re.compile(rb"(?<=\S)(?= \S)"), re.compile(rb"(?<=\S\n)(?=\S)"))
_NOTHING = frozenset(hashlib.sha256(content).digest() for content in (b"", codecs.BOM_UTF8))
CACHED = re.compile(r"([A-Za-z0-9_]+-[0-9a-f]{24})(\.tmp-[0-9a-f]{8}|\.lock)?")
"""The pattern of the folder and file names in the cache of token shards. Other files may be beside them."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document of a dataset, as pieces of text."""

    identity: bytes
    """The bytes that decide whether the document is held out: a file's name, or the text itself."""
    size: int
    """The size of the text in bytes of UTF-8."""
    pieces: Iterator[bytes]
    """The pieces of the text in order, which can be read only once. No piece ends within a character."""


class Source(Protocol):
    """The text of a dataset."""

    @property
    def digest(self) -> str:
        """A string that changes whenever the text changes."""
        ...

    @property
    def n_bytes(self) -> int:
        """The size of the text in bytes of UTF-8, exactly or nearly."""
        ...

    def documents(self) -> Iterator[Document]:
        """Yield all documents, the same at each call. Read a document's pieces before the next document."""
        ...


class Texts:
    """A source of texts in memory, or of texts that a function yields. Each text is a document.

    The function must yield the same texts at every call. `digest` must change whenever the texts change. By
    default `digest` is the hash of all texts. Give a digest if reading all texts takes long.
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
        return (_text_document(text.encode()) for text in texts)

    @cached_property
    def _measured(self) -> tuple[str, int]:
        """The hash of all texts, and their size in bytes."""
        whole, n_bytes = hashlib.sha256(), 0
        for document in self.documents():
            whole.update(hashlib.sha256(document.identity).digest())
            n_bytes += document.size
        return whole.hexdigest(), n_bytes


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
class FileSource:
    """A source of text from files, each of which holds some text."""

    files: tuple[SourceFile, ...]
    json_field: str | None
    """The key of the text in each JSON line. None if the files are plain text."""

    @property
    def digest(self) -> str:
        """The hash of the names and contents of all files."""
        whole = hashlib.sha256()
        for file in self.files:
            whole.update(os.fsencode(file.name) + b"\0" + file.sha256)
        return whole.hexdigest()

    @property
    def n_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def documents(self) -> Iterator[Document]:
        for file in self.files:
            if self.json_field is None:
                yield Document(identity=os.fsencode(file.name), size=file.size, pieces=_file_pieces(file))
            else:
                yield from _json_documents(file, self.json_field)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A file, or the files below a folder, that may hold text."""

    root: Path
    suffix: str = ""
    """The ending of the names of the files that are read from a folder."""
    left_out: frozenset[str] = frozenset()
    """The names of folders whose files are left out."""

    def has_files(self) -> bool:
        """Return True if there is a file, or if a folder cannot be read. `read` then raises the error."""
        try:
            return next(self._paths(), None) is not None
        except ConfigError:
            return True

    def read(self, *, only_text: bool) -> tuple[list[SourceFile], int, int]:
        """Read and hash the files. Return (files with text, number of empty files, number of other files).

        With `only_text`, files that are not UTF-8 text are left out, and counted as other files.
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
        """Return the files by relative path. Each is there once: by its own path, else by its first link."""
        base = self.root if self.root.is_dir() else self.root.parent
        names = {path.relative_to(base).as_posix(): path for path in self._paths()}
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

    def _paths(self) -> Iterator[Path]:
        """Yield the files at or below the root that may hold text, in no particular order."""
        if not self.root.is_dir():
            yield self.root
            return
        for folder, subfolders, names in os.walk(self.root, onerror=_unreadable):
            subfolders[:] = [
                name for name in subfolders if name not in self.left_out and not _is_hidden(name)
            ]
            names = (name for name in names if name.endswith(self.suffix) and not _is_hidden(name))
            yield from (path for name in names if os.path.isfile(path := Path(folder, name)))


def _is_hidden(name: str) -> bool:
    # The cache is not part of the text, but may lie in the dataset's folder.
    return name.startswith(".") or CACHED.fullmatch(name) is not None


def _inspect(path: Path, name: str) -> tuple[SourceFile, bool]:
    """Return a file with its hash, and whether the whole file is text: UTF-8 without a NUL byte."""
    whole, decoder, is_text = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), True
    try:
        with path.open("rb") as stream:
            stamp = _stamp(stream)
            while block := stream.read(PIECE_BYTES):
                whole.update(block)
                is_text = is_text and _decodes(decoder, block)
    except OSError as error:
        _unreadable(error, path)
    is_text = is_text and _decodes(decoder, b"", final=True)
    file = SourceFile(path=path, name=name, sha256=whole.digest(), stamp=stamp)
    return file, is_text


def _decodes(decoder: codecs.IncrementalDecoder, block: bytes, *, final: bool = False) -> bool:
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError:
        return False
    return b"\0" not in block


def _json_documents(file: SourceFile, field: str) -> Iterator[Document]:
    """Yield a document for each line of a JSON lines file. Raises ConfigError if a line holds no document."""
    with _reading(file) as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield _text_document(_field_of(line, field, f"{file.path}, line {number}"))


def _text_document(text: bytes) -> Document:
    """Return a UTF-8 text in memory as a document."""
    return Document(identity=text, size=len(text), pieces=_pieces(io.BytesIO(text)))


def _file_pieces(file: SourceFile) -> Iterator[bytes]:
    with _reading(file) as stream:
        if stream.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            stream.seek(0)
        yield from _pieces(stream)


def _pieces(stream: BinaryIO) -> Iterator[bytes]:
    rest = stream.read(PIECE_BYTES)
    while block := stream.read(PIECE_BYTES):
        text = rest + block
        cut = _last_cut(text)
        yield text[:cut]
        rest = text[cut:]
    if rest:
        yield rest


def _last_cut(text: bytes) -> int:
    """Return where to cut `text`, in its second half: at a safe cut, else after a line or a character."""
    half = len(text) // 2
    for safe in _SAFE_CUTS:
        for window in (1 << 10, half):
            if found := list(safe.finditer(text, max(half, len(text) - window))):
                return found[-1].end()
    line_start = text.rfind(b"\n", half) + 1
    return line_start or character_start(text, len(text) - 1)


def character_start(text: bytes, place: int) -> int:
    """Return the start of the UTF-8 character that covers `place`."""
    while place > 0 and text[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _field_of(line: bytes, field: str, where: str) -> bytes:
    """Return the UTF-8 bytes of `field` in a JSON line. Raises ConfigError if the line has no such text."""
    try:
        content = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        rule = f"is not JSON ({error})"
        raise _error("data.path", where, rule, "write one JSON object a line") from None
    if not isinstance(content, dict):
        remedy = f'write {{"{field}": "..."}} on each line'
        raise _error("data.path", where, "is not a JSON object", remedy)
    if field not in content:
        raise _error("data.field", field, f"is not a key of the object in {where}", near(field, content))
    if not isinstance(content[field], str):
        rule = f"is not the key of a string in {where}"
        raise _error("data.field", field, rule, "name the key of a text, or correct the line")
    try:
        return content[field].encode()
    except UnicodeEncodeError:
        rule = "has half of a surrogate pair in its text"
        raise _error("data.path", where, rule, "write all of it") from None


def _stamp(stream: BinaryIO) -> tuple[int, int, int]:
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ino


@contextmanager
def _reading(file: SourceFile) -> Iterator[BinaryIO]:
    """Open the file for the block.

    Raises ConfigError if the file cannot be read, or if the file has changed since it was hashed.
    """
    try:
        with file.path.open("rb") as stream:
            yield stream
            # The hash is part of the name of the shards, so the shards must have the text that was hashed.
            if _stamp(stream) != file.stamp:
                rule, remedy = "changed while it was read", "start again when nothing writes to it"
                raise _error("data.path", str(file.path), rule, remedy)
    except OSError as error:
        _unreadable(error, file.path)


def _unreadable(error: OSError, path: Path | None = None) -> NoReturn:
    """Raise the ConfigError for a file or folder of the dataset that cannot be read."""
    rule, remedy = f"cannot be read ({error.strerror or error})", "change its permissions, or name another"
    # Unlike an error from open(), an error from read() does not name the file.
    raise _error("data.path", str(path or error.filename), rule, remedy)


def _error(key: str, value: str, rule: str, remedy: str) -> ConfigError:
    return ConfigError([Problem(key, value, rule, remedy)])
