"""The files and documents of a dataset."""

import gzip
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.data import Jsonl, PythonStdlib, Text, Texts, files, sources
from torchtitan_lite.data.datasets import DataConfig, open_source
from torchtitan_lite.data.sources import FileSource

DATASETS = {"python_stdlib": PythonStdlib, "text": Text, "jsonl": Jsonl}


def source(path: Path | str = "", dataset: str = "text", **options: Any) -> FileSource:
    options |= {"path": str(path)} if path else {}
    opened = open_source(DATASETS[dataset](**options))
    assert isinstance(opened, FileSource)
    return opened


def texts(opened: FileSource) -> list[str]:
    return [b"".join(document.pieces).decode() for document in opened.documents()]


def pieces_of(file: Path | str) -> list[bytes]:
    (document,) = source(file).documents()
    return list(document.pieces)


def error(call: Callable, *args: object) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_standard_library_is_the_running_pythons_own():
    files = source(dataset="python_stdlib").files
    names = [file.name for file in files]
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert dict(zip(names, files, strict=True))["os.py"].path == Path(os.__file__)
    assert names == sorted(names) and len(names) > 500
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert all(name.endswith(".py") and not left_out & set(name.split("/")) for name in names)
    for file in random.Random(0).sample(files, 50):
        file.path.read_text(encoding="utf-8")


