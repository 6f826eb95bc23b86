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
from typing import BinaryIO, Protocol

from torchtitan_lite.config.load import near
from torchtitan_lite.data.files import SourceFile, config_error, stamp_of, unreadable

PIECE_BYTES = 256 << 10
# Cut before a single space between words, or after a single line break between lines. Common pre-tokenizers
# split the text there anyway, so the pieces of a document encode to the ids of the whole document.
_SAFE_CUTS = (re.compile(rb"(?<=\S)(?= \S)"), re.compile(rb"(?<=\S\n)(?=\S)"))


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
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8 text (byte 0x{line[error.start]:02x} at offset {error.start:,} of the line)"
        raise config_error(
            "data.path", where, rule, "convert the file to UTF-8, or correct the line"
        ) from None
    except (ValueError, RecursionError) as error:
        rule = f"is not JSON ({error})"
        raise config_error("data.path", where, rule, "write one JSON object a line") from None
    if not isinstance(content, dict):
        remedy = f'write {{"{field}": "..."}} on each line'
        raise config_error("data.path", where, "is not a JSON object", remedy)
    if field not in content:
        raise config_error(
            "data.field", field, f"is not a key of the object in {where}", near(field, content)
        )
    if not isinstance(content[field], str):
        rule = f"is not the key of a string in {where}"
        raise config_error("data.field", field, rule, "name the key of a text, or correct the line")
    try:
        return content[field].encode()
    except UnicodeEncodeError:
        rule = "has half of a surrogate pair in its text"
        raise config_error("data.path", where, rule, "write all of it") from None


@contextmanager
def _reading(file: SourceFile) -> Iterator[BinaryIO]:
    """Open the file for the block.

    Raises ConfigError if the file cannot be read, or if the file has changed since it was hashed.
    """
    try:
        with file.path.open("rb") as stream:
            yield stream
            # The hash is part of the name of the shards, so the shards must have the text that was hashed.
            if stamp_of(stream) != file.stamp:
                rule, remedy = "changed while it was read", "start again when nothing writes to it"
                raise config_error("data.path", str(file.path), rule, remedy)
    except OSError as error:
        unreadable(error, file.path)
