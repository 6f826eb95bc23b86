"""Text to token ids and back: bytes, a Hugging Face tokenizer.json, or a tokenizer of a plugin."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from torchtitan_lite.config.load import ConfigError, Problem, near
from torchtitan_lite.registry import tokenizers

_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<eos>", "[EOS]")
_FILE, _CONFIG = "tokenizer.json", "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_END_TEXT_FILES = (_CONFIG, "special_tokens_map.json")
_END_ID_FILES = ("generation_config.json", "config.json")


class Tokenizer(Protocol):
    """What the shards and the model need of a tokenizer."""

    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """The id that ends every document; no text encodes to it."""
    stop_ids: Sequence[int]
    """The ids after which generated text ends: eos_id, and what else the model's files name."""
    bos_id: int | None
    """What others begin a text with; nothing here does."""
    fingerprint: str
    """Changes whenever the ids of some text may change."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, without any special token."""
        ...

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[np.ndarray]:
        """Ids of each UTF-8 piece by itself; the fast way for much text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens left out."""
        ...

    def save(self, folder: Path) -> None:
        """Write the files from which this tokenizer is loaded again, by transformers too."""
        ...


def load_tokenizer(spec: str, options: object = None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: a registered one, a tokenizer.json, or the folder of one.

    `options` is the section `[tokenizers]`; without it, registered tokenizers have their defaults.
    """
    if spec in tokenizers.members:
        return tokenizers.configured(options)[spec].build()
    path = os.path.expanduser(spec)
    file = os.path.join(path, _FILE) if os.path.isdir(path) else path
    if not os.path.isfile(file):
        rule = "holds no tokenizer.json" if os.path.isdir(path) else "does not exist"
        close = near(spec, tokenizers.members)
        names = " or ".join(f'"{name}"' for name in tokenizers.members)
        remedy = f"use {names}, or the path of a tokenizer.json or of a folder that holds one"
        raise _error(spec, rule, close if close.startswith("did you mean") else remedy)
    return FileTokenizer(Path(file), spec)


@tokenizers.register
@dataclass(frozen=True, kw_only=True)
class Bytes:
    """One id for each byte of the UTF-8 text."""

    name: Literal["bytes"] = "bytes"

    def build(self) -> Tokenizer:
        """A tokenizer that needs no file."""
        return ByteTokenizer()


class ByteTokenizer:
    """One id for each byte of the UTF-8 text, and one that ends a document."""

    eos_id = 256
    bos_id: int | None = None
    stop_ids: Sequence[int] = (256,)
    vocab_size = 257
    fingerprint = "bytes-1"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8)

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(piece, np.uint8) for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in map(int, ids) if i < self.eos_id).decode(errors="replace")

    def save(self, folder: Path) -> None:
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Encoder

        # A byte-level BPE without merges: each byte is one of the letters that stand for bytes there.
        vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
        encoder: Any = Encoder(models.BPE(vocab=vocabulary, merges=[]))
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        encoder.decoder = decoders.ByteLevel()
        encoder.add_special_tokens([AddedToken(_END_NAMES[0], special=True, normalized=False)])
        encoder.save(str(folder / _FILE))
        _write_config(folder, _END_NAMES[0])


def _byte_letters() -> list[str]:
    """The letter for each byte in byte-level BPE: itself where it is visible, else one from 256 on.

    Source: bytes_to_unicode of https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def _write_config(folder: Path, end: str) -> None:
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "clean_up_tokenization_spaces": False,
    }
    (folder / _CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class FileTokenizer:
    """A tokenizer.json, read by the tokenizers library."""

    def __init__(self, file: Path, spec: str) -> None:
        # Imported here: a run on bytes need not wait for it.
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Encoder

        try:
            content = file.read_bytes()
            self._encoder: Any = Encoder.from_str(content.decode())
        except Exception as error:  # noqa: BLE001 - the library raises Exception itself
            remedy = "name a tokenizer.json that the tokenizers library can read"
            raise _error(spec, f"cannot be read ({error})", remedy) from None
        # A file may ask for both, and documents would be cut short without a word.
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._file, self._content = file, content
        self._end = end = _find_end(self._encoder, file, spec)
        # The end must be special, whatever the file says, for the next line to keep it out of the text.
        self._encoder.add_special_tokens([AddedToken(end, special=True, normalized=False)])
        self._encoder.encode_special_tokens = True
        self._spec = spec
        self.eos_id: int = self._encoder.token_to_id(end)
        self.bos_id = _find_begin(self._encoder, file, spec)
        self.stop_ids: Sequence[int] = list(
            dict.fromkeys([self.eos_id, *_find_stops(self._encoder, file, spec)])
        )
        self.vocab_size: int = max(self._encoder.get_vocab().values()) + 1
        self.fingerprint = hashlib.sha256(content + f"\0{self.eos_id}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        with self._encoding():
            return np.array(self._encoder.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[np.ndarray]:
        texts = [piece.decode() for piece in pieces]
        with self._encoding():
            encoded = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoder.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        (folder / _FILE).write_bytes(self._content)
        _write_config(folder, self._end)
        for name in _END_TEXT_FILES:
            if found := _read_json(self._file.parent / name, self._spec):
                found.pop("auto_map", None)  # the code of somebody else, for a loader that would run it
                found["eos_token"] = self._end
                (folder / name).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        if len(self.stop_ids) > 1:
            stops = json.dumps({"eos_token_id": list(self.stop_ids)}, indent=2)
            (folder / _END_ID_FILES[0]).write_text(stops + "\n", encoding="utf-8")
        if (template := self._file.parent / _TEMPLATE).is_file():
            shutil.copyfile(template, folder / _TEMPLATE)

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the library raises Exception itself
            remedy = 'use "bytes", or a tokenizer that has an unknown token or knows every byte'
            raise _error(self._spec, f"cannot encode the text ({error})", remedy) from None


def _find_end(encoder: Any, file: Path, spec: str) -> str:
    """The token that ends a text: as the files beside the tokenizer say, else a common name that it knows."""
    named = [_read_json(file.parent / name, spec).get("eos_token") for name in _END_TEXT_FILES]
    names = [name.get("content") if isinstance(name, dict) else name for name in named]
    for file_name in _END_ID_FILES:
        ids = _read_json(file.parent / file_name, spec).get("eos_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        if _is_id(first):
            names.append(encoder.id_to_token(first))
    for name in (*names, *_END_NAMES):
        if isinstance(name, str) and encoder.token_to_id(name) is not None:
            return name
    rule = f"does not say which token ends a text, and knows none of {', '.join(_END_NAMES)}"
    raise _error(spec, rule, 'put a tokenizer_config.json with {"eos_token": "..."} beside it')


def _is_id(number: object) -> bool:
    return isinstance(number, int) and 0 <= number < 2**32


def _find_stops(encoder: Any, file: Path, spec: str) -> list[int]:
    """The ids after which a text goes no further, where a list of them is beside the tokenizer."""
    for name in _END_ID_FILES:
        ids = _read_json(file.parent / name, spec).get("eos_token_id")
        if isinstance(ids, list):
            return [number for number in ids if _is_id(number) and encoder.id_to_token(number) is not None]
    return []


def _find_begin(encoder: Any, file: Path, spec: str) -> int | None:
    """The token that others begin a text with, as the files beside the tokenizer say; none here does."""
    for name in _END_TEXT_FILES:
        begin = _read_json(file.parent / name, spec).get("bos_token")
        begin = begin.get("content") if isinstance(begin, dict) else begin
        if isinstance(begin, str) and (found := encoder.token_to_id(begin)) is not None:
            return found
    return None


def _read_json(file: Path, spec: str) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        rule = f"has a {file.name} beside it that cannot be read ({error})"
        raise _error(spec, rule, "correct that file, or remove it") from None
    return content if isinstance(content, dict) else {}


def _error(spec: str, rule: str, remedy: str) -> ConfigError:
    return ConfigError([Problem("data.tokenizer", spec, rule, remedy)])
