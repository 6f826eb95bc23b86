"""Which text is held out of training: documents by hash, and the end of each that is too large for that."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from torchtitan_lite.data.documents import Document, character_start

# With fewer expected in either split, the chance that hashes leave it empty, or far too small, is not slight.
_ENOUGH = 8
_MOST_RANKED = 100_000
# Without it the standard library's one huge file, generated prose, would be most of what is held out there.
_SALT = b"held out "


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A decision for every document, which depends on nothing but what the documents are."""

    fraction: float
    large: float
    """Bytes; of a larger document the end is held out, of any other all or nothing."""
    chosen: frozenset[bytes] | None
    """Hashes of the documents to hold out; None where they are so many that each one's hash decides alone."""

    def divide(self, document: Document) -> Iterator[tuple[bool, bytes]]:
        """The pieces of `document`, each with whether it is held out; what is held out comes last."""
        n_held = self.n_held(document)
        if n_held in (0, document.size):
            yield from ((n_held > 0, piece) for piece in document.pieces)
            return
        n_left = document.size - n_held
        for piece in document.pieces:
            if 0 < n_left < len(piece):
                cut = _line_start(piece, n_left, n_held)
                parts = (False, piece[:cut]), (True, piece[cut:])
                yield from (part for part in parts if part[1])
            else:
                yield n_left <= 0, piece
            n_left -= len(piece)

    def n_held(self, document: Document) -> int:
        """How many bytes at the end of `document` are held out."""
        if document.size > self.large:
            return int(self.fraction * document.size)
        digest = _hash(document)
        by_itself = int.from_bytes(digest[:8]) < self.fraction * 2.0**64
        is_held = by_itself if self.chosen is None else digest in self.chosen
        return document.size if is_held else 0


def plan(documents: Iterable[Document], fraction: float, n_bytes: int) -> HeldOut:
    """What to hold out of `documents`, about `n_bytes` in all; reads no more of them than it needs to."""
    if fraction == 0:
        return HeldOut(fraction=0.0, large=n_bytes, chosen=frozenset())
    n_many = int(min(_ENOUGH / min(fraction, 1 - fraction), _MOST_RANKED)) + 1
    sizes = dict(sorted((_hash(document), document.size) for document in islice(documents, n_many)))
    large_share = min(2 * fraction, 0.5)
    if len(sizes) == n_many:
        return HeldOut(fraction=fraction, large=large_share * n_bytes, chosen=None)
    large = large_share * sum(sizes.values())
    small = {digest: size for digest, size in sizes.items() if size <= large}
    return HeldOut(fraction=fraction, large=large, chosen=_choose(small, fraction))


def _choose(sizes: dict[bytes, int], fraction: float) -> frozenset[bytes]:
    """Of a few documents, in the order of their hashes, those that come to about the fraction of all."""
    total, n_held, chosen = sum(sizes.values()), 0, set()
    for digest, size in sizes.items():
        if size <= 2 * (fraction * total - n_held) and n_held + size < total:
            chosen.add(digest)
            n_held += size
    return frozenset(chosen)


def _line_start(piece: bytes, place: int, n_held: int) -> int:
    """Where the line around `place` begins, unless that would more than double the `n_held` bytes after."""
    start = piece.rfind(b"\n", 0, place) + 1
    return start if start > 0 and place - start <= n_held else character_start(piece, place)


def _hash(document: Document) -> bytes:
    return hashlib.sha256(_SALT + document.identity).digest()