def test_the_standard_library_ignores_files_that_are_not_its_text(tmp_path: Path, monkeypatch):
    for name, content in {
        "b.py": b"b",
        "a.py": b"a",
        "pkg/z.py": b"z",
        "latin.py": b"# \xe9",
        "empty.py": b"",
        "notes.txt": b"n",
        "test/t.py": b"t",
        "pkg/tests/t.py": b"t",
        "idlelib/idle_test/t.py": b"t",
        "site-packages/torch.py": b"t",
        "pkg/__pycache__/c.py": b"c",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    files = source(dataset="python_stdlib").files
    assert [file.name for file in files] == ["a.py", "b.py", "pkg/z.py"]


def test_a_python_without_its_sources_is_an_error(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert error(source, "", "python_stdlib").startswith(
        'data.dataset = "python_stdlib" finds no source file'
    )


def test_the_order_and_the_digest_do_not_depend_on_the_file_system(text_folder: Path, monkeypatch):
    before = source(text_folder)
    walk = os.walk

    def shuffled(root, **options):
        for folder, subfolders, names in walk(root, **options):
            random.Random(1).shuffle(subfolders)
            random.Random(2).shuffle(names)
            yield folder, subfolders, names

    monkeypatch.setattr("os.walk", shuffled)
    after = source(text_folder)
    assert [file.name for file in after.files] == [file.name for file in before.files]
    assert after.digest == before.digest


def test_the_digest_follows_content_and_names_but_not_the_place(tmp_path: Path):
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "a.txt").write_text("hello")
    (folder / "b.txt").write_text("world")
    first, status = source(folder).digest, (folder / "a.txt").stat()
    folder = folder.rename(tmp_path / "two")
    assert source(folder).digest == first
    (folder / "a.txt").write_text("hellO")
    os.utime(folder / "a.txt", ns=(status.st_atime_ns, status.st_mtime_ns))
    second = source(folder).digest
    (folder / "b.txt").rename(folder / "c.txt")
    assert len({first, second, source(folder).digest}) == 3


def test_a_folder_gives_its_utf_8_files_and_says_what_it_leaves_out(tmp_path: Path, caplog):
    for name, content in {
        "b.md": b"b" * 100,
        "a/2": b"two",
        "a/10.txt": b"ten",
        "a.txt": "\ufefftext é\r\n".encode(),
        "empty.txt": b"",
        "latin.txt": "aé".encode("latin-1"),
        "wide.txt": "wide".encode("utf-16"),
        "image.bin": b"\0\0\2",
        "cut.txt": "\né".encode()[:2],
        ".hidden/x.txt": b"x",
        ".x.txt": b"x",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    opened = source(tmp_path, max_lost_fraction=0.2)
    assert [file.name for file in opened.files] == ["a.txt", "a/10.txt", "a/2", "b.md"]
    assert texts(opened) == ["text é\r\n", "ten", "two", "b" * 100]
    bad = "cut.txt (byte 0xc3 at offset 1, line 2), latin.txt (byte 0xe9 at offset 1, line 1)"
    assert caplog.messages == [
        f"{tmp_path}: left out {line}"
        for line in (
            "1 UTF-16 file, 10 bytes, 7.58 % of the text: wide.txt",
            "1 binary file, 3 bytes: image.bin",
            "1 empty file: empty.txt",
            "1 hidden file: .x.txt",
            "1 hidden folder: .hidden",
            f"2 non-UTF-8 files, 4 bytes, 3.03 % of the text: {bad}",
        )
    ]


def test_a_folder_that_is_all_text_gives_no_warning(text_folder: Path, caplog):
    source(text_folder)
    assert not caplog.messages


def test_a_file_that_turns_out_not_to_be_text_far_into_it_is_left_out(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"a" * (3 << 20) + b"\xff")
    (tmp_path / "b.txt").write_bytes("é".encode() * (1 << 20))  # no piece boundary may split a character
    assert [file.name for file in source(tmp_path, max_lost_fraction=1.0).files] == ["b.txt"]


def test_a_path_may_start_at_the_home_folder(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    assert texts(source("~/a.txt")) == ["a"]
    assert PythonStdlib(cache_dir="~/c").cache_folder == tmp_path / "c"


GUNZIP = "unpack it with `gunzip -k {}`, and name what that makes"
PACKED = gzip.compress(b'{"text": "a"}\n')


@pytest.mark.parametrize(
    ("dataset", "content", "message"),
    [
        ("text", b"", "is empty: name a file that holds text"),
        ("text", b"\xff", "is not UTF-8 text (byte 0xff at offset 0, line 1): convert it to UTF-8, or drop "),
        ("text", b"\0\0\1\2", "is binary, not text: name a file that holds text"),
        ("text", PACKED, f"is compressed (gzip): {GUNZIP}"),
        ("jsonl", PACKED, f"is compressed (gzip): {GUNZIP}"),
        (
            "jsonl",
            '{"text": "a"}'.encode("utf-16"),
            "is UTF-16 text, not UTF-8: convert it with `iconv -f UTF",
        ),
        ("jsonl", b'[{"text": "a"}]', "is one JSON array, not one object on each line: convert it with `jq"),
        ("jsonl", b'{\n"text": "a"}', "is a JSON object on several lines, not one object on each line: conv"),
    ],
)
def test_a_single_file_without_text_is_an_error(tmp_path: Path, dataset: str, content: bytes, message: str):
    (tmp_path / "x").write_bytes(content)
    expected = f'data.path = "{tmp_path}/x" {message.format(tmp_path / "x")}'
    assert error(source, tmp_path / "x", dataset).startswith(expected)


def test_a_folder_without_text_is_an_error(tmp_path: Path):
    assert error(source, tmp_path).startswith(f'data.path = "{tmp_path}" holds no text file')
    (tmp_path / "x").write_bytes(b"\xff")
    (tmp_path / "y").write_bytes(b"")
    (tmp_path / "z.gz").write_bytes(PACKED)
    packed = f"1 compressed file (gzip), {len(PACKED)} bytes: z.gz"
    bad = "1 non-UTF-8 file, 1 byte: x (byte 0xff at offset 0, line 1)"
    assert f"holds no UTF-8 text file ({packed}; 1 empty file: y; {bad}): name a folder" in error(
        source, tmp_path
    )
    other = "1 non-UTF-8 file, 1 byte: x"
    assert f"holds no .jsonl file ({packed}; 1 empty file: y; {other}): name a .jsonl file" in error(
        source, tmp_path, "jsonl"
    )


@pytest.mark.parametrize("content", ["one\0NUL", "a\0b", "\0" * 30 + "text" * 20, "the\0end\0" * 50_000])
def test_a_text_may_have_nuls(tmp_path: Path, content: str):
    (tmp_path / "x").write_text(content)
    assert texts(source(tmp_path / "x")) == [content]


@pytest.mark.parametrize("dataset", ["text", "jsonl"])
def test_a_file_with_a_byte_order_mark_alone_is_empty(tmp_path: Path, dataset: str):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\xef\xbb\xbf")
    assert f'data.path = "{file}" is empty' in error(source, file, dataset)
    assert "(1 empty file, 3 bytes: x.jsonl)" in error(source, tmp_path, dataset)
    (tmp_path / "y.jsonl").write_text('{"text": "a"}')
    assert [opened.name for opened in source(tmp_path, dataset).files] == ["y.jsonl"]


@pytest.mark.parametrize("dataset", ["text", "jsonl"])
def test_a_file_with_links_to_it_is_taken_once(tmp_path: Path, monkeypatch, dataset: str):
    folder, outside = tmp_path / "texts", tmp_path / "outside.jsonl"
    (folder / "sub").mkdir(parents=True)
    for file in (folder / "sub" / "i.jsonl", outside):
        file.write_text('{"text": "a"}\n')
    (folder / "a-link.jsonl").symlink_to("sub/i.jsonl")
    (folder / "sub" / "z-link.jsonl").symlink_to("../a-link.jsonl")
    for name in ("out2.jsonl", "out1.jsonl", "sub/out0.jsonl"):
        (folder / name).symlink_to(outside)
    (tmp_path / "other").symlink_to(folder)
    for root in (folder, tmp_path / "other"):
        assert [file.name for file in source(root, dataset).files] == ["out1.jsonl", "sub/i.jsonl"]
    assert [file.name for file in source(folder / "a-link.jsonl", dataset).files] == ["a-link.jsonl"]
    monkeypatch.chdir(folder)
    assert [file.name for file in source(".", dataset).files] == ["out1.jsonl", "sub/i.jsonl"]


def test_a_file_that_opens_but_cannot_be_read_is_named(tmp_path: Path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    file = tmp_path / "a.txt"
    file.write_text("a")
    opened = source(file)
    message = f'data.path = "{file}" cannot be read (Input/output error): change its permissions'
    monkeypatch.setattr(sources, "_pieces", fail)
    assert message in error(texts, opened)
    monkeypatch.setattr(files.TextCheck, "add", fail)
    assert message in error(source, file)


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path, write_jsonl):
    file, lines = tmp_path / "a.txt", write_jsonl(["one", "two"])
    file.write_text("before")
    for opened, path in ((source(file), file), (source(lines, "jsonl"), lines)):
        with path.open("a") as stream:
            stream.write("\n")
        assert "changed while it was read: start again" in error(texts, opened)
        path.unlink()
        assert "cannot be read (No such file or directory)" in error(texts, opened)


def test_json_lines_are_documents_in_order(tmp_path: Path, write_jsonl):
    expected = ["one", "two\nlines", "é 🙂 \u2028", "", "<|endoftext|>"]
    assert texts(source(write_jsonl(expected), "jsonl")) == expected
    (tmp_path / "b").mkdir()
    write_jsonl(["last"], "b/z.jsonl")
    (tmp_path / "b" / "other.txt").write_text("not a document")
    assert texts(source(tmp_path, "jsonl")) == ["last", *expected]


def test_json_lines_may_have_a_mark_blank_lines_and_carriage_returns(tmp_path: Path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"body": 1, "text": "b"}')
    assert texts(source(tmp_path / "x.jsonl", "jsonl")) == ["a", "b"]


def test_the_field_of_json_lines_can_be_chosen(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('{"text": "a", "body": "b"}\n')
    assert texts(source(tmp_path / "x.jsonl", "jsonl", field="body")) == ["b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON (Expecting property name"),
        ("text", "is not JSON (Expecting value"),
        ('{"text": "a"} {"text": "b"}', "is not JSON (Extra data"),
        ("ab\udcff", "is not UTF-8 text (byte 0xff at offset 2 of the line): convert the file to UTF-8, or"),
        ("\0", "is not JSON (Expecting value"),
        ("[" * 100_000, "is not JSON (maximum recursion depth"),
        ('{"text": ' + "9" * 5000 + "}", "is not JSON (Exceeds the limit"),
        ('["text"]', 'is not a JSON object: write {"text": "..."} on each line'),
        ("null", "is not a JSON object"),
        (r'{"text": "\ud83d"}', "has half of a surrogate pair in its text: write all of it"),
    ],
)
def test_a_malformed_json_line_is_named(tmp_path: Path, line: str, message: str):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line.encode(errors="surrogateescape") + b"\n")
    found = error(texts, source(file, "jsonl"))
    assert found.startswith(f'data.path = "{file}, line 2" {message}')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"texts": "a"}, 'is not a key of the object in {}, line 2: did you mean "texts"?'),
        ({}, "is not a key of the object in {}, line 2: "),
        ({"text": 3}, "is not the key of a string in {}, line 2: name the key of a text, or correct"),
        ({"text": None}, "is not the key of a string in {}, line 2: name the key of a text, or correct"),
    ],
)
def test_a_json_line_without_the_field_is_named(tmp_path: Path, content: dict, message: str):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "fine"}\n' + json.dumps(content) + "\n")
    assert error(texts, source(file, "jsonl")).startswith('data.field = "text" ' + message.format(file))


