"""Token shards: their content, and that unfinished or damaged shards are never used."""

import logging
import math
import os
import shutil
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from programs import PIPE, Program

from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.data import PythonStdlib, Samples, Shards, Split, load_tokenizer, prepare, shards

FILES = ["metadata.json", "train.offsets", "train.tokens", "validation.offsets", "validation.tokens"]


def documents_of(split: Split) -> list[list[int]]:
    bounds = zip(split.offsets[:-1], split.offsets[1:], strict=True)
    return [split.tokens_T[start:stop].tolist() for start, stop in bounds]


def same(one: Shards, other: Shards) -> bool:
    return all(
        np.array_equal(a.tokens_T, b.tokens_T) and np.array_equal(a.offsets, b.offsets)
        for a, b in ((one.train, other.train), (one.validation, other.validation))
    )


def save_words(folder: Path, vocabulary: dict[str, int], **options: str) -> None:
    """Puts a tokenizer whose tokens are words into a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    encoder = Tokenizer(models.WordLevel(vocabulary, **options))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.save(str(folder / "tokenizer.json"))


def left_in(cache_dir: Path) -> list[str]:
    """The names in a cache, without the locks."""
    return [name for name in os.listdir(cache_dir) if not name.endswith(".lock")]


def forbid_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(shards, "_build", build)


def test_shards_hold_every_document_once_each_with_its_end(tokenized, text_folder: Path):
    built = tokenized(text_folder, validation_fraction=0.2)
    found = [*documents_of(built.train), *documents_of(built.validation)]
    expected = [[*path.read_bytes(), 256] for path in text_folder.rglob("*.txt")]
    assert sorted(found) == sorted(expected)
    assert built.validation.n_documents > 20
    for split in (built.train, built.validation):
        assert split.n_documents == len(documents_of(split))
        assert split.n_tokens == len(split.tokens_T) == split.n_bytes + split.n_documents
        assert split.tokens_T.dtype == np.uint16


def test_documents_are_in_the_order_of_their_names(tokenized, text_folder: Path):
    built = tokenized(text_folder, validation_fraction=0.0)
    paths = sorted(text_folder.rglob("*.txt"), key=lambda path: path.relative_to(text_folder).as_posix())
    assert documents_of(built.train) == [[*path.read_bytes(), 256] for path in paths]
    assert built.validation.n_documents == built.validation.n_tokens == 0
    assert built.validation.unigram_entropy == 0


def test_a_tokenizer_file_makes_the_ids_that_it_makes_of_each_text(
    tokenized, write_jsonl, tokenizer_folder: Path
):
    texts = [f"print('héllo {i}')<|endoftext|>" for i in range(50)]
    built = tokenized(write_jsonl(texts), "jsonl", tokenizer=str(tokenizer_folder), validation_fraction=0.0)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    assert documents_of(built.train) == [[*tokenizer.encode(text).tolist(), 0] for text in texts]
    assert built.train.n_bytes == sum(len(text.encode()) for text in texts)


def test_a_vocabulary_beyond_two_bytes_gets_four(tokenized, write_jsonl, tmp_path: Path):
    from tokenizers import Tokenizer, models

    vocabulary = {"a": 70_000, "</s>": 65_536, "[UNK]": 1}
    Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    built = tokenized(write_jsonl(["a", "b"]), "jsonl", tokenizer=str(tmp_path), validation_fraction=0.0)
    assert built.train.tokens_T.dtype == np.uint32
    assert documents_of(built.train) == [[70_000, 65_536], [1, 65_536]]


def test_documents_without_a_token_are_left_out(tokenized, write_jsonl):
    built = tokenized(write_jsonl(["", "a", "", "b", ""]), "jsonl", validation_fraction=0.0)
    assert documents_of(built.train) == [[97, 256], [98, 256]]
    assert built.train.n_documents == 2


def test_a_tokenizer_that_makes_nothing_of_a_text_leaves_no_document(tokenized, write_jsonl, tmp_path: Path):
    save_words(tmp_path, {"a": 0, "</s>": 1, "[UNK]": 2}, unk_token="[UNK]")
    file = write_jsonl(["  ", "a a", "\n", "b"])
    built = tokenized(file, "jsonl", tokenizer=str(tmp_path), validation_fraction=0.0)
    assert documents_of(built.train) == [[0, 0, 1], [2, 1]]


@pytest.mark.parametrize("fraction", [0.0, 0.05])
@pytest.mark.parametrize(
    ("lines", "vocabulary", "message"),
    [
        ("\n  \n", None, r"data\.path = .* has no line with text"),
        ('{"text": ""}\n' * 200, None, r"data\.path = .* has no line with text"),
        ('{"text": "fine"}\n' * 5000 + "{\n", None, "line 5001"),
        (
            '{"text": "  "}\n{"text": "\\n"}',
            {"</s>": 0, "[UNK]": 1},
            r"data\.tokenizer = .* makes no token of the 3 bytes of text",
        ),
        (
            '{"text": "a"}\n{"text": "b"}',
            {"a": 1, "</s>": 2},
            r"data\.tokenizer = .* cannot encode the text \(",
        ),
    ],
)
def test_a_text_that_cannot_be_tokenized_is_an_error_and_leaves_nothing(
    tokenized, tmp_path: Path, lines: str, vocabulary: dict[str, int] | None, message: str, fraction: float
):
    (tmp_path / "x.jsonl").write_text(lines)
    if vocabulary:
        save_words(tmp_path, vocabulary, **({"unk_token": "[UNK]"} if "[UNK]" in vocabulary else {}))
    tokenizer = str(tmp_path) if vocabulary else "bytes"
    with pytest.raises(ConfigError, match=message):
        tokenized(tmp_path / "x.jsonl", "jsonl", validation_fraction=fraction, tokenizer=tokenizer)
    assert left_in(tmp_path / "cache") == []


def test_unigram_entropy_is_that_of_the_splits_bytes(tokenized, text_folder: Path):
    built = tokenized(text_folder)
    for split in (built.train, built.validation):
        counts = Counter(token for token in split.tokens_T.tolist() if token < 256)
        total = sum(counts.values())
        expected = -sum(count / total * math.log(count / total) for count in counts.values())
        assert split.unigram_entropy == pytest.approx(expected)
        assert split.n_bytes == total


def test_large_documents_are_the_same_in_however_many_pieces(tokenized, tmp_path: Path, monkeypatch):
    text = "".join(f"line {i} héllo wörld\n" for i in range(4000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    whole = tokenized(tmp_path / "a.txt")
    monkeypatch.setattr("torchtitan_lite.data.sources.PIECE_BYTES", 5000)
    monkeypatch.setattr(shards, "_BATCH_BYTES", 12_000)
    parts = tokenized(tmp_path / "a.txt", cache_dir=str(tmp_path / "other"))
    assert parts.train.n_documents == parts.validation.n_documents == 1
    for built in (whole, parts):
        found = bytes(documents_of(built.train)[0][:-1] + documents_of(built.validation)[0][:-1])
        assert found == text.encode()
        assert built.validation.n_bytes == pytest.approx(0.05 * len(text.encode()), abs=50)


def test_the_corpus_is_never_in_memory_as_a_whole(tokenized, tmp_path: Path):
    line = b"all work and no play makes a long line of text\n"
    (tmp_path / "a.txt").write_bytes(line * ((96 << 20) // len(line)))
    tracemalloc.start()
    try:
        built = tokenized(tmp_path / "a.txt")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert built.train.n_tokens > 90 << 20
    assert peak < 40 << 20


def test_the_standard_library_is_prepared_once(tmp_path: Path, monkeypatch):
    config, tokenizer = PythonStdlib(cache_dir=str(tmp_path)), load_tokenizer("bytes")
    built = prepare(config, tokenizer)
    assert built.train.n_tokens > 5_000_000
    assert 0.03 < built.validation.n_bytes / built.train.n_bytes < 0.1
    assert 3 < built.validation.unigram_entropy < 3.6
    Samples(built.validation, 512)
    forbid_builds(monkeypatch)
    assert same(built, prepare(config, tokenizer))


def test_what_is_cached_is_not_built_again_by_any_name_of_the_place(
    tokenized, text_folder: Path, monkeypatch
):
    built = tokenized(text_folder)
    forbid_builds(monkeypatch)
    assert same(built, tokenized(text_folder))
    assert same(built, tokenized(text_folder.rename(text_folder.with_name("moved"))))
    monkeypatch.chdir(text_folder.parent)
    assert same(built, tokenized("moved", cache_dir="cache"))


def test_content_tokenizer_field_and_fraction_each_have_their_own_shards(
    tmp_path: Path, tokenized, tokenizer_folder
):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "aaaa", "body": "bbbb"}\n' * 30)
    built = [
        tokenized(file, "jsonl"),
        tokenized(file, "jsonl", field="body"),
        tokenized(file, "jsonl", tokenizer=str(tokenizer_folder)),
        tokenized(file, "jsonl", validation_fraction=0.5),
        tokenized(file, "text"),
    ]
    status = file.stat()
    file.write_text('{"text": "aaba", "body": "bbbb"}\n' * 30)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    built.append(tokenized(file, "jsonl"))
    assert len({one.folder for one in built}) == 6
    assert 98 in built[-1].train.tokens_T


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut short", "emptied", "one bit", "longer", "removed", "a folder"])
def test_damaged_shards_are_noticed_and_built_again(
    tokenized, text_folder: Path, name: str, damage: str, caplog, monkeypatch
):
    built = tokenized(text_folder)
    expected = {file: (built.folder / file).read_bytes() for file in FILES}
    file = built.folder / name
    content = expected[name]
    file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage != "removed":
        half = len(content) // 2
        bit = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        file.write_bytes(
            {"cut short": content[:-2], "emptied": b"", "one bit": bit, "longer": content + b"\0\0"}[damage]
        )
    assert same(built, tokenized(text_folder)) or damage == "one bit"
    assert {file: (built.folder / file).read_bytes() for file in FILES} == expected
    assert "is damaged and will be built again" in caplog.text
    assert sorted(os.listdir(built.folder.parent)) == [built.folder.name, f"{built.folder.name}.lock"]
    forbid_builds(monkeypatch)
    tokenized(text_folder)


@pytest.mark.parametrize("metadata", ["null", "[]", "{}", '{"content": {}, "sha256": ""}', "\udcff"])
def test_metadata_of_another_make_is_not_believed(tokenized, text_folder: Path, metadata: str):
    built = tokenized(text_folder)
    (built.folder / "metadata.json").write_bytes(metadata.encode(errors="surrogateescape"))
    assert same(built, tokenized(text_folder))


def test_shards_of_another_dataset_in_the_same_place_are_not_believed(
    tokenized, text_folder: Path, tmp_path: Path
):
    built = tokenized(text_folder)
    other = tokenized(text_folder, validation_fraction=0.5)
    shutil.rmtree(built.folder)
    shutil.copytree(other.folder, built.folder)
    assert same(built, tokenized(text_folder))


def test_a_cache_folder_that_cannot_be_written_to_is_an_error_with_a_remedy(
    tokenized, text_folder: Path, tmp_path
):
    (tmp_path / "file").write_text("not a folder")
    for cache_dir, reason in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "x", "Not a directory"),
        (tmp_path / ("x" * 5000), "File name too long"),
    ):
        with pytest.raises(ConfigError) as caught:
            tokenized(text_folder, cache_dir=str(cache_dir))
        rule = f"cannot be written to ({reason})"
        remedy = "name a folder that you can write to, on a disk with room"
        assert caught.value.problems == (Problem("data.cache_dir", str(cache_dir), rule, remedy),)


def test_a_full_disk_is_an_error_and_leaves_nothing(
    tokenized, text_folder: Path, tmp_path: Path, monkeypatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards._Writer, "_write", full)
    with pytest.raises(
        ConfigError, match=r"data\.cache_dir = .* cannot be written to \(No space left on device\)"
    ):
        tokenized(text_folder)
    assert left_in(tmp_path / "cache") == []


def test_a_complete_cache_that_cannot_be_written_to_is_enough(tokenized, text_folder: Path, monkeypatch):
    built = tokenized(text_folder)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shards, "_exclusive", refuse)
    assert same(built, tokenized(text_folder))


# Runs in a process of its own: builds shards, and dies by SIGKILL at the n-th call of a function.
BUILDER = """
import logging, os, pathlib, signal, sys
from torchtitan_lite import durable
from torchtitan_lite.data import Text, load_tokenizer, prepare, shards

