"""The text of a dataset, and the options that its shards depend on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.data import DataConfig, Source, Texts, load_tokenizer, prepare


def test_shards_of_earlier_versions_are_still_found(tmp_path: Path, tokenized):
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("hello\n")
    lines.write_text('{"body": "one"}\n{"body": "two"}\n')
    # The names of the shards before datasets were classes.
    assert tokenized(text).folder.name == "text-e42e965522123c63abe2cb0f"
    built = tokenized(lines, "jsonl", field="body", validation_fraction=0.5)
    assert built.folder.name == "jsonl-fdf3ed9c09781596dbb40736"


@dataclass(frozen=True, kw_only=True)
class Letters(DataConfig):
    """A dataset as a plugin would have it."""

    dataset: Literal["letters2"] = "letters2"
    letter: str = "a"

    def open(self) -> Source:
        return Texts([f"{number} letters" for number in range(200)])


def test_the_shards_of_a_plugins_dataset_depend_on_its_own_options(tmp_path: Path):
    def folder(**options) -> str:
        config = Letters(cache_dir=str(tmp_path), **options)
        return prepare(config, load_tokenizer("bytes")).folder.name

    assert folder() == folder(tokenizer="bytes") and folder().startswith("letters2-")
    assert len({folder(), folder(letter="b"), folder(validation_fraction=0.25)}) == 3


def test_a_dataset_of_empty_documents_has_no_text(tmp_path: Path):
    class Empty(Letters):
        def open(self) -> Source:
            return Texts(["", ""])

    with pytest.raises(ConfigError) as caught:
        prepare(Empty(cache_dir=str(tmp_path)), load_tokenizer("bytes"))
    assert str(caught.value) == 'data.dataset = "letters2" has no text in its documents: choose another'
