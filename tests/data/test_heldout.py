"""The text that is held out of training."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchtitan_lite.data import Jsonl, PythonStdlib, Text, heldout, sources
from torchtitan_lite.data.datasets import open_source
from torchtitan_lite.data.sources import Document


def of(texts: dict[str, bytes], n_pieces: int = 1) -> Iterator[Document]:
    """Documents with names, each in some pieces."""
    for name, text in texts.items():
        step = max(1, -(-len(text) // n_pieces))
        pieces = iter([text[i : i + step] for i in range(0, len(text), step)])
        yield Document(identity=name.encode(), size=len(text), pieces=pieces)


def split(texts: dict[str, bytes], fraction: float, n_pieces: int = 1) -> tuple[dict[str, bytes], ...]:
    """The training text and the held-out text of each document."""
    decided = heldout.choose(of(texts, n_pieces), fraction, sum(map(len, texts.values())))
    train, held = {}, {}
    for document in of(texts, n_pieces):
        parts = list(decided.divide(document))
        assert all(part for _, part in parts)
        assert [is_held for is_held, _ in parts] == sorted(is_held for is_held, _ in parts)
        for place, wanted in ((train, False), (held, True)):
            if text := b"".join(part for is_held, part in parts if is_held == wanted):
                place[document.identity.decode()] = text
    return train, held


LINES = b"".join(b"line %d of a text\n" % i for i in range(2000))


@pytest.mark.parametrize("n_pieces", [1, 2, 19, 20, 21, 500])
def test_of_one_file_the_end_is_held_out_from_a_line_start(n_pieces: int):
    train, held = split({"a.txt": LINES}, 0.05, n_pieces)
    assert train["a.txt"] + held["a.txt"] == LINES
    assert len(held["a.txt"]) == pytest.approx(0.05 * len(LINES), abs=40)
    assert train["a.txt"].endswith(b"\n") or n_pieces == 500  # of 500, the line begins in an earlier piece


def test_of_one_line_without_a_break_the_end_is_held_out_between_characters():
    text = ("é" * 1000).encode()
    train, held = split({"a": text}, 0.05)
    assert train["a"].decode() + held["a"].decode() == "é" * 1000
    assert len(held["a"].decode()) == 50


def test_a_long_last_line_is_not_held_out_whole():
    text = b"short\n" + b"x" * 10_000
    assert len(split({"a": text}, 0.05)[1]["a"]) == pytest.approx(500, abs=1)


@pytest.mark.parametrize("n_documents", [2, 3, 5, 10, 20, 21, 40, 100, 159])
@pytest.mark.parametrize("sizes", ["equal", "mixed", "one huge", "tiny"])
def test_of_few_documents_about_the_fraction_is_held_out(n_documents: int, sizes: str):
    chance = random.Random(n_documents)
    size = {
        "equal": lambda i: 1000,
        "mixed": lambda i: chance.randrange(10, 5000),
        "one huge": lambda i: 500_000 if i == 1 else 300,
        "tiny": lambda i: 40,
    }[sizes]
    texts = {f"{i}.txt": (b"%04d\n" % i) * (size(i) // 5) for i in range(n_documents)}
    total = sum(map(len, texts.values()))
    train, held = split(texts, 0.05)
    n_held = sum(map(len, held.values()))
    assert n_held + sum(map(len, train.values())) == total
    assert 0.02 * total <= n_held <= 0.1 * total
    for name, text in texts.items():
        is_large = len(text) > 0.1 * total
        assert (name in train and name in held) == is_large
        if is_large:
            assert len(held[name]) == pytest.approx(0.05 * len(text), abs=5)


def test_of_many_documents_too_a_large_one_gives_its_end_only():
    texts = {f"{i}.txt": b"small\n" * 10 for i in range(400)}
    for huge in ("a", "b", "c", "d"):
        train, held = split({**texts, huge: LINES}, 0.05)
        assert len(held[huge]) == pytest.approx(0.05 * len(LINES), abs=25)
        assert train[huge] + held[huge] == LINES
        assert 5 <= len(held) - 1 <= 45


def test_two_lines_are_enough_for_both_splits():
    train, held = split({"a": b"hello there\n", "b": b"good morning\n"}, 0.2)
    assert train and held


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("n_documents", [1, 2, 3, 7])
def test_some_text_is_always_left_to_train_on(fraction: float, n_documents: int):
    train, held = split({f"{i}": b"line\n" * 400 for i in range(n_documents)}, fraction)
    assert train and held
    assert sum(map(len, held.values())) / (2000 * n_documents) == pytest.approx(fraction, rel=0.7)


def test_empty_documents_do_not_count_as_text():
    train, held = split({**{f"e{i}": b"" for i in range(9)}, "b": b"line\n" * 100}, 0.2)
    assert train.keys() == held.keys() == {"b"}


def test_of_many_documents_the_hash_decides_for_each_by_itself():
    texts = {f"{i}.txt": b"text %d\n" % i * 9 for i in range(3000)}
    train, held = split(texts, 0.05)
    assert not train.keys() & held.keys()
    assert {**train, **held} == texts
    assert 90 <= len(held) <= 210
    more = {**texts, **{f"new {i}": b"new" for i in range(500)}}
    assert {name for name in split(more, 0.05)[1] if name in texts} == held.keys()
    assert held.keys() <= split(texts, 0.1)[1].keys()


def test_documents_with_one_identity_stay_together():
    decided = heldout.choose(of({f"{i}": b"x" for i in range(500)}), 0.5, 500)
    for name in ("7", "8", "9", "10"):
        twice = [list(decided.divide(document)) for _ in range(2) for document in of({name: b"x"})]
        assert twice[0] == twice[1]


@pytest.mark.parametrize("n_documents", [1, 500])
def test_a_fraction_of_zero_holds_nothing_out(n_documents: int):
    assert not split({f"{i}": b"text\n" * 50 for i in range(n_documents)}, 0.0)[1]


def test_the_standard_library_is_split_by_whole_files_in_about_the_fraction():
    source = open_source(PythonStdlib())
    decided = heldout.choose(source.documents(), 0.05, source.n_bytes)
    shares = [decided.n_held(document) for document in source.documents()]
    sizes = [document.size for document in source.documents()]
    assert all(share in (0, size) for share, size in zip(shares, sizes, strict=True))
    assert 0.03 < sum(shares) / sum(sizes) < 0.09
    assert max(shares) < 0.3 * sum(shares)


def test_identical_json_lines_are_in_the_same_split(write_jsonl):
    file = write_jsonl([f"text {i % 50} " * 5 for i in range(1000)])
    source = open_source(Jsonl(path=str(file)))
    decided = heldout.choose(source.documents(), 0.2, source.n_bytes)
    found: dict[bytes, set[bool]] = {}
    for document in source.documents():
        for is_held, piece in decided.divide(document):
            found.setdefault(piece, set()).add(is_held)
    assert all(len(splits) == 1 for splits in found.values())
    assert len(set.union(*found.values())) == 2


def test_a_file_of_many_pieces_is_cut_once(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 1000)
    (tmp_path / "a.txt").write_bytes(LINES)
    source = open_source(Text(path=str(tmp_path)))
    decided = heldout.choose(source.documents(), 0.1, source.n_bytes)
    (document,) = source.documents()
    parts = list(decided.divide(document))
    held = b"".join(part for is_held, part in parts if is_held)
    assert len(parts) > 20
    assert b"".join(part for _, part in parts) == LINES
    assert LINES.endswith(held)
    assert len(held) == pytest.approx(0.1 * len(LINES), abs=30)
