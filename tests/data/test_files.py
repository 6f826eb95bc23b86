"""The files of a dataset, and what is left out of it."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest

from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.data import Jsonl, Text, files, kinds
from torchtitan_lite.data.datasets import open_source
from torchtitan_lite.data.files import Place
from torchtitan_lite.data.leftout import LeftOut
from torchtitan_lite.data.sources import FileSource
from torchtitan_lite.launch.end import End
from torchtitan_lite.training import outputs

ROW = '{"text": "a"}\n'
DATASETS = {"text": Text, "jsonl": Jsonl}


def opened(folder: Path, dataset: str = "text", **options: object) -> FileSource:
    found = open_source(DATASETS[dataset](path=str(folder), **options))  # pyright: ignore[reportArgumentType]
    assert isinstance(found, FileSource)
    return found


def names(folder: Path, dataset: str = "text", **options: object) -> list[str]:
    return [file.name for file in opened(folder, dataset, **options).files]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with texts of both datasets, and files that only look as those of a run do."""
    for name in ("a.jsonl", "sub/b.jsonl", "settings/config.toml", "doors/lock", "logs/metrics.jsonl"):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_text(ROW)
    return tmp_path / "texts"


TEXTS = ["a.jsonl", "doors/lock", "logs/metrics.jsonl", "settings/config.toml", "sub/b.jsonl"]


def start_run(folder: Path) -> None:
    """Do what a run does before it reads its text."""
    folder.mkdir(parents=True)
    outputs.lock(folder).close()


def train(folder: Path) -> None:
    """Write what a run has written when it saves a step."""
    for name in ("config.toml", "metrics.jsonl", "exit.json", "checkpoint/step-2/state.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"step": 2}\n')


@pytest.mark.parametrize("dataset", ["text", "jsonl"])
def test_run_folders_are_left_out_from_the_first_start_on(folder: Path, dataset: str, caplog) -> None:
    before = opened(folder, dataset).digest
    caplog.clear()
    start_run(folder / "outputs" / "mine")
    (line,) = (line for line in _messages(folder, dataset, before, caplog) if "run folder" in line)
    assert line == f"{folder}: left out 1 run folder: outputs/mine"
    train(folder / "outputs" / "mine")
    start_run(folder / "sub" / "other")
    (line,) = (line for line in _messages(folder, dataset, before, caplog) if "run folder" in line)
    assert line == f"{folder}: left out 2 run folders: outputs/mine, sub/other"
    outputs.write_refusal(folder / "refused", End(rank=0, status=2, outcome="refused"))
    (line,) = (line for line in _messages(folder, dataset, before, caplog) if "run folder" in line)
    assert line == f"{folder}: left out 3 run folders: outputs/mine, refused, sub/other"


def _messages(folder: Path, dataset: str, digest: str, caplog) -> list[str]:
    """Return the warnings of another reading of the folder. Its text must have this digest."""
    caplog.clear()
    assert opened(folder, dataset).digest == digest
    return caplog.messages


@pytest.mark.parametrize("left", [["metrics.jsonl"], ["exit.json"], ["metrics.jsonl", "exit.json"]])
def test_a_run_folder_that_was_copied_without_its_lock_is_recognised(folder: Path, left: list[str]) -> None:
    (folder / "copy").mkdir()
    for name in ("config.toml", *left):
        assert name in outputs._FILES
        (folder / "copy" / name).write_text("text")
    assert names(folder) == TEXTS


def test_the_folder_that_the_user_names_is_read_even_if_it_was_the_folder_of_a_run(folder: Path) -> None:
    run = folder / "outputs" / "mine"
    start_run(run)
    train(run)
    assert "metrics.jsonl" in names(run)
    assert names(run / "metrics.jsonl", "jsonl") == ["metrics.jsonl"]
    assert "metrics.jsonl" in names(Path(f"{run}/"))


def test_a_folder_of_jsonl_names_what_it_leaves_out_by_kind(tmp_path: Path, caplog) -> None:
    for name, content in {
        "a.jsonl": ROW.encode(),
        "b.jsonl.gz": gzip.compress(ROW.encode()),
        "sub/packed": gzip.compress(ROW.encode() * 2),
        "c.json": json.dumps([{"text": "a"}]).encode(),
        "pretty.json": json.dumps({"text": "a"}, indent=2).encode(),
        "D.JSONL": ROW.encode(),
        "e.ndjson": ROW.encode(),
        "f.txt": b"text",
        "g.parquet": b"PAR1\x15\0",
        "h.png": b"\x89PNG\r\n\x1a\n\0\0\0\x0d",
        "i": b"",
        "caf\xe9".encode("latin-1").decode(errors="surrogateescape"): b"more text",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert names(tmp_path, "jsonl") == ["D.JSONL", "a.jsonl"]
    n_packed = sum((tmp_path / name).stat().st_size for name in ("b.jsonl.gz", "sub/packed"))
    assert caplog.messages == [
        f"{tmp_path}: left out {line}"
        for line in (
            "1 JSON Lines file without the ending .jsonl, 14 bytes: e.ndjson",
            "1 JSON array, 15 bytes: c.json",
            "1 JSON object on several lines, 17 bytes: pretty.json",
            "1 Parquet file, 6 bytes: g.parquet",
            "1 binary file, 12 bytes: h.png",
            f"2 compressed files (gzip), {n_packed} bytes: sub/packed, b.jsonl.gz",
            "1 empty file: i",
            r"2 files without the ending .jsonl, 13 bytes: caf\udce9, f.txt",
        )
    ]


def test_links_and_special_files_are_named(tmp_path: Path, caplog) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "folder").symlink_to(tmp_path.parent)
    (tmp_path / "same.txt").symlink_to("a.txt")
    os.mkfifo(tmp_path / "pipe")
    assert names(tmp_path) == ["a.txt"]
    lines = ["1 broken link: broken", "1 link to a folder: folder", "1 special file: pipe"]
    assert caplog.messages == [f"{tmp_path}: left out {line}" for line in lines]


def test_a_file_with_the_ending_of_json_lines_and_another_content_is_an_error(folder: Path) -> None:
    (folder / "sub" / "x.jsonl").write_bytes(gzip.compress(b""))
    with pytest.raises(ConfigError, match=r'data.path = ".*/sub/x.jsonl" is compressed \(gzip\): unpack it'):
        opened(folder, "jsonl")
    (folder / "sub" / "x.jsonl").write_bytes(b"")
    assert "sub/x.jsonl" not in names(folder, "jsonl")


def test_other_files_are_opened_only_up_to_a_number(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.jsonl").write_text(ROW)
    for number in range(6):
        (tmp_path / f"{number}.gz").write_bytes(gzip.compress(b""))
    monkeypatch.setattr(files, "_MOST_LOOKED_INTO", 4)
    _, left_out = Place(root=tmp_path, suffix=".jsonl", is_json_lines=True).read()
    assert [line.partition(",")[0] for line in left_out.lines()] == [
        "4 compressed files (gzip)",
        "2 files without the ending .jsonl",
    ]


def test_other_files_need_not_be_readable(folder: Path, monkeypatch) -> None:
    (folder / "x.gz").write_text("x")
    open_ = Path.open

    def fail(path: Path, *words: object, **options: object):
        if path.name == "x.gz":
            raise PermissionError(13, "Permission denied")
        return open_(path, *words, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]

    monkeypatch.setattr(Path, "open", fail)
    assert names(folder, "jsonl") == ["a.jsonl", "logs/metrics.jsonl", "sub/b.jsonl"]


def test_folders_that_are_no_part_of_a_dataset_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "a.py").write_text("a")
    place = Place(root=tmp_path, suffix=".py", without=frozenset({"tests"}))
    kept, left_out = place.read()
    assert [file.name for file in kept] == ["a.py"] and left_out.lines() == []


def test_a_loss_of_more_than_a_tenth_of_the_text_is_refused_unless_it_is_allowed(
    tmp_path: Path, caplog
) -> None:
    (tmp_path / "small.txt").write_bytes(b"some text\n" * 100)
    line = b"a line of 20 bytes.\n"
    (tmp_path / "big.txt").write_bytes(line * 500 + b"\xff" + line * 500)
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path)
    lost = (
        "1 non-UTF-8 file, 20,001 bytes, 95.2 % of the text: big.txt (byte 0xff at offset 10,000, line 501)"
    )
    assert str(caught.value) == (
        f"data.max_lost_fraction = 0.1 is less than the 95.2 % of the text in {tmp_path} that is left out: "
        f"{lost}: convert these files to UTF-8, or set 1 to use the rest"
    )
    assert not caplog.messages
    assert names(tmp_path, max_lost_fraction=1.0) == ["small.txt"]
    assert caplog.messages == [f"{tmp_path}: left out {lost}"]


