"""The manifest: only one text stands for a content, and every byte of that text is checked."""

import errno
import hashlib
import json
import os
from pathlib import Path
from unittest import mock

import pytest
from checkpoint_cases import digest

from torchtitan_lite.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Damaged,
    Manifest,
    Unreadable,
    check_files,
    check_hash,
    read_manifest,
)

CONTENTS = {"a.bin": b"abc", "b.bin": b""}
WRITTEN = Manifest(
    step=7,
    files={name: digest(content) for name, content in CONTENTS.items()},
    made={"torch": "2.13.0", "mesh": {"ranks": 2}, "odd": 'é\n"'},
)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """The folder of `WRITTEN`, with its files."""
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / MANIFEST).write_text(WRITTEN.text())
    return tmp_path


def test_what_is_read_is_what_was_written(step: Path) -> None:
    assert read_manifest(step) == WRITTEN
    check_files(step, WRITTEN)
    for name, known in WRITTEN.files.items():
        check_hash(step, name, known)


def test_the_text_says_its_format_and_ends_with_its_own_hash() -> None:
    lines = WRITTEN.text().splitlines()
    assert lines[1] == f'  "format_version": {FORMAT_VERSION},'
    assert lines[-2].startswith('  "sha256": "') and lines[-1] == "}"
    content = json.loads(WRITTEN.text())
    own = content.pop("sha256")
    assert own == hashlib.sha256((json.dumps(content, indent=2) + "\n").encode()).hexdigest()
    assert content["files"]["a.bin"] == {"size": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}


def test_every_changed_byte_is_found(step: Path) -> None:
    text = (step / MANIFEST).read_bytes()
    for place in range(len(text)):
        for bit in (1, 32):
            (step / MANIFEST).write_bytes(text[:place] + bytes([text[place] ^ bit]) + text[place + 1 :])
            with pytest.raises(Damaged, match=r"^manifest\.json is not what was written$"):
                read_manifest(step)


TEXT = WRITTEN.text()


@pytest.mark.parametrize(
    "text",
    [
        *(TEXT + end for end in (" ", "\n", "{}", "\0")),
        *(TEXT[:n] for n in (0, 1, 100, len(TEXT) - 1)),
        json.dumps(json.loads(TEXT)),
        TEXT.replace('"step": 7', '"step": 6,\n  "step": 7'),
    ],
    ids=range(10),
)
def test_another_text_is_found(step: Path, text: str) -> None:
    assert text != TEXT
    (step / MANIFEST).write_text(text)
    with pytest.raises(Damaged):
        read_manifest(step)


def test_a_folder_that_cannot_be_read_is_not_called_damaged(step: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "scandir", mock.Mock(side_effect=OSError(errno.EIO, "no disk")))
    with pytest.raises(Unreadable, match=r"^the folder cannot be read \(no disk\)$"):
        check_files(step, WRITTEN)
