"""Tokenizers, from text to token ids and back: bytes, a Hugging Face tokenizer.json, or one of a plugin."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
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
    """The tokenizer of a run."""

    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """The id that ends every document. No text encodes to this id."""
    stop_ids: Sequence[int]
    """The ids after which generated text ends: eos_id, and other ids that the model's files name."""
    bos_id: int | None
    """The id with which other programs begin a text. This package never adds the id."""
    fingerprint: str
    """A string that changes whenever the ids of some text may change."""

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, without any special token."""
        ...

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids of each UTF-8 piece by itself. For much text this is faster than `encode`."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, without the special tokens."""
        ...

    def save(self, folder: Path) -> None:
        """Write files from which `load_tokenizer` and transformers load this tokenizer."""
        ...


def load_tokenizer(spec: str, options: object = None) -> Tokenizer:
    """Load the tokenizer `spec`: a registered name, or the path of a tokenizer.json or of its folder.

    `options` is the config section `[tokenizers]`. Without `options`, registered tokenizers use their
    defaults. Raises ConfigError if there is no such tokenizer, or its files cannot be used.
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
    """The tokenizer with one id for each byte of the UTF-8 text."""

    name: Literal["bytes"] = "bytes"

    def build(self) -> Tokenizer:
        """Return the tokenizer, which needs no file."""
        return ByteTokenizer()


class ByteTokenizer:
    """The tokenizer with one id for each byte of the UTF-8 text, and one id for the end of a document."""

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

        # A byte-level BPE without merges: one letter stands for each byte.
        vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
        encoder: Any = Encoder(models.BPE(vocab=vocabulary, merges=[]))
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        encoder.decoder = decoders.ByteLevel()
        encoder.add_special_tokens([AddedToken(_END_NAMES[0], special=True, normalized=False)])
        encoder.save(str(folder / _FILE))
        _write_config(folder, _END_NAMES[0])


def _byte_letters() -> list[str]:
    """Return the letter for each byte in byte-level BPE: the byte's own character if visible, else a new one.

    The new characters are U+0100 and those that follow it.

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
    _write_json(folder / _CONFIG, content)


class FileTokenizer:
    """A tokenizer that the tokenizers library reads from a tokenizer.json."""

    def __init__(self, file: Path, spec: str) -> None:
        # The library is imported here, so that a run on bytes does not wait for the import.
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Encoder

        try:
            content = file.read_bytes()
            encoder: Any = Encoder.from_str(content.decode())
        except Exception as error:  # noqa: BLE001 - the library raises Exception itself
            remedy = "name a tokenizer.json that the tokenizers library can read"
            raise _error(spec, f"cannot be read ({error})", remedy) from None
        # A file may turn on truncation and padding. Documents would then be cut short without a warning.
        encoder.no_truncation()
        encoder.no_padding()
        beside = {name: _read_json(file.parent / name, spec) for name in (*_END_TEXT_FILES, *_END_ID_FILES)}
        self._spec, self._file, self._content, self._beside = spec, file, content, beside
        self._encoder = encoder
        self._end = _find_end(encoder, beside, spec)
        # `encode_special_tokens` makes the library treat special tokens in a text as plain text. The end
        # token is made special, whatever the file says, so that it is treated as plain text too.
        encoder.add_special_tokens([AddedToken(self._end, special=True, normalized=False)])
        encoder.encode_special_tokens = True
        self.eos_id: int = encoder.token_to_id(self._end)
        self.bos_id = _find_begin(encoder, beside)
        self.stop_ids: Sequence[int] = list(dict.fromkeys([self.eos_id, *_find_stops(encoder, beside)]))
        self.vocab_size: int = max(encoder.get_vocab().values()) + 1
        self.fingerprint = hashlib.sha256(content + f"\0{self.eos_id}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return self._encode([text])[0]

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[np.ndarray]:
        return self._encode([piece.decode() for piece in pieces])

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoder.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        (folder / _FILE).write_bytes(self._content)
        _write_config(folder, self._end)
        for name in _END_TEXT_FILES:
            if self._beside[name]:
                # auto_map names code in other repositories, which transformers would run.
                kept = {key: value for key, value in self._beside[name].items() if key != "auto_map"}
                _write_json(folder / name, {**kept, "eos_token": self._end})
        if len(self.stop_ids) > 1:
            _write_json(folder / _END_ID_FILES[0], {"eos_token_id": list(self.stop_ids)})
        if (template := self._file.parent / _TEMPLATE).is_file():
            shutil.copyfile(template, folder / _TEMPLATE)

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        try:
            encoded = self._encoder.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # noqa: BLE001 - the library raises Exception itself
            remedy = 'use "bytes", or a tokenizer that has an unknown token or knows every byte'
            raise _error(self._spec, f"cannot encode the text ({error})", remedy) from None
        return [np.array(one.ids, np.uint32) for one in encoded]


_Beside = dict[str, dict[str, Any]]
"""The content of the JSON files beside a tokenizer.json, by file name. A missing file has an empty dict."""


def _find_end(encoder: Any, beside: _Beside, spec: str) -> str:
    """Return the token that ends a text: the first known token that the files name, else a common token."""
    names = [_text_of(beside[name].get("eos_token")) for name in _END_TEXT_FILES]
    for name in _END_ID_FILES:
        ids = beside[name].get("eos_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        names.append(encoder.id_to_token(first) if _is_id(first) else None)
    for name in (*names, *_END_NAMES):
        if name is not None and encoder.token_to_id(name) is not None:
            return name
    rule = f"does not say which token ends a text, and knows none of {', '.join(_END_NAMES)}"
    raise _error(spec, rule, 'put a tokenizer_config.json with {"eos_token": "..."} beside it')


def _find_stops(encoder: Any, beside: _Beside) -> list[int]:
    """Return the ids that end generated text, from the first file that has a list of such ids."""
    lists = (beside[name].get("eos_token_id") for name in _END_ID_FILES)
    ids = next((ids for ids in lists if isinstance(ids, list)), [])
    return [number for number in ids if _is_id(number) and encoder.id_to_token(number) is not None]


def _find_begin(encoder: Any, beside: _Beside) -> int | None:
    """Return the id with which other programs begin a text, or None if the files name no known token."""
    names = [_text_of(beside[name].get("bos_token")) for name in _END_TEXT_FILES]
    ids = [encoder.token_to_id(name) for name in names if name is not None]
    return next((number for number in ids if number is not None), None)


def _text_of(token: object) -> str | None:
    """Return the text of a token: a string, or the "content" of an object. None if there is no text."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _is_id(number: object) -> bool:
    return isinstance(number, int) and 0 <= number < 2**32


def _read_json(file: Path, spec: str) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        rule = f"has a {file.name} beside it that cannot be read ({error})"
        raise _error(spec, rule, "correct that file, or remove it") from None
    return content if isinstance(content, dict) else {}


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _error(spec: str, rule: str, remedy: str) -> ConfigError:
    return ConfigError([Problem("data.tokenizer", spec, rule, remedy)])
