"""A step that an attacker wrote, with hashes that fit, is refused; nothing in it is run or believed."""

import ast
import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import Starts, forge, forged_manifest, publish, tree

import torchtitan_lite
from torchtitan_lite.checkpoint.manifest import Damaged
from torchtitan_lite.checkpoint.restore import find_step, verify
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.launch.world import World

W, FILE = "model.w", "tensors-0.safetensors"
DEEP = 100_000
Options = Callable[..., list[str]]


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A step with the tensors of `SMALL`, of which `W` is [4, 3] in float32."""
    return publish(tmp_path / "checkpoint", 5)


def refusal(step: Path) -> str:
    """Return why the step is refused. The step itself must not be touched."""
    before = tree(step.parent)
    with pytest.raises(Damaged) as caught:
        verify(step, World())
    assert tree(step.parent) == before
    return str(caught.value)


# --- no pickle ---


def test_the_package_neither_pickles_nor_unpickles() -> None:
    package = Path(torchtitan_lite.__file__).parent
    found = {
        str(path.relative_to(package)): names
        for path in package.rglob("*.py")
        if (names := pickling(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def pickling(source: str) -> set[str]:
    """Return the names of pickle, of modules like it, and of functions of torch that pickle."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    modules = (
        "pickle",
        "_pickle",
        "dill",
        "cloudpickle",
        "shelve",
        "marshal",
        "torch.distributed.checkpoint",
    )
    return {
        name
        for name in names
        if name in ("torch.load", "torch.save") or any(f"{name}.".startswith(f"{x}.") for x in modules)
    }


@pytest.mark.parametrize(
    "line",
    [
        "import pickle as p",
        "from pickle import loads",
        "torch.load(x)",
        "from torch import save",
        "pickle.load",
    ],
)
def test_a_line_that_pickles_is_found(line: str) -> None:
    assert pickling(line)


# --- index.json ---


