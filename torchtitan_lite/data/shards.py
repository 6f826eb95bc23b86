"""Token shards on disk: built once for each text and tokenizer, then used as memory maps.

    <cache>/<dataset>-<key>/ train.tokens train.offsets validation.tokens validation.offsets metadata.json

Tokens are little-endian integers, as wide as the vocabulary needs. Documents follow one another, and each
ends with the end-of-text token. Offsets are int64: the start of each document, then the number of tokens.
"""

import hashlib
import json
import logging
import math
import shutil
import time
from array import array
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

import numpy as np

from torchtitan_lite import durable
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.data import heldout
from torchtitan_lite.data.datasets import DataConfig, open_source
from torchtitan_lite.data.files import CACHED
from torchtitan_lite.data.sources import Source
from torchtitan_lite.data.tokenizer import Tokenizer

# Increase this number when the same text and tokenizer give other shards, or the format of the files changes.
_FORMAT = 1
_BATCH_BYTES = 2 << 20
_LOG = logging.getLogger(__name__)

SplitName = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """The tokens of one split of a dataset."""

    name: SplitName
    n_bytes: int
    """The number of bytes of UTF-8 text."""
    unigram_entropy: float
    """The loss in nats per byte of a model that knows only the byte frequencies of the split."""
    tokens_T: np.ndarray
    """All tokens of the split, memory-mapped."""
    offsets: np.ndarray
    """The index of the first token of each document, then the number of tokens."""

    @property
    def n_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        """The number of tokens, end-of-text tokens included."""
        return len(self.tokens_T)


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The tokens of a dataset on disk. The validation split is empty if nothing is held out."""

    folder: Path
    train: Split
    validation: Split


def prepare(config: DataConfig, tokenizer: Tokenizer) -> Shards:
    """Return the token shards of `config`. Build the shards unless the cache has them undamaged.

    Raises ConfigError if there is no text, a JSON line is wrong, or the cache folder cannot be written to.
    """
    source = open_source(config)
    key = _key(config, source, tokenizer)
    folder = config.cache_folder / f"{config.dataset}-{key[:24]}"
    assert CACHED.fullmatch(folder.name), folder
    try:
        _sweep(folder.parent)
        if shards := _load(folder, key):
            return shards
        with _exclusive(folder):
            # Another process may have built the shards while this process waited for the lock.
            return _load(folder, key) or _build(source, config, tokenizer, folder, key)
    except OSError as error:
        rule = f"cannot be written to ({error.strerror or error})"
        remedy = "name a folder that you can write to, on a disk with room"
        raise ConfigError([Problem("data.cache_dir", str(folder.parent), rule, remedy)]) from None


def _exclusive(folder: Path, seconds: float = math.inf) -> IO[str]:
    """Lock `folder` for a build until the returned file is closed. Wait at most `seconds` for the lock."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return durable.lock(folder.with_name(f"{folder.name}.lock"), seconds)


def _sweep(parent: Path) -> None:
    """Remove the unfinished folders of killed processes in `parent`, but not those of living processes."""
    for left in parent.glob("*.tmp-????????"):
        if ours := CACHED.fullmatch(left.name):
            # OSError: the folder may be read-only.
            with suppress(OSError, durable.InUse), _exclusive(parent / ours[1], seconds=0):
                shutil.rmtree(left)


def _key(config: DataConfig, source: Source, tokenizer: Tokenizer) -> str:
    parts = [_FORMAT, config.dataset, source.digest, config.shard_options, config.validation_fraction]
    return hashlib.sha256(json.dumps([*parts, tokenizer.fingerprint]).encode()).hexdigest()


def _build(source: Source, config: DataConfig, tokenizer: Tokenizer, folder: Path, key: str) -> Shards:
    began = time.perf_counter()
    held_out = heldout.choose(source.documents(), config.validation_fraction, source.n_bytes)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    if folder.exists():  # the folder is damaged, otherwise nothing would be built
        shutil.rmtree(folder)
    with durable.new_folder(folder) as place:
        with open(place / "train.tokens", "wb") as first, open(place / "validation.tokens", "wb") as second:
            train, validation = _Writer(first, tokenizer, dtype), _Writer(second, tokenizer, dtype)
            for document in source.documents():
                for is_held_out, piece in held_out.divide(document):
                    (validation if is_held_out else train).add(piece)
                train.end_document()
                validation.end_document()
            splits = {"train": train.finish(place / "train.offsets")}
            splits["validation"] = validation.finish(place / "validation.offsets")
        if train.n_tokens == validation.n_tokens == 0:
            raise ConfigError([_no_tokens(config, sum(split["n_bytes"] for split in splits.values()))])
        _write_metadata(place, {"key": key, "dtype": dtype, "splits": splits})
    shards = _load(folder, key)
    assert shards, f"{folder} was built just now"
    n_documents = shards.train.n_documents + shards.validation.n_documents
    n_tokens, seconds = shards.train.n_tokens + shards.validation.n_tokens, time.perf_counter() - began
    _LOG.info("tokenized %d documents to %d tokens in %.1f s: %s", n_documents, n_tokens, seconds, folder)
    return shards