def test_a_loss_of_a_tenth_is_allowed_and_of_one_byte_more_is_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 900)
    (tmp_path / "b.txt").write_bytes(b"b" * 99 + b"\xff")
    (tmp_path / "image").write_bytes(bytes(100_000))  # no text is lost with it
    assert names(tmp_path) == ["a.txt"]
    with pytest.raises(ConfigError):
        opened(tmp_path, max_lost_fraction=0.0999)
    (tmp_path / "b.txt").write_bytes(b"b" * 100 + b"\xff")
    with pytest.raises(ConfigError):
        opened(tmp_path)


def test_what_a_run_may_lose_does_not_change_its_shards(tmp_path: Path, tokenized) -> None:
    (tmp_path / "a.txt").write_text("text")
    built = [tokenized(tmp_path / "a.txt", max_lost_fraction=share) for share in (0.0, 0.1, 1.0)]
    assert len({one.folder for one in built}) == 1


def test_a_cache_within_the_texts_is_named(tmp_path: Path, text_folder: Path, tokenized, caplog) -> None:
    built = tokenized(text_folder, cache_dir=str(text_folder))
    caplog.clear()
    tokenized(text_folder, cache_dir=str(text_folder))
    assert caplog.messages == [f"{text_folder}: left out 1 token cache: {built.folder.name}"]
    shutil.rmtree(built.folder)
    assert Place(root=text_folder).read()[1].lines() == []


def test_the_files_of_an_empty_folder_are_none(tmp_path: Path) -> None:
    left_out = LeftOut()
    (tmp_path / ".x").write_text("x")
    assert not Place(root=tmp_path).has_files(left_out)
    assert left_out.lines() == [f"{kinds.HIDDEN_FILE.words(1)}: .x"]