def tensor(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index[W].update(changes)


def chunk(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda index: index[W]["chunks"][0].update(changes)


def rows(*parts: tuple[int, int]) -> Callable[[dict[str, Any]], object]:
    """Say that the tensor is in chunks of whole rows, from-to."""

    def change(index: dict[str, Any]) -> None:
        (first,) = index[W]["chunks"]
        index[W]["chunks"] = [
            {**first, "offsets": [start, 0], "sizes": [stop - start, 3]} for start, stop in parts
        ]

    return change


def renamed(index: dict[str, Any]) -> None:
    index["model.v"] = index.pop(W)


def without(index: dict[str, Any]) -> None:
    del index[W]


NO_INDEX, NOT_WHOLE, NOT_THERE, OTHER_FILE, TWICE = (
    "index.json is no index of tensors (",
    f"index.json does not have all of {W}",
    f"index.json places {W} where {FILE} does not have it",
    "index.json says of ",
    f"index.json has two chunks of {W} in {FILE}",
)
INDEXES = {
    "unknown dtype": (tensor(dtype="float32"), NO_INDEX),
    "dtype that is no text": (tensor(dtype=["F32"]), NO_INDEX),
    "shape with a fraction": (tensor(shape=[4.0, 3]), NO_INDEX),
    "shape below nothing": (tensor(shape=[-4, -3]), NO_INDEX),
    "shape without end": (tensor(shape=[2**63, 3]), NO_INDEX),
    "shape with too many dims": (tensor(shape=[1] * 65), NO_INDEX),
    "chunks that are none": (tensor(chunks=[1]), NO_INDEX),
    "chunks missing": (tensor(chunks=None), NO_INDEX),
    "no chunk": (tensor(chunks=[]), NOT_WHOLE),
    "shape of more rows": (tensor(shape=[5, 3]), NOT_WHOLE),
    "shape transposed": (tensor(shape=[3, 4]), NOT_WHOLE),
    "shape with an overflowing product": (tensor(shape=[2**32, 2**32]), NOT_WHOLE),
    "chunk below": (chunk(offsets=[1, 0]), NOT_WHOLE),
    "chunk too large": (chunk(sizes=[5, 3]), NOT_WHOLE),
    "chunk without rows": (chunk(sizes=[0, 3]), NOT_WHOLE),
    "chunk with other dims": (chunk(offsets=[0, 0, 0], sizes=[4, 3, 1]), NOT_WHOLE),
    "gap": (rows((0, 2), (3, 4)), NOT_WHOLE),
    "overlap": (rows((0, 3), (2, 4)), NOT_WHOLE),
    "overlap as large as a gap": (rows((0, 2), (1, 3)), NOT_WHOLE),
    "chunk twice": (rows((0, 4), (0, 4)), NOT_WHOLE),
    "two chunks in one file": (rows((0, 2), (2, 4)), TWICE),
    "path to above": (chunk(file="../x"), OTHER_FILE),
    "absolute path": (chunk(file="/etc/passwd"), OTHER_FILE),
    "a document": (chunk(file="state.json"), OTHER_FILE),
    "another dtype": (tensor(dtype="F64"), OTHER_FILE),
    "tensor missing": (without, OTHER_FILE),
    "range before the tensor": (chunk(start=0), NOT_THERE),
    "range in the header": (chunk(start=0, stop=48), NOT_THERE),
    "range beyond the file": (chunk(stop=2**62), NOT_THERE),
    "dtype of the same width": (tensor(dtype="I32"), f"{FILE} has another header"),
    "another name": (renamed, f"{FILE} has another header"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_is_not_true_of_the_files_is_refused(step: Path, name: str) -> None:
    change, words = INDEXES[name]
    index = json.loads((step / "index.json").read_bytes())
    change(index)
    forge(step, "index.json", json.dumps(index).encode())
    assert refusal(step).startswith(words)


# --- the header of a file of tensors ---


def header(**changes: Any) -> Callable[[bytes], bytes]:
    """Change what the header says of `W`, in as many bytes."""

    def change(text: bytes) -> bytes:
        entries = json.loads(text)
        entries[W].update(changes)
        return json.dumps(entries, separators=(",", ":")).encode().ljust(len(text))

    return change


HEADERS = {
    "another name": lambda text: text.replace(b"model.w", b"model.v"),
    "another dtype": header(dtype="I32"),
    "another shape": header(shape=[3, 4]),
    "huge shape": header(shape=[2**62]),
    "tensors that overlap": header(data_offsets=[4, 52]),
    "tensor beyond the file": header(data_offsets=[0, 2**62]),
    "tensor twice": lambda text: text.replace(b"model.norm", b"model.w   "),
    "nested": lambda text: b"[" * len(text),
    "no JSON": lambda text: bytes(len(text)),
}
LENGTHS = (0, 7, 2**16, 2**31, 2**63, 2**64 - 1)


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_differs_from_the_index_is_refused(step: Path, name: str) -> None:
    content = (step / FILE).read_bytes()
    n = 8 + int.from_bytes(content[:8], "little")
    text = HEADERS[name](content[8:n])
    assert text != content[8:n]
    forge(step, FILE, content[:8] + text + content[n:])
    assert refusal(step).startswith((f"{FILE} has another header", f"index.json says of {FILE}"))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_header_with_another_length_is_refused(step: Path, length: int) -> None:
    forge(step, FILE, struct.pack("<Q", length) + (step / FILE).read_bytes()[8:])
    assert refusal(step).startswith(f"{FILE} has another header")


@pytest.mark.parametrize("content", [b"", b"x", bytes(1000)])
def test_a_file_with_no_tensors_is_refused(step: Path, content: bytes) -> None:
    forge(step, FILE, content)
    assert refusal(step).startswith(f"index.json says of {FILE} what the manifest does not")


def test_a_file_that_the_index_does_not_name_is_refused(step: Path) -> None:
    forge(step, "tensors-1.safetensors", (step / FILE).read_bytes())
    assert refusal(step) == "index.json names no tensor in tensors-1.safetensors"


def test_large_numbers_take_no_memory(step: Path) -> None:
    index = json.loads((step / "index.json").read_bytes())
    huge = 2**40
    index[W].update(shape=[huge, huge], chunks=[{**index[W]["chunks"][0], "sizes": [huge, huge]}])
    forge(step, "index.json", json.dumps(index).encode())
    tracemalloc.start()
    try:
        refusal(step)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20


# --- JSON ---

WRONG_JSON = {
    "no bytes": b"",
    "half of it": b'{"step": 5',
    "no object": b"[]",
    "other keys": b'{"a": 1}',
    "not UTF-8": b'{"step": "\xff"}',
    "nested lists": b"[" * DEEP + b"]" * DEEP,
    "nested objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "a number with a million digits": b"1" * 10**6,
}


@pytest.mark.parametrize("file", ["state.json", "index.json"])
@pytest.mark.parametrize("name", WRONG_JSON)
def test_other_json_is_refused(step: Path, file: str, name: str) -> None:
    forge(step, file, WRONG_JSON[name])
    assert refusal(step).startswith(f"{file} is no ")


STATES = [
    ("step", "5"),
    ("step", True),
    ("step", -3),
    ("step", 10**30),
    ("n_tokens_seen", -1),
    ("consumed_samples", 2.5),
    ("validated", "no"),
    ("model_only", 1),
    ("identity", []),
    ("schedule", None),
    ("config", "x"),
]


@pytest.mark.parametrize(("key", "value"), STATES)
def test_a_state_with_a_wrong_value_is_refused(step: Path, key: str, value: Any) -> None:
    state = {**json.loads((step / "state.json").read_bytes()), key: value}
    forge(step, "state.json", json.dumps(state).encode())
    assert refusal(step) == "state.json is no state of a run (1 values are wrong)"


MANIFESTS: list[dict[str, Any]] = [
    {"format_version": 2},
    {"format_version": None},
    {"format_version": 10**400},
    {"step": "1"},
    {"step": -1},
    {"files": None},
    {"files": {}},
    {"files": {"state.json": {"size": "1", "sha256": "x"}}},
    {"files": {"state.json": {"size": 1, "sha256": "x", "more": 1}}},
    {"files": {"../../../metrics.jsonl": {"size": 1, "sha256": "x"}}},
    {"made": None},
    {"more": 1},
]


@pytest.mark.parametrize("changes", MANIFESTS, ids=[str(changes)[:60] for changes in MANIFESTS])
def test_a_manifest_with_a_wrong_value_is_refused(step: Path, changes: dict[str, Any]) -> None:
    forged_manifest(step, **changes)
    before = tree(step.parent)
    with pytest.raises(ConfigError):
        find_step(Steps(step.parent), -1, World())
    assert tree(step.parent) == before


# --- real starts ---


@pytest.fixture(scope="module")
def one_step(starts: Starts, options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a single step."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert starts(options(folder, 1)).status == 0
    return folder


@pytest.fixture
def run(one_step: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(one_step, tmp_path / "run"))


def harm_header(step: Path) -> None:
    forge(step, FILE, struct.pack("<Q", 2**63) + (step / FILE).read_bytes()[8:])


def harm_index(step: Path) -> None:
    forge(step, "index.json", WRONG_JSON["nested objects"])


def harm_state(step: Path) -> None:
    state = json.loads((step / "state.json").read_bytes())
    state |= {"identity": {"data.fingerprint": 1}, "config": {"data": 5, "optimizer": 5}}
    forge(step, "state.json", json.dumps(state).encode())


def harm_manifest(step: Path) -> None:
    nested = b'{"a":' * DEEP + b"1" + b"}" * DEEP
    text = (step / "manifest.json").read_bytes()
    (step / "manifest.json").write_bytes(text.replace(b'"made": {', b'"made": {"x": ' + nested + b", "))


@pytest.mark.parametrize("harm", [harm_header, harm_index, harm_state, harm_manifest])
def test_a_start_refuses_a_hostile_step_in_a_line(
    starts: Starts, options: Options, run: Path, harm: Callable[[Path], None]
) -> None:
    harm(run / "checkpoint" / "step-1")
    before = tree(run / "checkpoint")
    start = starts(options(run, 2))
    assert start.status == 2, start
    assert "Traceback" not in start.err and "Error" not in start.err.splitlines()[-1]
    assert tree(run / "checkpoint") == before


def test_a_step_cannot_write_lines_of_its_own_or_to_the_terminal(
    starts: Starts, options: Options, run: Path
) -> None:
    step, evil = run / "checkpoint" / "step-1", "\x1b[2J\nall is well\n"
    content = json.loads((step / "state.json").read_bytes())
    content["config"]["optimizer"]["lr"] = content["config"][evil] = evil
    forge(step, "state.json", json.dumps(content).encode())
    forged_manifest(step, made={"mesh": {"ranks": evil}})
    shutil.copytree(step, run / "checkpoint" / "step-3")
    (run / "checkpoint" / "step-3" / (evil + "\udcff")).touch()
    start = starts(options(run, 2))
    assert start.status == 0, start
    assert "\x1b" not in start.out + start.err
    assert "all is well" not in (start.out + start.err).splitlines()
    assert r'changed since then: optimizer.lr = 0.0008, was "\u001b[2J\nall is well\n"' in start.out
    assert "is DAMAGED and is passed over: \\x1b[2J\\nall is well" in start.err