@pytest.mark.parametrize("kind", ["lines", "words", "no break at all", "wide characters", "carriage returns"])
def test_pieces_are_the_text_in_bounded_parts_that_split_no_character(tmp_path: Path, monkeypatch, kind: str):
    monkeypatch.setattr(sources, "PIECE_BYTES", 100)
    chance = random.Random(kind)
    alphabet = {
        "lines": "ab \n",
        "words": "abcdé ",
        "no break at all": "ab",
        "wide characters": "🙂文é",
        "carriage returns": "ab\r\n",
    }[kind]
    for length in (1, 99, 100, 101, 350, 5000):
        text = "".join(chance.choices(alphabet, k=length)).encode()
        (tmp_path / "a.txt").write_bytes(text)
        pieces = pieces_of(tmp_path / "a.txt")
        assert b"".join(pieces) == text
        assert all(0 < len(piece) <= 200 for piece in pieces)
        for piece in pieces:
            piece.decode()


def test_pieces_of_a_long_document_encode_as_the_whole_does(monkeypatch, tokenizer_folder: Path):
    from torchtitan_lite.data import load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_folder))
    text = Path(random.__file__).read_bytes()
    monkeypatch.setattr(sources, "PIECE_BYTES", 2000)
    pieces = pieces_of(random.__file__)
    assert len(pieces) > 10
    parts = [i for ids in tokenizer.encode_pieces(pieces) for i in ids.tolist()]
    assert parts == tokenizer.encode(text.decode()).tolist()