path, cache_dir, point, when, n = sys.argv[1:]
owners = {"_write": shards._Writer, "_write_metadata": shards, "sync": durable, "rename": pathlib.Path}
n_calls = 0

def mortal(real):
    def call(*args, **options):
        global n_calls
        n_calls += 1
        if n_calls == int(n) and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **options)
        if n_calls == int(n):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

if point in owners:
    setattr(owners[point], point, mortal(getattr(owners[point], point)))
else:
    print("ready", flush=True)
    sys.stdin.readline()
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
built = prepare(Text(path=path, cache_dir=cache_dir), load_tokenizer("bytes"))
print("sum of tokens:", built.train.n_tokens, int(built.train.tokens_T.sum()))
"""


def start_builder(*arguments: object) -> Program:
    return Program(["-c", BUILDER, *arguments], stdin=PIPE)


@pytest.mark.parametrize(
    ("damaged", "point", "when", "n"),
    [
        (False, "_write", "before", 1),
        (False, "_write", "after", 200),
        (False, "_write_metadata", "after", 1),
        (False, "sync", "after", 3),
        (False, "rename", "before", 1),
        (False, "rename", "after", 1),
        (True, "_write_metadata", "before", 1),
        (True, "rename", "before", 1),
        (True, "rename", "after", 1),
    ],
)
def test_a_builder_killed_at_any_point_leaves_nothing_that_is_taken_for_good(
    tokenized: Callable, text_folder: Path, tmp_path: Path, damaged: bool, point: str, when: str, n: int
):
    """`damaged`: damaged shards are in place, and must be replaced."""
    expected = tokenized(text_folder, cache_dir=str(tmp_path / "expected"))
    cache_dir = tmp_path / "cache"
    if damaged:
        folder = tokenized(text_folder).folder
        with (folder / "train.tokens").open("r+b") as stream:
            stream.truncate(1000)
    with start_builder(text_folder, cache_dir, point, when, n) as builder:
        output, errors = builder.communicate(timeout=120)
    assert builder.returncode == -9, errors
    assert "sum of tokens" not in output
    assert same(expected, tokenized(text_folder))
    assert sorted(os.listdir(cache_dir)) == [expected.folder.name, f"{expected.folder.name}.lock"]


def test_processes_that_start_together_build_once_and_agree(
    tokenized: Callable, text_folder: Path, tmp_path: Path
):
    builders = [start_builder(text_folder, tmp_path / "cache", "none", "", 0) for _ in range(3)]
    for builder in builders:
        assert builder.stdout and builder.stdout.readline() == "ready\n"
    for builder in builders:
        assert builder.stdin
        builder.stdin.write("go\n")
        builder.stdin.flush()
    outputs = [builder.communicate(timeout=120) for builder in builders]
    assert [builder.returncode for builder in builders] == [0] * 3, outputs
    assert sum("tokenized 300 documents" in output for output, _ in outputs) == 1
    expected = tokenized(text_folder, cache_dir=str(tmp_path / "expected")).train
    line = f"sum of tokens: {expected.n_tokens} {int(expected.tokens_T.sum())}"
    assert [output.splitlines()[-1] for output, _ in outputs] == [line] * 3


def test_leftovers_of_dead_builders_go_and_the_work_of_living_ones_stays(
    tokenized, text_folder: Path, tmp_path: Path
):
    tokenized(text_folder)
    dead, alive, others = f"text-{'d' * 24}", f"jsonl-{'a' * 24}", "somebody else's"
    places = [tmp_path / "cache" / f"{name}.tmp-0123abcd" for name in (dead, alive, others)]
    for place in places:
        place.mkdir()
        (place / "train.tokens").write_bytes(b"half")
    with shards._exclusive(tmp_path / "cache" / alive):
        tokenized(text_folder)  # even if nothing is built
    assert [place.exists() for place in places] == [False, True, True]
    tokenized(text_folder)
    assert [place.exists() for place in places] == [False, False, True]


def test_the_cache_may_be_within_the_folder_of_texts(tokenized, text_folder: Path, monkeypatch):
    built = [tokenized(text_folder, cache_dir=str(place)) for place in (text_folder, text_folder / "sub")]
    forbid_builds(monkeypatch)
    again = [tokenized(text_folder, cache_dir=str(place)) for place in (text_folder, text_folder / "sub")]
    assert all(same(built[0], other) for other in (*built[1:], *again))


def test_a_second_builder_waits_for_the_first_and_says_so(tmp_path: Path, caplog):
    caplog.set_level(logging.INFO)
    first = shards._exclusive(tmp_path / "x")
    threading.Timer(0.2, first.close).start()
    shards._exclusive(tmp_path / "x").close()
    assert caplog.messages == [f"waiting for another process that has locked {tmp_path}/x.lock"]
