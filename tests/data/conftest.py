"""Small corpora, tokenizers and shards."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Encoder

from torchtitan_lite.data import Jsonl, Shards, Text, load_tokenizer, prepare

CORPUS = [f"def f{i}(x):\n    return x * {i}\n\n\nprint('héllo wörld', f{i}({i * 7}))\n" for i in range(300)]


@pytest.fixture(scope="session")
def bpe() -> str:
    """A byte-level BPE tokenizer as JSON, with two special tokens."""
    encoder = Encoder(models.BPE())
    encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoder.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, initial_alphabet=alphabet, special_tokens=special
    )
    encoder.train_from_iterator(CORPUS, trainer)
    return encoder.to_str()


@pytest.fixture
def tokenizer_folder(tmp_path: Path, bpe: str) -> Path:
    """A folder with the tokenizer `bpe`."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(bpe, encoding="utf-8")
    return folder


@pytest.fixture
def add_tokens(tokenizer_folder: Path) -> Callable[..., None]:
    """Adds tokens to the tokenizer in the folder."""

    def add(*names: str, special: bool = True) -> None:
        file = tokenizer_folder / "tokenizer.json"
        encoder = Encoder.from_file(str(file))
        tokens = [AddedToken(name, special=special, normalized=False) for name in names]
        (encoder.add_special_tokens if special else encoder.add_tokens)(tokens)
        file.write_text(encoder.to_str(), encoding="utf-8")

    return add


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """A folder of texts in subfolders: so many that the hash of a name decides what is held out."""
    folder = tmp_path / "texts"
    for i, text in enumerate(CORPUS):
        file = folder / f"part{i % 7}" / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes texts as JSON lines."""

    def write(texts: list[str], name: str = "texts.jsonl") -> Path:
        file = tmp_path / name
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return file

    return write


@pytest.fixture
def tokenized(tmp_path: Path) -> Callable[..., Shards]:
    """Prepares a dataset in a cache of its own."""

    def build(path: Path | str, dataset: str = "text", **options) -> Shards:
        options.setdefault("cache_dir", str(tmp_path / "cache"))
        config = {"text": Text, "jsonl": Jsonl}[dataset](path=str(path), **options)
        return prepare(config, load_tokenizer(config.tokenizer))

    return build
