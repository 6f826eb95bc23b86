"""The choice of held-out text: whole documents, which are chosen by hash, and the ends of large documents."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from torchtitan_lite.data.sources import Document, character_start

# If fewer documents are expected in a split, a choice by hash often leaves the split empty or far too small.
_ENOUGH = 8
_MOST_RANKED = 100_000
# Without this salt, one huge generated file would be most of the held-out text of the standard library.
_SALT = b"held out "


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The rule for what is held out of each document. The order and place of documents do not matter."""

    fraction: float
    large: float
    """A size in bytes. The end of every larger document is held out. Smaller documents are never divided."""
    chosen: frozenset[bytes] | None
    """The hashes of the documents to hold out. None if there are many: then each hash decides by itself."""

    def divide(self, document: Document) -> Iterator[tuple[bool, bytes]]:
        """Yield (is held out, piece) for all pieces of `document`. The held-out pieces come last."""
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
        """Return the number of bytes at the end of `document` that are held out."""
        if document.size > self.large:
            return int(self.fraction * document.size)
        digest = _hash(document)
        by_itself = int.from_bytes(digest[:8]) < self.fraction * 2.0**64
        is_held = by_itself if self.chosen is None else digest in self.chosen
        return document.size if is_held else 0


def choose(documents: Iterable[Document], fraction: float, n_bytes: int) -> HeldOut:
    """Return the rule that holds out `fraction` of `documents`, which have about `n_bytes` in all.

    If there are many documents, only the first ones are read.
    """
    if fraction == 0:
        return HeldOut(fraction=0.0, large=n_bytes, chosen=frozenset())
    n_many = int(min(_ENOUGH / min(fraction, 1 - fraction), _MOST_RANKED)) + 1
    sizes = dict(sorted((_hash(document), document.size) for document in islice(documents, n_many)))
    large_share = min(2 * fraction, 0.5)
    if len(sizes) == n_many:
        return HeldOut(fraction=fraction, large=large_share * n_bytes, chosen=None)
    large = large_share * sum(sizes.values())
    small = {digest: size for digest, size in sizes.items() if size <= large}
    return HeldOut(fraction=fraction, large=large, chosen=_choose_few(small, fraction))


def _choose_few(sizes: dict[bytes, int], fraction: float) -> frozenset[bytes]:
    """Choose documents with about `fraction` of all bytes, in the order of their hashes. Return hashes."""
    total, n_held, chosen = sum(sizes.values()), 0, set()
    for digest, size in sizes.items():
        if size <= 2 * (fraction * total - n_held) and n_held + size < total:
            chosen.add(digest)
            n_held += size
    return frozenset(chosen)


def _line_start(piece: bytes, place: int, n_held: int) -> int:
    """Return the start of the line at `place`, or of the character if the line more than doubles `n_held`.

    `n_held` is the number of bytes that are held out from `place` on.
    """
    start = piece.rfind(b"\n", 0, place) + 1
    return start if start > 0 and place - start <= n_held else character_start(piece, place)


def _hash(document: Document) -> bytes:
    return hashlib.sha256(_SALT + document.identity).digest()
