"""The files and folders that a dataset leaves out: the number of each kind, their bytes, and a few names."""

from bisect import insort
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from torchtitan_lite.config.problem import printable
from torchtitan_lite.data.kinds import Kind

_MOST_NAMES = 3


@dataclass(frozen=True, kw_only=True)
class BadByte:
    """The first byte of a file that is not UTF-8."""

    path: Path
    offset: int
    value: int

    def where(self) -> str:
        """Return the value, offset and line in words. The file is read up to the byte to count its lines."""
        words, n_lines, n_left = f"byte 0x{self.value:02x} at offset {self.offset:,}", 1, self.offset
        with suppress(OSError), self.path.open("rb") as stream:
            while n_left > 0 and (block := stream.read(min(n_left, 1 << 20))):
                n_lines += block.count(b"\n")
                n_left -= len(block)
            words += f", line {n_lines:,}"
        return words


@dataclass(kw_only=True)
class _Group:
    """The files of one kind."""

    number: int = 0
    n_bytes: int = 0
    named: list[tuple[int, str, BadByte | None]] = field(default_factory=list)
    """The largest few files: minus the size, the name, and the byte that is wrong."""


class LeftOut:
    """A tally of what a dataset leaves out. The memory does not grow with the number of files."""

    def __init__(self) -> None:
        self._groups: dict[Kind, _Group] = {}

    def add(self, kind: Kind, name: str, n_bytes: int = 0, bad: BadByte | None = None) -> None:
        """Add a file or folder with its path below the dataset's folder."""
        group = self._groups.setdefault(kind, _Group())
        group.number += 1
        group.n_bytes += n_bytes
        if len(group.named) < _MOST_NAMES or (-n_bytes, name) < group.named[-1][:2]:
            insort(group.named, (-n_bytes, name, bad), key=lambda item: item[:2])
            del group.named[_MOST_NAMES:]

    @property
    def n_lost(self) -> int:
        """The bytes of the files that are text, but not UTF-8."""
        return sum(group.n_bytes for kind, group in self._groups.items() if kind.is_lost_text)

    def lines(self, n_kept: int = 0, *, only_lost: bool = False) -> list[str]:
        """Return a line for each kind, or with `only_lost` for each kind that is text, but not UTF-8.

        If `n_kept` is given, the bytes of text that are not left out, these lines have the share of the text.
        """
        found = sorted(self._groups.items(), key=lambda item: item[0].words(1))
        n_text = n_kept and n_kept + self.n_lost
        return [_line(kind, group, n_text) for kind, group in found if kind.is_lost_text or not only_lost]


def _line(kind: Kind, group: _Group, n_text: int) -> str:
    size = f", {group.n_bytes:,} byte{'' if group.n_bytes == 1 else 's'}" if group.n_bytes else ""
    if kind.is_lost_text and n_text:
        size += f", {percent(group.n_bytes / n_text)} of the text"
    names = [f"{name} ({bad.where()})" if bad else name for _, name, bad in group.named]
    more = f" and {group.number - len(names):,} more" if group.number > len(names) else ""
    return printable(f"{kind.words(group.number)}{size}: {', '.join(names)}{more}")


def percent(share: float) -> str:
    """Return a share as a percentage with three digits."""
    return f"{100 * share:.3g} %"
