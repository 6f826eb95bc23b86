"""A step that an attacker wrote, with a manifest that fits it: refused, and nothing that it says is run."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    SMALL,
    Shell,
    Starts,
    Touch,
    changed_index,
    forge,
    forged_manifest,
    publish,
    tree,
    whole,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from torchtitan_lite.checkpoint.manifest import Damaged, read_manifest
from torchtitan_lite.checkpoint.restore import find, load, verify
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.checkpoint.tensors import read_index
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.launch.world import World

W, SHARD = "model.w", "__0_0.distcp"
Change = Callable[[Any], Any]
Options = Callable[..., list[str]]


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A step of `SMALL`."""
    return publish(tmp_path / "checkpoint", 5)


def refusal(step: Path) -> str:
    """Why a step whose manifest fits is refused."""
    with pytest.raises(Damaged) as caught:
        verify(step, World())
    return str(caught.value)


# --- the index ---


def global_call(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls a function, by what stands in it for its name."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


@pytest.mark.parametrize(
    "pickled",
    [
        lambda path: pickle.dumps(Touch(path)),
        lambda path: pickle.dumps(Shell(path)),
        lambda path: pickle.dumps(Shell(path), protocol=0),
        lambda path: pickle.dumps({"a": [Touch(path)]}, protocol=5),
        lambda path: global_call("os", "system", f"touch {path}"),
        lambda path: global_call("builtins", "eval", f"open({str(path)!r}, 'w')"),
        lambda path: global_call("torch", "serialization.os.system", f"touch {path}"),
        lambda path: global_call("torch.serialization", "os.system", f"touch {path}"),
        lambda path: global_call("torch.distributed.checkpoint.metadata", "os.system", f"touch {path}"),
        lambda path: global_call("torch.distributed.checkpoint.filesystem", "os.system", f"touch {path}"),
        lambda path: global_call("torch.distributed.checkpoint.filesystem", "FileSystem", f"{path}"),
        lambda path: global_call("torch", "load", str(path)),
        lambda path: b"cos\nsystem\n(S'touch " + str(path).encode() + b"'\ntR.",
        lambda path: b"(S'touch " + str(path).encode() + b"'\nios\nsystem\n.",
    ],
)
def test_an_index_that_would_run_something_is_refused_and_does_not_run_it(
    step: Path, tmp_path: Path, pickled: Callable[[Path], bytes]
) -> None:
    forge(step, _metadata=pickled(tmp_path / "marker"))
    assert refusal(step).startswith(".metadata ")
    assert not (tmp_path / "marker").exists()


def test_the_attacks_would_work_without_the_refusal(step: Path, tmp_path: Path) -> None:
    for attack in (Touch, Shell):
        forge(step, _metadata=pickle.dumps(attack(tmp_path / attack.__name__)))
        pickle.loads((step / ".metadata").read_bytes())
        assert (tmp_path / attack.__name__).exists()


def test_a_hostile_entry_of_an_index_that_is_otherwise_right_is_refused(step: Path, tmp_path: Path) -> None:
    def plant(metadata: Any) -> None:
        metadata.planner_data = Touch(tmp_path / "marker")

    forge(step, _metadata=changed_index(step, plant))
    assert "which no index of tensors needs" in refusal(step)
    assert not (tmp_path / "marker").exists()


def chunk(offsets: Any, sizes: Any) -> Change:
    """The tensor is said to lie in one box."""

    def change(metadata: Any) -> None:
        place = metadata.storage_data[MetadataIndex(W, torch.Size([0, 0]))]
        metadata.storage_data[MetadataIndex(W, torch.Size(offsets))] = place
        box = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        metadata.state_dict_metadata[W].chunks = [box]

    return change


def chunks(*rows: tuple[int, int]) -> Change:
    """The tensor is said to lie in boxes of whole rows, from here to there."""

    def change(metadata: Any) -> None:
        place = metadata.storage_data[MetadataIndex(W, torch.Size([0, 0]))]
        boxes = []
        for start, stop in rows:
            metadata.storage_data[MetadataIndex(W, torch.Size([start, 0]))] = place
            box = ChunkStorageMetadata(offsets=torch.Size([start, 0]), sizes=torch.Size([stop - start, 3]))
            boxes.append(box)
        metadata.state_dict_metadata[W].chunks = boxes

    return change


def place(**changes: Any) -> Change:
    """The tensor's bytes are said to be elsewhere."""

    def change(metadata: Any) -> None:
        index = next(index for index in metadata.storage_data if index.fqn == W)
        metadata.storage_data[index] = replace(metadata.storage_data[index], **changes)

    return change


def tensor(**changes: Any) -> Change:
    """The tensor is said to be another."""

    def change(metadata: Any) -> None:
        for name, value in changes.items():
            setattr(metadata.state_dict_metadata[W], name, value)

    return change


def entry(name: Any, value: Any) -> Change:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[name] = value

    return change


def no_place(metadata: Any) -> None:
    metadata.storage_data = {}


def subclassed(metadata: Any) -> None:
    metadata.state_dict_metadata[W] = metadata.state_dict_metadata[W].properties


INDEXES = {
    "bytes in place of a tensor": (entry(W, BytesStorageMetadata()), "asks for "),
    "bytes beside the tensors": (entry("model.bytes", BytesStorageMetadata()), "asks for "),
    "no tensor": (entry(W, 5), "which is no tensor"),
    "parts of a tensor in its place": (subclassed, "which is no tensor"),
    "a name that is none": (entry(7, None), "which is no tensor"),
    "a path to above": (place(relative_path="../x"), "outside of the step's files"),
    "a path to a step beside": (place(relative_path=f"../step-4/{SHARD}"), "outside of the step's files"),
    "an absolute path": (place(relative_path="/etc/passwd"), "outside of the step's files"),
    "a path that says the same": (place(relative_path=f"./{SHARD}"), "outside of the step's files"),
    "the manifest": (place(relative_path="manifest.json"), "outside of the step's files"),
    "no path": (place(relative_path=None), "is no index"),
    "a path that cannot be looked up": (place(relative_path=[]), "is no index"),
    "an offset beyond the file": (place(offset=10**6), "outside of the step's files"),
    "an offset before it": (place(offset=-1), "outside of the step's files"),
    "a length beyond the file": (place(length=10**6), "outside of the step's files"),
    "a length below nothing": (place(length=-1), "outside of the step's files"),
    "a length without end": (place(length=10**30), "outside of the step's files"),
    "an offset that is a fraction": (place(offset=0.0), "is no index"),
    "an offset that is text": (place(offset="0"), "is no index"),
    "another form": (place(transform_descriptors=["zstd"]), "in a form that is not written here"),
    "no place": (no_place, "is no index"),
    "a part above": (chunk((-1, 0), (4, 3)), "outside of it"),
    "a part below": (chunk((1, 0), (4, 3)), "outside of it"),
    "a part too large": (chunk((0, 0), (5, 3)), "outside of it"),
    "a part without end": (chunk((0, 0), (2**62, 3)), "outside of it"),
    "a part without rows": (chunk((0, 0), (0, 3)), "outside of it"),
    "a part of less than nothing": (chunk((0, 0), (-4, -3)), "outside of it"),
    "a part of other dims": (chunk((0, 0, 0), (4, 3, 1)), "is no index"),
    "no part": (chunks(), "does not have all of"),
    "a missing part": (chunks((0, 2), (3, 4)), "does not have all of"),
    "an overlapping part": (chunks((0, 3), (2, 4)), "does not have all of"),
    "a part twice and one missing": (chunks((0, 2), (0, 2)), "does not have all of"),
    "an overlap as large as a gap": (chunks((0, 2), (1, 3)), "does not have all of"),
    "too much": (chunks((0, 4), (0, 4)), "does not have all of"),
    "no dtype": (tensor(properties=None), "is no index"),
    "a size that is none": (tensor(size="43"), "is no index"),
    "a size of text": (tensor(size=("4", "3")), "is no index"),
    "another size": (tensor(size=torch.Size([3, 4])), "outside of it"),
    "a size whose product is too large": (tensor(size=torch.Size([2**32, 2**32])), "does not have all of"),
    "parts that are none": (tensor(chunks=[1]), "is no index"),
    "no parts": (tensor(chunks=None), "is no index"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_does_not_speak_of_tensors_in_the_step_s_files_is_refused(
    step: Path, name: str
) -> None:
    change, words = INDEXES[name]
    forge(step, _metadata=changed_index(step, change))
    assert refusal(step).startswith(".metadata ")
    assert words in refusal(step)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"\x80",
        b"N.",
        b"not a pickle",
        pickle.dumps(None),
        pickle.dumps({}),
        pickle.dumps(SMALL["model.w"]),
        pickle.dumps(TensorStorageMetadata),
        pickle.dumps(_StorageInfo("x", 0, 1)),
        b"\x80\x63N.",  # protocol 99
        b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",  # a frame without end
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"N.",  # bytes without end
        b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"N.",  # and a bytearray
        b"\x80\x04" + b"(" * 10**5 + b".",
        b"\x80\x04" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
        b"\x80\x04]\x94h\x00a.",  # a list that holds itself
        b"\x80\x04\x82\x01.",  # an extension
        b"\x80\x04\x8c\x01xQ.",  # a persistent id
    ],
    ids=range(19),
)
def test_what_is_no_index_is_refused(step: Path, content: bytes) -> None:
    forge(step, _metadata=content)
    assert re.match(r"\.metadata (is no index of tensors|asks for )", refusal(step))


def test_a_small_index_takes_little_memory_whatever_it_says(step: Path) -> None:
    # The place in the table of what was seen; Python's fast unpickler makes that table as long.
    index = b"\x80\x04Nr" + struct.pack("<I", 2**27) + b"."
    forge(step, _metadata=index)
    tracemalloc.start()
    try:
        refusal(step)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 * 2**20


def test_an_index_cannot_change_classes_for_what_comes_after(step: Path) -> None:
    name = b"\x8c\x25torch.distributed.checkpoint.metadata\x8c\x14ChunkStorageMetadata\x93"
    build = b"\x80\x04" + name + b"N}\x8c\x06marked\x8c\x03yes\x73\x86b."
    assert pickle.loads(build).marked == "yes"
    del ChunkStorageMetadata.marked  # pyright: ignore[reportAttributeAccessIssue]
    forge(step, _metadata=build)
    assert refusal(step).startswith(".metadata ")
    assert not hasattr(ChunkStorageMetadata, "marked")


def test_an_index_cannot_change_what_torch_looks_layouts_up_with(step: Path) -> None:
    name = b"\x8c\x13torch.serialization\x8c\x0b_get_layout\x93"
    build = b"\x80\x04" + name + b"}\x8c\x05cache}s" + b"b."
    forge(step, _metadata=build)
    before = torch.serialization._get_layout.cache  # pyright: ignore[reportFunctionMemberAccess]
    assert refusal(step).startswith(".metadata ")
    assert torch.serialization._get_layout.cache is before  # pyright: ignore[reportFunctionMemberAccess]


# --- the payload ---


def saved(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def with_payload(step: Path, payload: bytes) -> None:
    """Put `payload` in the place of a tensor, with an index and a manifest that fit."""
    shard = (step / SHARD).read_bytes()
    index = changed_index(step, place(offset=len(shard), length=len(payload)))
    forge(step, _metadata=index, __0_0_distcp=shard + payload)


def load_refusal(step: Path) -> str:
    found = verify(step, World())
    before = {name: torch.full_like(x, 7) for name, x in SMALL.items()}
    pieces = whole({name: x.clone() for name, x in before.items()})
    with pytest.raises(ConfigError) as caught:
        load(found, pieces, World())
    assert torch.equal(pieces[W].local, before[W])
    return str(caught.value)


class Sub(torch.Tensor):
    """A tensor that is not a plain one."""


def strided(size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros(100).as_strided(size, stride)


X = SMALL[W]
PAYLOADS = {
    "a call": lambda path: saved(Touch(path)),
    "a command": lambda path: saved(Shell(path)),
    "a call in a dict": lambda path: saved({"x": X, "y": Touch(path)}),
    "a call beside a tensor": lambda path: saved([X, Shell(path)]),
    "a call in the old format": lambda path: saved(Touch(path), _use_new_zipfile_serialization=False),
    "a bare pickle": lambda path: pickle.dumps(Touch(path)),
    "a bare pickle of old": lambda path: pickle.dumps(Shell(path), protocol=0),
    "a dict": lambda _: saved({"x": X}),
    "a list": lambda _: saved([X]),
    "a number": lambda _: saved(5.0),
    "nothing": lambda _: saved(None),
    "text": lambda _: saved("x" * 1000),
    "a parameter": lambda _: saved(torch.nn.Parameter(X)),
    "a subclass": lambda _: saved(X.as_subclass(Sub)),
    "another dtype": lambda _: saved(X.double()),
    "bits of another dtype": lambda _: saved(X.view(torch.int32)),
    "another shape": lambda _: saved(X.T.contiguous()),
    "fewer rows": lambda _: saved(X[:3].clone()),
    "a flat one": lambda _: saved(X.flatten()),
    "a sparse one": lambda _: saved(X.to_sparse()),
    "a compressed one": lambda _: saved(X.to_sparse_coo()),
    "one without data": lambda _: saved(torch.empty(4, 3, device="meta")),
    "complex": lambda _: saved(torch.complex(X, X)),
    "a storage": lambda _: saved(X.untyped_storage()),
    "no bytes": lambda _: b"",
    "any bytes": lambda _: bytes(range(256)) * 4,
    "half of it": lambda _: saved(X)[: len(saved(X)) // 2],
    "an empty archive": lambda _: b"PK\x05\x06" + bytes(18),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_payload_that_is_not_the_plain_tensor_of_the_index_is_refused(
    step: Path, tmp_path: Path, name: str
) -> None:
    with_payload(step, PAYLOADS[name](tmp_path / "marker"))
    assert f"is refused: {SHARD} holds " in load_refusal(step)
    assert not (tmp_path / "marker").exists()


def test_a_plain_tensor_with_other_strides_is_taken_for_what_it_says(step: Path) -> None:
    with_payload(step, saved(strided((4, 3), (0, 0))))
    pieces = whole({name: torch.ones_like(x) for name, x in SMALL.items()})
    load(verify(step, World()), pieces, World())
    assert torch.equal(pieces[W].local, torch.zeros(4, 3))


def test_a_chunk_in_a_document_is_refused(step: Path) -> None:
    size = read_manifest(step).files["state.json"].size
    forge(step, _metadata=changed_index(step, place(relative_path="state.json", offset=0, length=size)))
    assert f"is refused: state.json holds no plain tensor for {W}" in load_refusal(step)


def test_a_tensor_too_many_or_too_few_is_told(step: Path) -> None:
    def rename(metadata: Any) -> None:
        metadata.state_dict_metadata["model.v"] = metadata.state_dict_metadata.pop(W)
        index = next(index for index in metadata.storage_data if index.fqn == W)
        metadata.storage_data[MetadataIndex("model.v", index.offset)] = metadata.storage_data.pop(index)

    forge(step, _metadata=changed_index(step, rename))
    assert f"model.v is in the checkpoint alone, {W} is not in the checkpoint" in load_refusal(step)


# --- the documents ---

DEEP = 100_000


def state(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


def generators(**changes: Any) -> Callable[[bytes], bytes]:
    return state(**changes)


def python_words(words: list[Any]) -> Callable[[bytes], bytes]:
    return generators(python=[3, words, None])


def always(content: bytes) -> Callable[[bytes], bytes]:
    return lambda _: content


WRONG_JSON = {
    "no bytes": always(b""),
    "half of it": lambda content: content[: len(content) // 2],
    "no object": always(b"[]"),
    "null": always(b"null"),
    "text": always(b'"x"'),
    "an empty object": always(b"{}"),
    "not UTF-8": always(b'{"step": "\xff"}'),
    "nested": always(b"[" * DEEP + b"]" * DEEP),
    "nested objects": always(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "a number of a million digits": always(b"1" * 10**6),
    "not a number": always(b"NaN"),
    "two": lambda content: content + content,
}
DOCUMENTS = {
    **{("state_json", name): change for name, change in WRONG_JSON.items()},
    **{("random_0_json", name): change for name, change in WRONG_JSON.items()},
    **{
        ("state_json", f"{key} = {value!r:.30}"): state(**{key: value})
        for key, value in (
            ("step", "3"),
            ("step", 3.0),
            ("step", True),
            ("step", None),
            ("step", -3),
            ("step", 10**30),
            ("step", float("nan")),
            ("n_tokens_seen", -1),
            ("n_tokens_seen", 10**30),
            ("n_tokens_seen", [1]),
            ("consumed_samples", -4),
            ("consumed_samples", 10**30),
            ("consumed_samples", 2.5),
            ("validated", "no"),
            ("model_only", 1),
            ("identity", []),
            ("identity", {"data.fingerprint": 1}),
            ("schedule", None),
            ("config", "x"),
        )
    },
    ("state_json", "data that is no table"): state(identity={"data.fingerprint": 1}, config={"data": 5}),
    **{
        ("random_0_json", f"{key} = {value!r:.30}"): generators(**{key: value})
        for key, value in (
            ("python", None),
            ("python", []),
            ("python", [3, [1, 2], None]),
            ("python", ["3", [0] * 625, None]),
            ("python", [3, [0] * 624 + [10**30], None]),
            ("python", [3, [0] * 624 + [625], None]),
            ("python", [3, [-1] * 625, None]),
            ("python", [3, ["x"] * 625, None]),
            ("python", [3, [0] * 625, "x"]),
            ("numpy", None),
            ("numpy", ["MT19937"]),
            ("numpy", ["PCG64", [0] * 624, 0, 0, 0.0]),
            ("numpy", ["MT19937", [0] * 3, 0, 0, 0.0]),
            ("numpy", ["MT19937", [-1] * 624, 0, 0, 0.0]),
            ("numpy", ["MT19937", [10**30] * 624, 0, 0, 0.0]),
            ("numpy", ["MT19937", [0] * 624, 10**6, 0, 0.0]),
            ("numpy", ["MT19937", [0] * 624, "x", 0, 0.0]),
            ("torch", None),
            ("torch", ""),
            ("torch", "AAAA"),
            ("torch", "no base64 \xe4"),
            ("torch", "A" * 6744),
            ("cuda", 5),
        )
    },
}


@pytest.fixture(scope="module")
def one_step(starts: Starts, options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a single step."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert starts(options(folder, 1)).status == 0
    return folder


@pytest.fixture
def run(one_step: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(one_step, tmp_path / "run"))


def check_refused(starts: Starts, words: list[str], run: Path) -> str:
    """What the start says, which is refused without a traceback, and leaves the step where and as it is."""
    before = tree(run / "checkpoint")
    start = starts(words)
    assert start.status == 2, start
    assert "Traceback" not in start.err
    assert tree(run / "checkpoint") == before
    return start.err


def check_not_found(step: Path) -> str:
    """The error with which a start refuses the step. The step itself is not touched."""
    before = tree(step.parent)
    with pytest.raises(ConfigError) as caught:
        find(Steps(step.parent), -1, World())
    assert tree(step.parent) == before
    (line,) = str(caught.value).splitlines()
    return line


def forge_document(step: Path, file: str, name: str) -> None:
    content = (step / file.replace("_json", ".json").replace("_", "-")).read_bytes()
    forge(step, **{file: DOCUMENTS[file, name](content)})


# These are well-formed, and it takes the run's own identity to refuse them.
OF_ANOTHER_RUN = [
    ("state_json", "identity = {'data.fingerprint': 1}"),
    ("state_json", "data that is no table"),
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("file", "name"), [one for one in DOCUMENTS if one not in OF_ANOTHER_RUN])
def test_a_document_that_is_not_what_is_written_there_is_refused(step: Path, file: str, name: str) -> None:
    forge_document(step, file, name)
    assert "Error" not in check_not_found(step)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        *OF_ANOTHER_RUN,
        *((file, name) for file in ("state_json", "random_0_json") for name in ("nested", "nested objects")),
        ("random_0_json", "numpy = ['MT19937']"),
    ],
)
def test_a_real_start_refuses_such_a_document(
    starts: Starts, options: Options, run: Path, file: str, name: str
) -> None:
    forge_document(run / "checkpoint" / "step-1", file, name)
    line = check_refused(starts, options(run, 2), run).splitlines()[-1]
    assert "Error" not in line, line


MANIFESTS = [
    {"format_version": 2},
    {"format_version": "1"},
    {"format_version": None},
    {"format_version": 10**400},
    {"step": "1"},
    {"step": -1},
    {"step": None},
    {"step": [1]},
    {"files": None},
    {"files": []},
    {"files": {}},
    {"files": {"state.json": None}},
    {"files": {"state.json": {"size": 1}}},
    {"files": {"state.json": {"size": 1, "sha256": "x", "more": 1}}},
    {"files": {"../../../metrics.jsonl": {"size": 1, "sha256": "x"}}},
    {"made": None},
    {"more": 1},
]


@pytest.mark.parametrize("changes", MANIFESTS, ids=[str(changes)[:40] for changes in MANIFESTS])
def test_a_manifest_that_is_not_what_is_written_there_is_refused(step: Path, changes: dict[str, Any]) -> None:
    forged_manifest(step, **changes)
    check_not_found(step)


@pytest.mark.parametrize("changes", [{"format_version": 2}, {"files": {}}], ids=str)
def test_a_real_start_refuses_such_a_manifest(
    starts: Starts, options: Options, run: Path, changes: dict[str, Any]
) -> None:
    forged_manifest(run / "checkpoint" / "step-1", **changes)
    check_refused(starts, options(run, 2), run)


@pytest.mark.parametrize(
    "made", [{}, {"mesh": None}, {"mesh": {"ranks": "\x1b[2J\n"}}, {"mesh": {"ranks": {}}}]
)
def test_what_a_manifest_says_of_its_mesh_is_told_and_nothing_else(
    starts: Starts, options: Options, run: Path, made: dict[str, Any]
) -> None:
    forged_manifest(run / "checkpoint" / "step-1", made=made)
    start = starts(options(run, 2))
    assert start.status == 0, start
    assert "\x1b" not in start.out + start.err and "Traceback" not in start.err


def test_what_a_step_says_cannot_write_lines_of_its_own_or_to_the_terminal(
    starts: Starts, options: Options, run: Path
) -> None:
    step, evil = run / "checkpoint" / "step-1", "\x1b[2J\nall is well\n"
    content = json.loads((step / "state.json").read_bytes())
    content["config"]["optimizer"]["lr"] = content["config"][evil] = evil
    forge(step, state_json=json.dumps(content).encode())
    shutil.copytree(step, run / "checkpoint" / "step-3")
    (run / "checkpoint" / "step-3" / (evil + "\udcff")).touch()
    start = starts(options(run, 2))
    assert start.status == 0, start
    assert "\x1b" not in start.out + start.err
    assert "all is well" not in (start.out + start.err).splitlines()
    assert "changed since then: optimizer.lr = 0.0008, was \\x1b[2J\\nall is well" in start.out
    assert "is DAMAGED and is passed over: \\x1b[2J\\nall is well" in start.err


@pytest.mark.parametrize("key", ["size", "sha256"])
@pytest.mark.parametrize("value", [None, "1", [1], {"a": 1}, float("nan"), -1, 10**400, True])
def test_a_digest_of_another_type_is_refused(step: Path, key: str, value: Any) -> None:
    files = json.loads((step / "manifest.json").read_bytes())["files"]
    files["state.json"][key] = value
    forged_manifest(step, files=files)
    check_not_found(step)


@pytest.mark.parametrize("depth", [300, 900, 1500, DEEP])
def test_a_nested_manifest_is_refused(starts: Starts, options: Options, run: Path, depth: int) -> None:
    manifest = run / "checkpoint" / "step-1" / "manifest.json"
    nested = b'{"a":' * depth + b"1" + b"}" * depth
    manifest.write_bytes(manifest.read_bytes().replace(b'"made": {', b'"made": {"x": ' + nested + b", "))
    check_refused(starts, options(run, 2), run)


@pytest.mark.parametrize(
    "key",
    [b"N" + b"\x85" * 10**6, b"N" + b"N\x86" * 10**6, b"(" * 200_000 + b"t" * 200_000],
    ids=["of one", "of two", "of any"],
)
def test_a_key_whose_hash_takes_more_stack_than_there_is_ends_no_process(
    starts: Starts, options: Options, run: Path, key: bytes
) -> None:
    forge(run / "checkpoint" / "step-1", _metadata=b"\x80\x04}" + key + b"Ns.")
    assert ".metadata nests tuples" in check_refused(starts, options(run, 2), run)


def nested_keys(how: str, depth: int = 60) -> bytes:
    """An index whose key takes 2 ** depth steps to hash: each holds the one before it twice."""
    index = b"\x8c\x25torch.distributed.checkpoint.metadata\x8c\x0dMetadataIndex\x93"
    made = b"\x8c\x01x\x94"
    for number in range(depth):
        inner = b"h" + bytes([number])
        fields = b"(\x8c\x03fqn" + inner + b"\x8c\x06offset" + inner + b"\x8c\x05indexNu"
        built = index + b")\x81}" + fields + b"b" if how == "built" else index + inner + inner + b"N\x87R"
        made += built + b"\x94"
    return b"\x80\x04" + made + b"}h" + bytes([depth]) + b"Ns."


@pytest.mark.parametrize(
    ("how", "words"),
    [("built", "nests the keys of its parts"), ("called", "makes a part of it in another way")],
)
def test_keys_that_would_be_hashed_for_ever_are_refused(
    how: str, words: str, starts: Starts, options: Options, run: Path
) -> None:
    forge(run / "checkpoint" / "step-1", _metadata=nested_keys(how))
    assert f".metadata {words}" in check_refused(starts, options(run, 2), run)


def test_a_hostile_payload_is_refused_by_a_real_start(
    starts: Starts, options: Options, run: Path, tmp_path: Path
) -> None:
    step = run / "checkpoint" / "step-1"
    payload = saved(Shell(tmp_path / "marker"))
    shard = (step / SHARD).read_bytes()

    def change(metadata: Any) -> None:
        index = next(iter(metadata.storage_data))
        metadata.storage_data[index] = _StorageInfo(SHARD, len(shard), len(payload))

    forge(step, _metadata=changed_index(step, change), __0_0_distcp=shard + payload)
    line = check_refused(starts, options(run, 2), run)
    assert "is refused: __0_0.distcp holds no plain tensor" in line
    forge(step, _metadata=pickle.dumps(Shell(tmp_path / "marker")))
    assert "which no index of tensors needs" in check_refused(starts, options(run, 2), run)
    assert not (tmp_path / "marker").exists()


def test_the_index_that_is_written_passes(step: Path) -> None:
    index = read_index(step, read_manifest(step))
    assert {name: (x.shape, x.dtype) for name, x in SMALL.items()} == {
        name: (stored.shape, stored.dtype) for name, stored in index.items()
    }
    assert os.listdir(step)
