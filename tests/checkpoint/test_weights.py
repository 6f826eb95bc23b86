"""Weights in safetensors are read box by box, and a wrong file is refused in one line."""

import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchtitan_lite.checkpoint.manifest import Damaged
from torchtitan_lite.checkpoint.tensors import Piece, differences, read_tensors
from torchtitan_lite.checkpoint.weights import (
    EXACT,
    INDEX,
    SINGLE,
    are_equal,
    read_weights_index,
    write_weights,
)
from torchtitan_lite.durable import new_folder

TENSORS = {
    "a": torch.arange(35.0).view(7, 5),
    "b": torch.randn(4).bfloat16(),
    "c": torch.randn(3, 2, dtype=torch.float16),
}
SHAPES = {name: x.shape for name, x in TENSORS.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tensors in two files with an index."""
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({name: TENSORS[name] for name in "bc"}, tmp_path / "two.safetensors")
    listed = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return tmp_path


def piece(shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Piece:
    return Piece(local=torch.full(sizes, -1.0), shape=torch.Size(shape), offsets=torch.Size(offsets))


def test_a_box_is_read_into_float32_without_losing_a_bit(folder: Path) -> None:
    pieces = {
        "a": piece((7, 5), (2, 1), (3, 4)),
        "b": piece((4,), (0,), (4,)),
        "c": piece((3, 2), (3, 0), (0, 2)),
    }
    index = read_weights_index(folder)
    assert differences(pieces, index, EXACT) == []
    read_tensors(folder, pieces, index)
    assert torch.equal(pieces["a"].local, TENSORS["a"][2:5, 1:])
    assert torch.equal(pieces["b"].local, TENSORS["b"].float())


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.int8, "I8"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL")],
)
def test_a_dtype_that_would_lose_bits_or_is_none_of_weights_is_refused(
    dtype: torch.dtype, name: str, tmp_path: Path
) -> None:
    save_file({"a": torch.zeros(2).to(dtype)}, tmp_path / SINGLE)
    assert differences({"a": piece((2,), (0,), (2,))}, read_weights_index(tmp_path), EXACT) == [
        f"a is {name}, and can be read from F32, F16, BF16"
    ]


def lists(folder: Path, **changes: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    (folder / INDEX).write_text(json.dumps(index))


def truncate(folder: Path) -> None:
    content = (folder / "two.safetensors").read_bytes()
    (folder / "two.safetensors").write_bytes(content[:-1])


def pickled(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def twice(folder: Path) -> None:
    save_file({"a": TENSORS["a"], "b": TENSORS["b"], "c": TENSORS["c"]}, folder / "two.safetensors")


def other_dtype(folder: Path) -> None:
    header = b'{"b":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}'
    (folder / "two.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


@pytest.mark.parametrize("is_listed", [True, False])
def test_rotary_frequencies_are_left_out(is_listed: bool, folder: Path) -> None:
    names = [
        "rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.inv_freq",
    ]
    stored = {name: torch.ones(2, dtype=torch.float64) for name in names}
    save_file({"a": TENSORS["a"], **stored}, folder / "one.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"], names[0]: torch.ones(2)}, folder / "two.safetensors")
    if is_listed:
        lists(folder, **dict.fromkeys(names, "one.safetensors"))
    assert read_weights_index(folder).keys() == TENSORS.keys()


@pytest.mark.parametrize(
    "name", ["model.inv_freq", "model.rotary_emb.inv_freqs", "my_rotary_emb.inv_freq", "model.rotary_emb"]
)
def test_other_tensors_with_similar_names_are_not_left_out(name: str, tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"], name: torch.ones(2)}, tmp_path / SINGLE)
    assert read_weights_index(tmp_path).keys() == {"a", name}


HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (truncate, "two.safetensors is no whole safetensors file ("),
    "empty": (lambda folder: (folder / "two.safetensors").write_bytes(b""), "two.safetensors is no whole"),
    "huge header": (
        lambda folder: (folder / "two.safetensors").write_bytes(b"\xff" * 8 + b"{}"),
        "two.safetensors is no whole safetensors file (",
    ),
    "a dtype that is not read": (other_dtype, "b is F8_E8M0, which is not read here"),
    "two models": (
        lambda folder: save_file(TENSORS, folder / SINGLE),
        f"{SINGLE} is there, and an {INDEX} of other files",
    ),
    "a name too long": (
        lambda folder: lists(folder, a=f"{'x' * 300}.safetensors"),
        f"{'x' * 300}.safetensors is no whole safetensors file (",
    ),
    "missing file": (lambda folder: (folder / "two.safetensors").unlink(), "two.safetensors is missing"),
    "path outside": (
        lambda folder: lists(folder, a="../one.safetensors"),
        f"{INDEX} names '../one.safetensors'",
    ),
    "absolute path": (
        lambda folder: lists(folder, a="/etc/passwd"),
        f"{INDEX} names '/etc/passwd', which is no",
    ),
    "no file": (lambda folder: lists(folder, a=3), f"{INDEX} names 3, which is no safetensors file"),
    "too many": (
        lambda folder: lists(folder, d="two.safetensors"),
        f"{INDEX} is not true of d: it names two.",
    ),
    "elsewhere": (lambda folder: lists(folder, a="two.safetensors"), f"{INDEX} is not true of a: "),
    "twice": (twice, "a is in one.safetensors and in two.safetensors"),
    "no index": (lambda folder: (folder / INDEX).write_text("[]"), f"{INDEX} is no index of tensors"),
    "empty index": (lambda folder: (folder / INDEX).write_text('{"weight_map": {}}'), f"{INDEX} is no index"),
    "deep index": (
        lambda folder: (folder / INDEX).write_text("[" * 10**5),
        f"{INDEX} is no index of tensors",
    ),
    "nothing": (lambda folder: (folder / INDEX).unlink(), f"neither {SINGLE} nor {INDEX} is there"),
    "a pickle": (pickled, "pytorch_model.bin is a pickle, which can run anything: only safetensors are read"),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_broken_or_hostile_folder_is_one_line(name: str, folder: Path) -> None:
    harm, words = HARMS[name]
    harm(folder)
    with pytest.raises(Damaged) as refused:
        read_weights_index(folder)
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize("most", [1 << 30, 75, 1])
def test_what_is_written_is_read_whatever_the_size_of_a_file(most: int, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def read(names: Sequence[str]) -> dict[str, torch.Tensor]:
        asked.append([*names])
        return {name: TENSORS[name] for name in names}

    with new_folder(tmp_path / "out") as place:
        write_weights(place, SHAPES, torch.bfloat16, read, most)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == {1 << 30: [SINGLE], 75: [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]}.get(
        most, [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    )
    assert [name for names in asked for name in names] == [*TENSORS]
    found = {name: x for file in files for name, x in load_file(tmp_path / "out" / file).items()}
    assert {name: x.dtype for name, x in found.items()} == dict.fromkeys(TENSORS, torch.bfloat16)
    assert all(torch.equal(found[name], x.bfloat16()) for name, x in TENSORS.items())
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"] == {"total_size": 90}
    index = read_weights_index(tmp_path / "out")
    assert {name: stored.shape for name, stored in index.items()} == SHAPES


def test_two_tensors_are_compared_to_the_bit(tmp_path: Path) -> None:
    x = torch.randn(3000, 3)
    y = x.clone()
    y[2999, 2] = -y[2999, 2]
    save_file({"x": x, "same": x.clone(), "y": y, "half": x.half()}, tmp_path / SINGLE)
    index = read_weights_index(tmp_path)
    assert are_equal(tmp_path, index["x"], index["same"])
    assert not are_equal(tmp_path, index["x"], index["y"])
    assert not are_equal(tmp_path, index["x"], index["half"])