NAME = "name a text file or a folder of them"
PYTHON = sys.executable
WRITABLE = "name a folder that you can write to"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PythonStdlib(), []),
        (Text(), [f'path = "" is needed by dataset "text": {NAME}']),
        (Jsonl(), [f'path = "" is needed by dataset "jsonl": {NAME.replace("text", ".jsonl")}']),
        (Text(path="/no/such"), [f'path = "/no/such" does not exist: {NAME}']),
        (Text(path=PYTHON), []),
        (PythonStdlib(validation_fraction=0.0), []),
        (PythonStdlib(cache_dir=PYTHON), [f'cache_dir = "{PYTHON}" is not a folder: {WRITABLE}']),
        (
            PythonStdlib(cache_dir=f"{PYTHON}/a"),
            [f'cache_dir = "{PYTHON}/a" cannot be made in {PYTHON}: {WRITABLE}'],
        ),
    ],
)
def test_a_data_section_that_cannot_work_says_so_in_one_line_each(config: DataConfig, expected: list[str]):
    problems = config.problems("data")
    assert [str(problem) for problem in problems] == [f"data.{line}" for line in expected]


def test_a_cache_folder_with_too_long_a_name_is_found_before_anything_is_read(tmp_path: Path):
    no_room_below = "x/" * ((4096 - 50 - len(str(tmp_path))) // 2)
    for name in ("x" * 5000, "x" * 256, "é" * 128, "no/such/" + "x" * 256, "x/" * 2100, no_room_below):
        config = PythonStdlib(cache_dir=str(tmp_path / name))
        (problem,) = config.problems("data")
        assert (problem.key, problem.value) == ("data.cache_dir", str(config.cache_folder))
        assert problem.rule.startswith("is too long for a folder: ")
    assert PythonStdlib(cache_dir=str(tmp_path / ("x" * 255))).problems("data") == []


@pytest.mark.parametrize("dataset", ["text", "jsonl"])
def test_an_empty_folder_is_found_before_anything_is_read(tmp_path: Path, dataset: str):
    (tmp_path / "sub").mkdir()
    (problem,) = DATASETS[dataset](path=str(tmp_path)).problems("data")
    assert problem.key == "data.path" and problem.rule.startswith("holds no ")


def test_the_cache_is_in_the_users_cache_folder_by_default(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert PythonStdlib().cache_folder == Path("/home/someone/.cache/torchtitan_lite")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert PythonStdlib().cache_folder == tmp_path / "torchtitan_lite"


def test_texts_in_memory_or_of_a_function_are_documents_as_often_as_they_are_asked_for():
    in_memory, yielded = Texts(["one", "zwölf", ""]), Texts(lambda: iter(["one", "zwölf", ""]))
    for source in (in_memory, yielded):
        for _ in range(2):
            read = [(document.size, b"".join(document.pieces)) for document in source.documents()]
            assert read == [(3, b"one"), (6, "zwölf".encode()), (0, b"")]
        assert source.n_bytes == 9
    assert in_memory.digest == yielded.digest


def test_the_digest_of_texts_is_their_hash_unless_it_is_given():
    several = (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"], [])
    assert len({Texts(texts).digest for texts in several}) == len(several)

    def unread():
        raise AssertionError("a digest that is given needs no reading")

    assert Texts(unread, digest="1").digest == "1"
