"""Kinds of files that a dataset cannot read as text. The content of a file decides, not the file's name."""

import codecs
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

HEAD_BYTES = 4 << 10
"""The number of bytes at the start of a file that `kind_of` and `json_kind` need."""
_CONTROLS = bytes({*range(32), 127} - set(b"\b\t\n\v\f\r\x1b"))
"""The control characters that are rare in texts, NUL among them."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of files and folders that a dataset leaves out."""

    noun: str
    """The singular noun for a file of this kind. The plural ends with "s"."""
    detail: str = ""
    """The words after the noun."""
    rule: str = ""
    """The predicate of an error about one file of this kind."""
    how: str = ""
    """The remedy of such an error. {} stands for the path in a command."""
    is_lost_text: bool = False
    """True if the file is text, but in an encoding that is not read."""

    def remedy(self, path: Path) -> str:
        """Return what the user can do about the file at `path`."""
        return self.how.replace("{}", shlex.quote(str(path)))

    def words(self, number: int) -> str:
        """Return the number of files of this kind in words, such as "2 compressed files (gzip)"."""
        return f"{number:,} {self.noun}{'' if number == 1 else 's'}{self.detail and ' '}{self.detail}"


def _packed(program: str, command: str) -> Kind:
    how = f"unpack it with `{command} {{}}`, and name what that makes"
    return Kind(noun="compressed file", detail=f"({program})", rule=f"is compressed ({program})", how=how)


def _encoded(name: str) -> Kind:
    how = f"convert it with `iconv -f {name} -t UTF-8 {{}} > NEW`"
    return Kind(noun=f"{name} file", rule=f"is {name} text, not UTF-8", how=how, is_lost_text=True)


def _table(name: str) -> Kind:
    how = 'write the texts as JSON lines, each an object such as {"text": "..."}'
    return Kind(noun=f"{name} file", rule=f"is a {name} file, not text", how=how)


_ANOTHER = "name a file that holds text"
BINARY = Kind(noun="binary file", rule="is binary, not text", how=_ANOTHER)
EMPTY = Kind(noun="empty file", rule="is empty", how=_ANOTHER)
NOT_UTF_8 = Kind(
    noun="non-UTF-8 file",
    rule="is not UTF-8 text",
    how="convert it to UTF-8, or drop such bytes with `iconv -c -f UTF-8 -t UTF-8 {} > NEW`",
    is_lost_text=True,
)
UTF_16 = _encoded("UTF-16")
JSON_ARRAY = Kind(
    noun="JSON array",
    rule="is one JSON array, not one object on each line",
    how="convert it with `jq -c '.[]' {} > NEW.jsonl`",
)
JSON_OBJECT = Kind(
    noun="JSON object",
    detail="on several lines",
    rule="is a JSON object on several lines, not one object on each line",
    how="convert it with `jq -c . {} > NEW.jsonl`",
)
HIDDEN_FILE, HIDDEN_FOLDER = Kind(noun="hidden file"), Kind(noun="hidden folder")
FOLDER_LINK = Kind(noun="link", detail="to a folder")
BROKEN_LINK = Kind(noun="broken link")
SPECIAL = Kind(noun="special file")
CACHE = Kind(noun="token cache")
RUN = Kind(noun="run folder")

# Documents of office programs and arrays of numpy are zip files too. A text may start with BZh or PAR1, so
# the patterns for bzip2 and Parquet include the bytes that follow.
_SIGNATURES = (
    (rb"\x1f\x8b", _packed("gzip", "gunzip -k")),
    (rb"\x28\xb5\x2f\xfd", _packed("zstd", "unzstd")),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", _packed("bzip2", "bunzip2 -k")),
    (rb"\xfd7zXZ\0", _packed("xz", "unxz -k")),
    (rb"\x04\x22\x4d\x18", _packed("lz4", "lz4 -d")),
    (rb"PK(\x03\x04|\x05\x06)", _packed("zip", "unzip")),
    (rb"7z\xbc\xaf\x27\x1c", _packed("7z", "7z x")),
    (rb".{257}ustar[\0 ]", _packed("tar", "tar -xf")),
    (rb"PAR1[\0-\x1f]", _table("Parquet")),
    (rb"ARROW1\0\0|\xff{4}..\0\0", _table("Arrow")),
    (rb"%PDF-\d", Kind(noun="PDF file", rule="is a PDF file, not text", how=_ANOTHER)),
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", _encoded("UTF-32")),
    (rb"\xff\xfe|\xfe\xff", UTF_16),
)


