"""Tensors that some ranks write in pieces are, bit by bit, what any other number of ranks reads."""

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoint_cases import (
    SMALL,
    TENSORS,
    differing_reads,
    digests_of_a_write,
    left_after_a_failure,
    no_space,
    probe_folders,
    publish,
    save_without_space,
    whole,
    write_layouts,
)
from ranks import RanksOf
from safetensors import safe_open

from torchtitan_lite.checkpoint.restore import find_step, load, verify
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.checkpoint.tensors import Piece, Stored, differences, read_tensors, write_tensors
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.launch.world import World

LAYOUTS = ["rows", "columns", "grid"]


@pytest.fixture(scope="module", params=[1, 2, 4])
def written(request: pytest.FixtureRequest, ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a step for each layout, which some number of ranks has written."""
    folder = tmp_path_factory.mktemp("written")
    ranks(request.param).run(write_layouts, folder, LAYOUTS)
    return folder


@pytest.mark.parametrize("n_readers", [1, 2, 4])
def test_what_some_ranks_write_others_read_bit_by_bit(ranks: RanksOf, written: Path, n_readers: int) -> None:
    for step in range(len(LAYOUTS)):
        for layout in LAYOUTS:
            assert ranks(n_readers).run(differing_reads, written, step, layout) == [[]] * n_readers


def test_any_reader_of_safetensors_opens_the_files_of_a_step(written: Path) -> None:
    for step in map(Steps(written).path, range(len(LAYOUTS))):
        verify(step, World())
        found = {name: torch.zeros_like(x) for name, x in TENSORS.items()}
        index = json.loads((step / "index.json").read_text())
        for path in step.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping, though it has keys
                    (chunk,) = (chunk for chunk in index[name]["chunks"] if chunk["file"] == path.name)
                    corner = zip(chunk["offsets"], chunk["sizes"], strict=True)
                    place = tuple(slice(start, start + n) for start, n in corner)
                    found[name][place] = file.get_tensor(name)
        for name, tensor in TENSORS.items():
            assert torch.equal(found[name], tensor), name


def test_what_all_ranks_hold_is_written_once_and_evenly(ranks: RanksOf, tmp_path: Path) -> None:
    ranks(2).run(digests_of_a_write, tmp_path, "whole")
    names, n_bytes = [], []
    for rank in range(2):
        with safe_open(tmp_path / f"tensors-{rank}.safetensors", framework="pt") as file:
            tensors = [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
        names += [name for name, _ in tensors]
        n_bytes.append(sum(x.nbytes for _, x in tensors))
    assert sorted(names) == sorted(TENSORS)
    # The largest is as large as all others together.
    assert sorted(n_bytes) == [151, 280]


def test_a_rank_without_anything_to_write_writes_no_file(ranks: RanksOf, tmp_path: Path) -> None:
    ranks(4).run(write_layouts, tmp_path, ["rows"])
    assert len(list(Steps(tmp_path).path(0).glob("*.safetensors"))) == 4
    ranks(4).run(digests_of_a_write, tmp_path, "whole")
    assert sum(1 for _ in tmp_path.glob("*.safetensors")) == 4


def zeros() -> dict[str, Piece]:
    return whole({name: torch.zeros_like(x) for name, x in SMALL.items()})


def test_bits_that_numbers_do_not_show_survive(tmp_path: Path) -> None:
    bits = torch.tensor([0, 1, 2**31, 0x7F800001, 0x7FC00000, 0xFFC12345], dtype=torch.uint32)
    odd = {"model.x": bits.view(torch.float32), "model.y": torch.tensor([-0.0, float("inf")]).bfloat16()}
    step = publish(tmp_path, 1, pieces=whole(odd))
    read = whole({name: torch.zeros_like(x) for name, x in odd.items()})
    load(verify(step, World()), read, World())
    assert read["model.x"].local.view(torch.int32).tolist() == bits.view(torch.int32).tolist()
    assert torch.equal(read["model.y"].local.view(torch.int16), odd["model.y"].view(torch.int16))


def test_a_piece_that_is_not_contiguous_is_written_and_read(tmp_path: Path) -> None:
    x = torch.arange(12.0).view(3, 4)
    step = publish(tmp_path, 1, pieces=whole({"model.x": x.T}))
    into = torch.zeros(3, 8)[:, ::2].T
    load(verify(step, World()), whole({"model.x": into}), World())
    assert torch.equal(into, x.T)


def test_a_parameter_is_read_in_place(tmp_path: Path) -> None:
    step = publish(tmp_path, 1)
    weight = torch.nn.Parameter(torch.zeros(4, 3))
    load(verify(step, World()), {**zeros(), **whole({"model.w": weight})}, World())
    assert torch.equal(weight, SMALL["model.w"]) and weight.requires_grad


def test_the_weights_alone_can_be_read_from_a_whole_step(tmp_path: Path) -> None:
    found = verify(publish(tmp_path, 1), World())
    model = {name: piece for name, piece in zeros().items() if name.startswith("model.")}
    load(found, model, World())
    assert all(torch.equal(piece.local, SMALL[name]) for name, piece in model.items())


@pytest.mark.parametrize(
    ("shape", "cut", "most_mib"),
    [
        ((2**12, 2**12), (slice(None), slice(None)), 4),
        ((2**12, 2**12), (slice(1000, 3000), slice(None)), 4),
        ((2**12, 2**12), (slice(None), slice(0, 2**11)), 20),
        ((1, 2**12, 2**12), (slice(None), slice(0, 2**11), slice(None)), 68),
    ],
    ids=["whole", "rows", "columns", "part of a row"],
)
def test_a_load_takes_little_memory_beyond_the_tensors(
    tmp_path: Path, shape: tuple[int, ...], cut: tuple[slice, ...], most_mib: float
) -> None:
    """At most a block of 16 MiB or a row: never more than the chunk, of 64 MiB here."""
    x = torch.arange(2**24, dtype=torch.float32).view(shape)
    found = verify(publish(tmp_path, 1, pieces=whole({"model.x": x})), World())
    into = torch.full(x[cut].shape, -1.0)
    piece = Piece(local=into, shape=x.shape, offsets=torch.Size(part.start or 0 for part in cut))
    read_tensors(found.folder, {"model.x": piece}, found.index)  # what is imported or kept for good
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    read_tensors(found.folder, {"model.x": piece}, found.index)
    assert memory("VmHWM") - before < most_mib
    assert torch.equal(into, x[cut])


def memory(key: str) -> float:
    """Return memory of this process in MiB: now (VmRSS), or the most since clear_refs was written (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def test_what_differs_is_told_in_a_line_each() -> None:
    def stored(dtype: torch.dtype, *shape: int) -> Stored:
        return Stored(dtype=dtype, shape=shape, chunks=[])

    pieces = whole({"a": torch.zeros(2), "b": torch.zeros(2, 3), "c": torch.zeros(2), "same": torch.zeros(1)})
    index = {
        "b": stored(torch.float32, 3, 2),
        "c": stored(torch.bfloat16, 2),
        "d": stored(torch.float32, 1),
        "same": stored(torch.float32, 1),
    }
    assert differences(pieces, index) == [
        "a is not in the checkpoint",
        "b is [2, 3] here and [3, 2] in the checkpoint",
        "c is torch.float32 here and torch.bfloat16 in the checkpoint",
        "d is in the checkpoint alone",
    ]


def test_a_step_of_other_tensors_is_refused_and_nothing_is_read(tmp_path: Path) -> None:
    found = verify(publish(tmp_path, 1), World())
    others = {
        "model.w": torch.zeros(3, 4),
        "model.norm": torch.zeros(5),
        "optimizer.w.step": torch.tensor(1.0),
    }
    with pytest.raises(ConfigError) as caught:
        load(found, whole(others), World())
    assert str(caught.value) == (
        f'checkpoint.folder = "{tmp_path}/step-1" does not fit: '
        "model.norm is torch.float32 here and torch.bfloat16 in the checkpoint, "
        "model.w is [3, 4] here and [4, 3] in the checkpoint: "
        "use what it was saved from, in float32"
    )
    assert all(not x.any() for name, x in others.items() if name.startswith("model."))


def test_every_file_is_on_the_disk_whole_before_its_step_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, int] = {}
    sync, rename = os.fsync, Path.rename

    def noted(descriptor: int) -> None:
        sizes[Path(os.readlink(f"/proc/self/fd/{descriptor}")).name] = os.fstat(descriptor).st_size
        sync(descriptor)

    def checked(path: Path, target: Path) -> Path:
        if target.name == "step-1":
            found = {file.name: file.stat().st_size for file in path.iterdir()}
            assert found == {name: sizes[name] for name in found} and len(found) == 4
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", checked)
    publish(tmp_path, 1)
    assert Steps(tmp_path).published() == [1]


# --- no space ---


@pytest.mark.parametrize("n", [100, 10_000, 5_000_000])
def test_a_write_that_fails_raises_what_the_system_said(tmp_path: Path, n: int) -> None:
    pieces = whole({"model.x": torch.rand(n), "model.y": torch.rand(n + 400)})
    with no_space(), pytest.raises(OSError, match="File too large"):
        write_tensors(tmp_path, pieces, World())


@pytest.mark.parametrize("full", [[0], [1], [0, 1]])
@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.parametrize("on_failure", ["stop", "continue"])
def test_a_rank_without_space_fails_the_save_on_all_and_leaves_nothing(
    ranks: RanksOf, tmp_path: Path, full: list[int], mode: str, on_failure: str
) -> None:
    told = ranks(2).run(save_without_space, tmp_path, full, mode, on_failure)
    for rank, said in enumerate(told):
        assert (said[0], said[2]) == ("saved 1", "saved 3")
        if on_failure == "continue":
            assert said[1] == "saved 1"
        else:
            first = rank if rank in full else full[0]
            assert said[1].startswith("step 2 could not be saved (") and "File too large" in said[1]
            assert (f"rank {first}: " in said[1]) == (rank not in full)
            assert said[1].endswith("; step 1 is the newest that was")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1", "step-3"]
    found = find_step(Steps(tmp_path), -1, World())
    assert found is not None and found.state.step == 3


def test_all_ranks_wait_until_what_failed_is_removed(ranks: RanksOf, tmp_path: Path) -> None:
    assert ranks(2).run(left_after_a_failure, tmp_path) == [[], []]


def test_ranks_that_do_not_see_one_folder_are_told_before_the_run(ranks: RanksOf, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "1").mkdir()
    refusals = ranks(2).run(probe_folders, [tmp_path / "0", tmp_path / "0"])
    assert refusals == ["", ""] and list(Steps(tmp_path / "0" / "checkpoint").folder.iterdir()) == []
    for refusal in ranks(2).run(probe_folders, [tmp_path / "0", tmp_path / "1"]):
        assert (
            refusal.startswith(f'job.dump_folder = "{tmp_path}/') and "No such file or directory" in refusal
        )
        assert "cannot hold what all ranks write and read (" in refusal
    assert list((tmp_path / "0" / "checkpoint").iterdir()) == list((tmp_path / "1").iterdir()) == []
