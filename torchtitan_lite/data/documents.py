"""Documents of files and lines, in pieces of UTF-8 that fit into memory."""

import codecs
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from torchtitan_lite.config.load import ConfigError, Problem, near

PIECE_BYTES = 256 << 10
# Cut before a single space between words, or after a single line break between lines. Common pre-tokenizers
# split the text there anyway, so the pieces of a document encode to the ids of the whole document.
_SAFE_CUTS = (re.compile(rb"(?<=\S)(?= \S)"), re.compile(rb"(?<=\S\n)(?=\S)"))


class Stamp(NamedTuple):
    """Properties of a file that change when something writes to it."""

    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, stream: BinaryIO) -> "Stamp":
        """The stamp of an open file."""
        status = os.fstat(stream.fileno())
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """A file of a dataset, as it was when it was hashed."""

    path: Path
    name: str
    """Path relative to the dataset's folder, with forward slashes."""
    stamp: Stamp
    sha256: bytes


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of a dataset."""

    identity: bytes
    """Decides whether the document is held out: a file's name, or the text itself."""
    size: int
    """Bytes of UTF-8."""
    pieces: Iterator[bytes]
    """The text in order, to be read once. No piece ends within a character."""


def whole_file(file: SourceFile) -> Document:
    """A text file as one document."""
    return Document(identity=os.fsencode(file.name), size=file.stamp.size, pieces=_file_pieces(file))


def json_documents(file: SourceFile, field: str) -> Iterator[Document]:
    """A document for each line of a JSON lines file. Raises ConfigError if a line holds no document."""
    with _reading(file) as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield text_document(_field_of(line, field, f"{file.path}, line {number}"))


def text_document(text: bytes) -> Document:
    """A UTF-8 text in memory as a document."""
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
    """The best place to cut `text`: safe and late if possible, in its second half."""
    half = len(text) // 2
    for safe in _SAFE_CUTS:
        for window in (1 << 10, half):
            if found := list(safe.finditer(text, max(half, len(text) - window))):
                return found[-1].end()
    line_start = text.rfind(b"\n", half) + 1
    return line_start or character_start(text, len(text) - 1)


def character_start(text: bytes, place: int) -> int:
    """The start of the UTF-8 character that covers `place`."""
    while place > 0 and text[place] & 0xC0 == 0x80:
        place -= 1
    return place


def _field_of(line: bytes, field: str, where: str) -> bytes:
    """The UTF-8 of one field of a JSON line."""
    try:
        content = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise _bad_line(where, f"is not JSON ({error})", "write one JSON object a line") from None
    if not isinstance(content, dict):
        raise _bad_line(where, "is not a JSON object", f'write {{"{field}": "..."}} on each line')
    if field not in content:
        remedy = near(field, content)
        raise ConfigError([Problem("data.field", field, f"is not a key of the object in {where}", remedy)])
    if not isinstance(content[field], str):
        rule = f"is not the key of a string in {where}"
        raise ConfigError([Problem("data.field", field, rule, "name the key of a text, or correct the line")])
    try:
        return content[field].encode()
    except UnicodeEncodeError:
        raise _bad_line(where, "has half of a surrogate pair in its text", "write all of it") from None


def _bad_line(where: str, rule: str, remedy: str) -> ConfigError:
    return ConfigError([Problem("data.path", where, rule, remedy)])


@contextmanager
def _reading(file: SourceFile) -> Iterator[BinaryIO]:
    """The open file. ConfigError if it cannot be read, or has changed since it was hashed."""
    try:
        with file.path.open("rb") as stream:
            yield stream
            # The hash is part of the name of the shards.
            if Stamp.of(stream) != file.stamp:
                rule, remedy = "changed while it was read", "start again when nothing writes to it"
                raise ConfigError([Problem("data.path", str(file.path), rule, remedy)])
    except OSError as error:
        unreadable(error, file.path)


def unreadable(error: OSError, path: Path | None = None) -> NoReturn:
    """Raise the ConfigError for a file or folder of the dataset that cannot be read."""
    rule, remedy = f"cannot be read ({error.strerror or error})", "change its permissions, or name another"
    # Unlike an error from open(), an error from read() does not name the file.
    raise ConfigError([Problem("data.path", str(path or error.filename), rule, remedy)])
