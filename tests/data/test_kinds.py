"""The kind of a file follows from its bytes."""

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from collections.abc import Iterator

import pytest

from torchtitan_lite.data import kinds
from torchtitan_lite.data.kinds import HEAD_BYTES, Kind, TextCheck, is_json_line, json_kind, kind_of

TEXT = b"all work and no play makes a long line of text\n" * 200
ROWS = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(300))


def tar(content: bytes) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return whole.getvalue()


def zip_(content: bytes) -> bytes:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("a.txt", content)
    return whole.getvalue()


@pytest.mark.parametrize(
    ("content", "noun", "detail"),
    [
        (gzip.compress(TEXT), "compressed file", "(gzip)"),
        (bz2.compress(TEXT), "compressed file", "(bzip2)"),
        (bz2.compress(b""), "compressed file", "(bzip2)"),
        (lzma.compress(TEXT), "compressed file", "(xz)"),
        (bytes.fromhex("28b52ffd0458"), "compressed file", "(zstd)"),
        (bytes.fromhex("04224d186440a7"), "compressed file", "(lz4)"),
        (bytes.fromhex("377abcaf271c0004"), "compressed file", "(7z)"),
        (zip_(TEXT), "compressed file", "(zip)"),
        (tar(TEXT), "compressed file", "(tar)"),
        (b"PAR1\x15\x04\x15", "Parquet file", ""),
        (b"ARROW1\0\0\xff\xff\xff\xff", "Arrow file", ""),
        (b"\xff\xff\xff\xff\xa8\1\0\0\x10", "Arrow file", ""),
        (b"%PDF-1.7\n", "PDF file", ""),
        (TEXT.decode().encode("utf-16"), "UTF-16 file", ""),
        (b"\xfe\xff" + TEXT.decode().encode("utf-16-be"), "UTF-16 file", ""),
        (TEXT.decode().encode("utf-32"), "UTF-32 file", ""),
    ],
)
def test_a_signature_tells_the_kind(content: bytes, noun: str, detail: str) -> None:
    kind = kind_of(content[:HEAD_BYTES])
    assert kind is not None
    assert (kind.noun, kind.detail) == (noun, detail)
    assert kind.rule.startswith("is ") and kind.how


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"P",
        TEXT,
        b"PAR1S in spring",
        b"BZh9 is a word",
        b"PK",
        b"%PDF",
        b"\xef\xbb\xbftext",
        ROWS.encode(),
    ],
)
def test_texts_have_no_signature(content: bytes) -> None:
    assert kind_of(content) is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (ROWS, None),
        ("\ufeff\n\n" + ROWS, None),
        ('{"text": "a', None),  # a line that is cut short is an error of that line
        ("text", None),
        ("", None),
        ('{"text": "' + "," * HEAD_BYTES, None),  # the line goes on
        ("{\n", kinds.JSON_OBJECT),
        (' {"texts": [\n', kinds.JSON_OBJECT),
        ('{"text": "a",\r\n', kinds.JSON_OBJECT),
        ("[\n", kinds.JSON_ARRAY),
        ('\ufeff [{"text": "a"}]', kinds.JSON_ARRAY),
    ],
)
def test_a_json_document_is_told_from_json_lines(content: str, expected: Kind | None) -> None:
    assert json_kind(content.encode()[:HEAD_BYTES]) is expected


def test_json_lines_are_recognised_by_their_first_line() -> None:
    assert is_json_line(ROWS.encode())
    assert is_json_line(b'{"text": "' + b"x" * (HEAD_BYTES - 10))
    assert not any(is_json_line(text) for text in (TEXT, b"", b"[1]\n", b"{\n", b"[" * 10_000 + b"\n"))


def check(content: bytes, n_bytes: int) -> TextCheck:
    """The check of `content`, read in blocks of `n_bytes`."""
    found = TextCheck()
    for start in range(0, len(content), n_bytes):
        found.add(content[start : start + n_bytes])
    found.add(b"", final=True)
    return found


def damaged() -> Iterator[tuple[bytes, int]]:
    """Texts with a bad byte, and the place of the byte."""
    wide = "é🙂".encode() * 500
    yield TEXT[:5000] + b"\xff" + TEXT[5001:], 5000
    yield wide + b"\x80" + wide, len(wide)
    yield wide[:-1], len(wide) - 4
    yield wide + wide[:3] + wide, len(wide) + 2
    yield b"\xe9t\xe9", 0
    yield b"a\xff\xff", 1


@pytest.mark.parametrize("n_bytes", [1, 7, 1000, 1 << 20])
def test_the_first_bad_byte_is_found_at_its_place(n_bytes: int) -> None:
    for content, place in damaged():
        found = check(content, n_bytes)
        assert found.bad == (place, content[place])
        assert found.kind() is kinds.NOT_UTF_8


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (TEXT, None),
        (b"", None),
        (TEXT + b"\0" + TEXT, None),
        (TEXT.replace(b" ", b"\0"), None),
        (TEXT + bytes(len(TEXT)), kinds.BINARY),  # a disk that was full leaves such ends
        (b"\0\0\1\2", kinds.BINARY),
        (random.Random(0).randbytes(10_000), kinds.BINARY),
        (random.Random(0).randbytes(10_000).replace(b"\0", b"\1"), kinds.BINARY),
        (TEXT + random.Random(0).randbytes(10_000), kinds.NOT_UTF_8),
        ("вся работа\n".encode("koi8-r") * 500, kinds.NOT_UTF_8),
        ("travail à faire\n".encode("latin-1") * 500, kinds.NOT_UTF_8),
        (TEXT.decode().encode("utf-16-le"), kinds.UTF_16),
        ("travail à faire\n".encode("utf-16-be") * 500, kinds.UTF_16),
        ("вся работа\n".encode("utf-16-le") * 500, kinds.UTF_16),  # all bytes are ASCII, few are NUL
        (b"\1\2\3a" * 500, kinds.BINARY),
    ],
)
def test_texts_damaged_texts_and_binary_files_are_told_apart(content: bytes, expected: Kind | None) -> None:
    assert check(content, 3000).kind() is expected


def test_a_command_in_a_remedy_quotes_the_path() -> None:
    from pathlib import Path

    kind = kind_of(gzip.compress(b""))
    assert kind is not None
    assert "`gunzip -k 'a {b}.gz'`" in kind.remedy(Path("a {b}.gz"))
