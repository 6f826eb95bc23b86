"""The byte tokenizer, and tokenizer.json files as they occur in practice."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Encoder
from tokenizers import models, pre_tokenizers

from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.data import load_tokenizer

END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<eos>", "[EOS]")
"""The names of end tokens, in the order in which they are tried."""


def words(folder: Path, vocabulary: dict[str, int]) -> Encoder:
    """Puts a tokenizer whose tokens are words into a folder."""
    encoder = Encoder(models.WordLevel(vocabulary, unk_token="[UNK]"))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.save(str(folder / "tokenizer.json"))
    return encoder


def test_bytes_are_their_own_ids():
    tokenizer = load_tokenizer("bytes")
    text = "naïve 文字 🙂\r\n\0<|endoftext|>"
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id == 256 and tokenizer.vocab_size == 257
    assert tokenizer.decode([104, 256, 105, 300]) == "hi"
    assert tokenizer.decode(np.array([0xC3, 0x28])) == "\ufffd("
    (pieces,) = tokenizer.encode_pieces([text.encode()])
    assert pieces.tolist() == ids.tolist() and pieces.base is not None, "the text itself, and not a copy"


def test_the_files_of_a_tokenizer_are_saved_with_its_end_and_without_code(tmp_path: Path):
    folder = tmp_path / "own"
    folder.mkdir()
    words(folder, {"[UNK]": 0, "a": 1, "<b>": 2, "<e>": 3, "<|endoftext|>": 4})
    config = {
        "bos_token": "<b>",
        "eos_token": None,
        "auto_map": {"AutoTokenizer": "x.py"},
        "model_max_length": 9,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [3]}')
    (folder / "chat_template.jinja").write_text("{{ x }}")
    tokenizer = load_tokenizer(str(folder))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 3)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1, 2**70, -1, "x", 99]}))
    tokenizer = load_tokenizer(str(folder))
    assert tokenizer.stop_ids == [3, 1]
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved == {"bos_token": "<b>", "eos_token": "<e>", "model_max_length": 9}
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == "{{ x }}"
    again = load_tokenizer(str(tmp_path / "saved"))
    assert (again.fingerprint, again.stop_ids) == (tokenizer.fingerprint, [3, 1])
    (folder / "config.json").write_text('{"a":' * 100_000)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2**70}))
    with pytest.raises(ConfigError, match=r"has a config\.json beside it that cannot be read"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_tokenizer_file_is_read_from_its_path_or_its_folder(tokenizer_folder: Path, as_folder: bool):
    path = tokenizer_folder if as_folder else tokenizer_folder / "tokenizer.json"
    tokenizer = load_tokenizer(str(path))
    text = "def f3(x): # héllo wörld 文"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())
    assert ids.tolist() == Encoder.from_file(str(tokenizer_folder / "tokenizer.json")).encode(text).ids


def test_the_name_of_a_special_token_in_a_text_is_only_text(tokenizer_folder: Path, add_tokens: Callable):
    add_tokens("<|im_start|>")
    tokenizer = load_tokenizer(str(tokenizer_folder))
    special = set(Encoder.from_file(str(tokenizer_folder / "tokenizer.json")).get_added_tokens_decoder())
    assert len(special) == 3
    text = "a<|endoftext|>b<|im_start|><|pad|>"
    ids = tokenizer.encode(text)
    assert not special & set(ids.tolist())
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_pieces([text.encode()])[0].tolist() == ids.tolist()


def test_an_end_that_the_file_does_not_call_special_is_kept_out_of_the_text_too(
    tokenizer_folder: Path, add_tokens: Callable
):
    add_tokens("<end>", special=False)
    (tokenizer_folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    tokenizer = load_tokenizer(str(tokenizer_folder))
    assert tokenizer.eos_id == 400
    assert tokenizer.eos_id not in tokenizer.encode("a<end>b")
    assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.eos_id]) == "ab"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", {"eos_token": "<stop>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "<stop>", "special": True}}),
        ("special_tokens_map.json", {"eos_token": "<stop>"}),
        ("special_tokens_map.json", {"eos_token": {"content": "<stop>"}}),
        ("generation_config.json", {"eos_token_id": 400}),
        ("generation_config.json", {"eos_token_id": [400, 0]}),
        ("config.json", {"eos_token_id": 400}),
    ],
)
def test_the_end_of_a_text_is_what_the_files_beside_the_tokenizer_say(
    tokenizer_folder: Path, add_tokens: Callable, file: str, content: dict
):
    add_tokens("<stop>")
    (tokenizer_folder / file).write_text(json.dumps(content))
    assert load_tokenizer(str(tokenizer_folder)).eos_id == 400
    assert load_tokenizer(str(tokenizer_folder / "tokenizer.json")).eos_id == 400


@pytest.mark.parametrize(
    "content",
    [{"eos_token": None}, {"eos_token": "<unknown>"}, {"eos_token_id": 9999}, {"eos_token_id": []}, []],
)
def test_files_that_name_no_end_the_tokenizer_knows_are_passed_over(tokenizer_folder: Path, content):
    for file in ("tokenizer_config.json", "generation_config.json"):
        (tokenizer_folder / file).write_text(json.dumps(content))
    tokenizer = load_tokenizer(str(tokenizer_folder))
    assert tokenizer.decode([tokenizer.eos_id]) == "" and tokenizer.eos_id == 0


@pytest.mark.parametrize("tried", range(len(END_NAMES)))
def test_without_such_files_the_first_common_name_is_the_end(tmp_path: Path, tried: int):
    later = {name: 8 + place for place, name in enumerate(END_NAMES[tried + 1 :])}
    words(tmp_path, {"a": 0, "[UNK]": 1, **later, END_NAMES[tried]: 7})
    assert load_tokenizer(str(tmp_path)).eos_id == 7


def test_the_page_names_the_ends_in_the_order_that_they_are_tried():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert ", ".join(f"`{name}`" for name in END_NAMES) in page.replace("\n", " ")


def test_the_vocabulary_reaches_to_the_largest_id_over_gaps(tmp_path: Path):
    words(tmp_path, {"a": 0, "</s>": 1, "[UNK]": 999})
    assert load_tokenizer(str(tmp_path)).vocab_size == 1000


def test_a_tokenizer_without_a_known_end_says_what_to_do(tmp_path: Path):
    words(tmp_path, {"a": 0, "[UNK]": 1})
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(str(tmp_path))
    assert str(caught.value) == (
        f'data.tokenizer = "{tmp_path}" does not say which token ends a text, and knows none of '
        f'{", ".join(END_NAMES)}: put a tokenizer_config.json with {{"eos_token": "..."}} beside it'
    )


def test_truncation_and_padding_in_the_file_do_not_reach_the_text(tmp_path: Path):
    encoder = words(tmp_path, {"a": 0, "[UNK]": 1, "</s>": 2})
    encoder.enable_truncation(3)
    encoder.enable_padding(length=8)
    encoder.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert len(tokenizer.encode("a " * 100)) == 100
    assert [len(ids) for ids in tokenizer.encode_pieces([b"a", b"a a"])] == [1, 2]


def test_a_post_processor_adds_nothing(tokenizer_folder: Path):
    from tokenizers import processors

    file = tokenizer_folder / "tokenizer.json"
    encoder = Encoder.from_file(str(file))
    encoder.post_processor = processors.TemplateProcessing(
        single="<|pad|> $A <|endoftext|>", special_tokens=[("<|pad|>", 1), ("<|endoftext|>", 0)]
    )
    encoder.save(str(file))
    assert not {0, 1} & set(load_tokenizer(str(file)).encode("print(1)").tolist())


@pytest.mark.parametrize(
    ("spec", "rule"),
    [("", "does not exist"), ("Qwen/Qwen3-0.6B", "does not exist"), ("empty", "holds no tokenizer.json")],
)
def test_a_tokenizer_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch, spec: str, rule: str):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(spec)
    remedy = 'use "bytes", or the path of a tokenizer.json or of a folder that holds one'
    assert str(caught.value) == f'data.tokenizer = "{spec}" {rule}: {remedy}'


@pytest.mark.parametrize("content", [b"", b"{}", b"not JSON", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_file_is_an_error(tmp_path: Path, content: bytes):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tokenizer(str(tmp_path))


def test_a_text_that_cannot_be_encoded_is_an_error(tmp_path: Path):
    encoder = Encoder(models.WordLevel({"a": 1, "</s>": 2}))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode("a a").tolist() == [1, 1]
    for encode in (lambda: tokenizer.encode("a b"), lambda: tokenizer.encode_pieces([b"a", b"a b"])):
        with pytest.raises(ConfigError) as caught:
            encode()
        (problem,) = caught.value.problems
        assert (problem.key, problem.value) == ("data.tokenizer", str(tmp_path))
        assert problem.rule.startswith("cannot encode the text (") and problem.remedy


def test_a_broken_file_beside_the_tokenizer_is_an_error(tokenizer_folder: Path):
    (tokenizer_folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"has a tokenizer_config\.json beside it that cannot be read"):
        load_tokenizer(str(tokenizer_folder))


def test_the_fingerprint_follows_the_file_and_the_end(tokenizer_folder: Path, add_tokens: Callable):
    spec = str(tokenizer_folder)
    found = [load_tokenizer(spec).fingerprint]
    assert load_tokenizer(spec).fingerprint == found[0]
    (tokenizer_folder / "tokenizer_config.json").write_text('{"eos_token": "<|pad|>"}')
    found.append(load_tokenizer(spec).fingerprint)
    add_tokens("<more>")
    found.append(load_tokenizer(spec).fingerprint)
    found.append(load_tokenizer("bytes").fingerprint)
    assert len(set(found)) == 4