# One pattern for all, because most files are texts and a folder may have a million of them.
_ANY_SIGNATURE = re.compile(b"|".join(b"(?:%s)" % pattern for pattern, _ in _SIGNATURES), re.DOTALL)


def kind_of(head: bytes) -> Kind | None:
    """Return the kind of a file that starts with `head`, or None if no signature is there."""
    if not _ANY_SIGNATURE.match(head):
        return None
    return next(kind for pattern, kind in _SIGNATURES if re.match(pattern, head, re.DOTALL))


def json_kind(head: bytes) -> Kind | None:
    """Return the kind of a file that starts with `head`, if that is JSON but not one object on each line."""
    line, is_whole = _first_line(head)
    if line.startswith(b"["):
        return JSON_ARRAY
    # An object that is whole ends with a brace. One that is cut short by mistake may end with anything.
    opens_object = line.startswith(b"{") and line.rstrip()[-1:] in b"{[,"
    return JSON_OBJECT if is_whole and opens_object else None


def is_json_line(head: bytes) -> bool:
    """Return True if the first line of `head` is a JSON object, so that the file is probably JSON lines."""
    line, is_whole = _first_line(head)
    if not is_whole:
        return line.startswith(b'{"')
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _first_line(head: bytes) -> tuple[bytes, bool]:
    """Return the first line that is not blank, and False if the line may go on after `head`."""
    line, end, _ = head.removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")
    return line, bool(end) or len(head) < HEAD_BYTES


class TextCheck:
    """A check of the bytes of a file, which are added block by block: are they UTF-8 text?"""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._n_bytes = self._n_nul = 0
        self._head = b""
        self.bad: tuple[int, int] | None = None
        """The offset in bytes and the value of the first byte that is not UTF-8."""

    def add(self, block: bytes, *, final: bool = False) -> None:
        """Check the next bytes of the file. `final`: the file ends here."""
        if self.bad is not None:
            return
        self._head = self._head or block[:HEAD_BYTES]
        waiting, _ = self._decoder.getstate()
        try:
            self._decoder.decode(block, final)
        except UnicodeDecodeError as error:
            self.bad = self._n_bytes - len(waiting) + error.start, error.object[error.start]
        self._n_bytes += len(block)
        if b"\0" in block:  # much faster than counting
            self._n_nul += block.count(0)

    def kind(self) -> Kind | None:
        """Return None if all bytes together are text, else the kind of file. A text may hold some NULs."""
        n_controls = _n_controls(self._head)
        if self.bad is None:
            is_binary = self._n_nul * 3 > self._n_bytes or n_controls * 3 > len(self._head)
        else:
            # A text has next to no control characters. A tenth of random bytes are control characters. If a
            # file starts as a text does, what comes later is damage.
            is_binary = n_controls * 50 > len(self._head)
        if is_binary:
            return UTF_16 if _alternates(self._head) else BINARY
        return None if self.bad is None else NOT_UTF_8


def _n_controls(data: bytes) -> int:
    return len(data) - len(data.translate(None, _CONTROLS))


def _alternates(head: bytes) -> bool:
    """Return True if nearly every other byte is a control character: UTF-16 without a byte order mark.

    The first bytes of the characters of Latin, Greek, Cyrillic, Hebrew and Arabic are 0 to 6.
    """
    fewer, more = sorted((_n_controls(head[0::2]), _n_controls(head[1::2])))
    return more * 3 > len(head) and fewer * 20 < more