def _no_tokens(config: DataConfig, n_bytes: int) -> Problem:
    if n_bytes:
        rule, remedy = f"makes no token of the {n_bytes} bytes of text", "name another, or more text"
        return Problem("data.tokenizer", config.tokenizer, rule, remedy)
    return config.no_text()


class _Writer:
    """The writer of one split's tokens and offsets, which encodes many pieces at a time."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer, dtype: str) -> None:
        self._file, self._tokenizer, self._dtype = file, tokenizer, dtype
        self._hash = hashlib.sha256()
        self._waiting: list[bytes | None] = []
        """The pieces that are not yet encoded. None marks the end of a document."""
        self._n_bytes_waiting = 0
        self._starts = array("q", [0])
        self.n_tokens = 0
        self._n_of_byte = np.zeros(256, np.int64)

    def add(self, piece: bytes) -> None:
        """Add the next piece of the current document."""
        self._n_of_byte += np.bincount(np.frombuffer(piece, np.uint8), minlength=256)
        self._waiting.append(piece)
        self._n_bytes_waiting += len(piece)
        if self._n_bytes_waiting >= _BATCH_BYTES:
            self._flush()

    def end_document(self) -> None:
        """End the current document, if there is one."""
        if self._waiting[-1:] != [None]:
            self._waiting.append(None)

    def finish(self, offsets_file: Path) -> dict[str, Any]:
        """Write the remaining tokens and the offsets. Return the split's size, entropy and file hashes."""
        self._flush()
        offsets = np.asarray(self._starts).astype("<i8").tobytes()
        offsets_file.write_bytes(offsets)
        n_bytes = int(self._n_of_byte.sum())
        shares = self._n_of_byte[self._n_of_byte > 0] / max(n_bytes, 1)
        return {
            "n_bytes": n_bytes,
            "unigram_entropy": float(np.sum(-shares * np.log(shares))),
            "sha256": {"tokens": self._hash.hexdigest(), "offsets": hashlib.sha256(offsets).hexdigest()},
        }

    def _flush(self) -> None:
        encoded = iter(self._tokenizer.encode_pieces([piece for piece in self._waiting if piece is not None]))
        for piece in self._waiting:
            if piece is not None:
                self._write(next(encoded))
            elif self.n_tokens > self._starts[-1]:  # a document without a token is left out
                self._write(np.array([self._tokenizer.eos_id]))
                self._starts.append(self.n_tokens)
        self._waiting, self._n_bytes_waiting = [], 0

    def _write(self, ids: np.ndarray) -> None:
        tokens = ids.astype(self._dtype).tobytes()
        self._file.write(tokens)
        self._hash.update(tokens)
        self.n_tokens += len(ids)


def _load(folder: Path, key: str) -> Shards | None:
    """Return the shards in `folder`. None if there are none, or if any of their bytes has changed."""
    if not folder.exists():
        return None
    try:
        metadata = _read_metadata(folder)
        if metadata["key"] != key:
            raise ValueError("it belongs to another dataset")
        train, validation = (_load_split(folder, name, metadata) for name in ("train", "validation"))
    except (OSError, ValueError) as error:
        _LOG.warning("%s is damaged and will be built again (%s)", folder, error)
        return None
    return Shards(folder=folder, train=train, validation=validation)


def _load_split(folder: Path, name: SplitName, metadata: dict[str, Any]) -> Split:
    content = metadata["splits"][name]
    mapped = {}
    for kind, dtype in (("tokens", metadata["dtype"]), ("offsets", "<i8")):
        path = folder / f"{name}.{kind}"
        with path.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != content["sha256"][kind]:
                raise ValueError(f"{path.name} is not what was written")
        # An empty file cannot be mapped.
        mapped[kind] = np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)
    return Split(
        name=name,
        n_bytes=content["n_bytes"],
        unigram_entropy=content["unigram_entropy"],
        tokens_T=mapped["tokens"],
        offsets=mapped["offsets"],
    )


def _write_metadata(folder: Path, content: dict[str, Any]) -> None:
    text = json.dumps({"content": content, "sha256": _hash_of(content)}, indent=2)
    (folder / "metadata.json").write_text(text + "\n", encoding="utf-8")


def _read_metadata(folder: Path) -> dict[str, Any]:
    whole = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    if not isinstance(whole, dict) or whole.get("sha256") != _hash_of(whole.get("content")):
        raise ValueError("metadata.json is not what was written")
    return whole["content"]


def _hash_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
