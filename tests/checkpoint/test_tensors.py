"""Tensors written in pieces by some ranks are, bit by bit, what any other number of ranks reads."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_cases import (
    SMALL,
    TENSORS,
    Starts,
    box,
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

from torchtitan_lite.checkpoint.files import _BLOCK, HashedFiles
from torchtitan_lite.checkpoint.manifest import Digest, read_manifest
from torchtitan_lite.checkpoint.restore import find, load, verify
from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.checkpoint.tensors import (
    Chunk,
    Piece,
    Stored,
    differences,
    read_index,
    read_tensors,
    write_tensors,
)
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.launch.world import World

LAYOUTS = ["rows", "columns", "grid"]


@pytest.fixture(scope="module", params=[1, 2, 4])
def written(request: pytest.FixtureRequest, ranks: RanksOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a step for each layout, which some number of ranks has written."""
    folder = tmp_path_factory.mktemp("written")
    ranks(request.param).run(write_layouts, folder, LAYOUTS)
    return folder


@pytest.mark.parametrize("n_readers", [1, 2, 4])
def test_what_some_ranks_write_others_read_bit_by_bit(ranks: RanksOf, written: Path, n_readers: int) -> None:
    for step in range(len(LAYOUTS)):
        for layout in LAYOUTS:
            assert ranks(n_readers).run(differing_reads, written, step, layout) == [[]] * n_readers


def test_the_boxes_are_uneven_and_some_are_empty() -> None:
    """Else the test above would say little."""
    lengths = {
        layout: [box(TENSORS["model.rows"], rank, 4, layout).local.shape for rank in range(4)]
        for layout in LAYOUTS
    }
    assert lengths["rows"] == [(2, 5), (2, 5), (2, 5), (1, 5)]
    assert lengths["columns"] == [(7, 2), (7, 2), (7, 1), (7, 0)]
    assert lengths["grid"] == [(4, 3), (4, 2), (3, 3), (3, 2)]
    few = [box(TENSORS["model.few"], rank, 4, "rows") for rank in range(4)]
    assert [piece.local.shape[0] for piece in few] == [1, 1, 0, 0]


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_torch_s_own_load_reads_a_step(written: Path) -> None:
    for step in range(len(LAYOUTS)):
        read = {name: torch.zeros_like(x) for name, x in TENSORS.items()}
        dcp.load(  # pyright: ignore[reportPrivateImportUsage]
            read, checkpoint_id=Steps(written).path(step), no_dist=True
        )
        for name, tensor in TENSORS.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_a_written_step_is_good_for_one_reader(written: Path) -> None:
    assert [verify(Steps(written).path(step), World()).state.step for step in range(3)] == [0, 1, 2]


def test_the_digests_are_those_of_the_files(ranks: RanksOf, tmp_path: Path) -> None:
    digests: dict[str, Digest] = {}
    for of_rank in ranks(2).run(digests_of_a_write, tmp_path):
        assert not digests.keys() & of_rank.keys()
        digests |= of_rank
    assert sorted(digests) == sorted(path.name for path in tmp_path.iterdir())
    assert {".metadata", "__0_0.distcp", "__1_0.distcp"} == digests.keys()
    for name, digest in digests.items():
        content = (tmp_path / name).read_bytes()
        assert digest == Digest(len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("n_bytes", [0, 1, _BLOCK - 1, _BLOCK, _BLOCK + 1, 3 * _BLOCK, 40 * _BLOCK + 7])
def test_a_file_is_hashed_as_it_is_written_however_large_the_pieces(tmp_path: Path, n_bytes: int) -> None:
    content = (bytes(range(251)) * (n_bytes // 251 + 1))[:n_bytes]
    files = HashedFiles()
    with files.create_stream(tmp_path / "x", "wb") as stream:
        stream.write(content[: n_bytes // 3])
        stream.write(memoryview(content)[n_bytes // 3 :])
        assert stream.tell() == n_bytes
    assert (tmp_path / "x").read_bytes() == content
    assert files.digests == {"x": Digest(n_bytes, hashlib.sha256(content).hexdigest())}


def test_a_stream_may_outlive_its_file(tmp_path: Path) -> None:
    """Python closes the stream, and so flushes it, when it deletes the object; 3.13 prints an error there."""
    with HashedFiles().create_stream(tmp_path / "x", "wb") as stream:
        stream.write(b"text")
    stream.close()
    assert (tmp_path / "x").read_bytes() == b"text"


def test_a_renamed_file_takes_its_digest_with_it(tmp_path: Path) -> None:
    files = HashedFiles()
    files.write_json(tmp_path / "a", {"x": 1})
    (digest,) = files.digests.values()
    files.rename(tmp_path / "a", tmp_path / "b")
    assert files.digests == {"b": digest} and (tmp_path / "b").exists()


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
    pieces = whole({**{name: torch.zeros_like(x) for name, x in SMALL.items()}, "model.w": weight})
    load(verify(step, World()), pieces, World())
    assert torch.equal(weight, SMALL["model.w"]) and weight.requires_grad


def test_only_chunks_that_a_piece_lies_in_are_read(written: Path, tmp_path: Path) -> None:
    step = Path(shutil.copytree(Steps(written).path(0), tmp_path / "step-0"))
    index = read_index(step, read_manifest(step))
    corner = {
        "model.rows": Piece(
            local=torch.zeros(1, 2).double(), shape=torch.Size([7, 5]), offsets=torch.Size([6, 3])
        )
    }
    for name, stored in index.items():
        for chunk in stored.chunks:
            if name != "model.rows" or chunk.offsets[0] + chunk.sizes[0] < 7:
                with (step / chunk.file).open("r+b") as stream:  # whoever reads it is told that it is none
                    stream.seek(chunk.start)
                    stream.write(bytes(chunk.n_bytes))
    read_tensors(step, corner, index)
    assert torch.equal(corner["model.rows"].local, TENSORS["model.rows"][6:, 3:])


def test_what_differs_is_told_in_a_line_each() -> None:
    def stored(dtype: torch.dtype, *shape: int) -> Stored:
        return Stored(dtype=dtype, shape=torch.Size(shape), chunks=[])

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


def test_the_weights_alone_can_be_read_from_a_whole_step(tmp_path: Path) -> None:
    found = verify(publish(tmp_path, 1), World())
    model = whole({name: torch.zeros_like(x) for name, x in SMALL.items() if name.startswith("model.")})
    load(found, model, World())
    assert all(torch.equal(piece.local, SMALL[name]) for name, piece in model.items())


def test_a_chunk_is_a_place_in_a_file(tmp_path: Path) -> None:
    step = publish(tmp_path, 1)
    (chunk,) = read_index(step, read_manifest(step))["model.w"].chunks
    assert isinstance(chunk, Chunk)
    assert (chunk.file, chunk.offsets, chunk.sizes) == ("__0_0.distcp", (0, 0), (4, 3))
    content = (step / chunk.file).read_bytes()[chunk.start : chunk.start + chunk.n_bytes]
    assert content.startswith(b"PK")


# --- no space ---


@pytest.mark.parametrize("n", [100, 10_000, 5_000_000])
def test_a_write_that_fails_raises_what_the_system_said(tmp_path: Path, n: int) -> None:
    pieces = whole({"model.x": torch.rand(n), "model.y": torch.rand(n + 400)})
    with no_space(), pytest.raises(OSError, match="File too large"):
        write_tensors(tmp_path, pieces, HashedFiles(), World())


def test_a_step_without_space_leaves_nothing_and_the_one_before(tmp_path: Path) -> None:
    pieces = whole({"model.x": torch.rand(100)})
    with no_space(), pytest.raises(OSError, match="File too large"):
        publish(tmp_path, 1, pieces=pieces)
    assert list(tmp_path.iterdir()) == []


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
    found = find(Steps(tmp_path), -1, World())
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


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_run_without_space_ends_with_a_line_and_goes_on_later(
    starts: Starts, options: Any, run_folder: Path, mode: str
) -> None:
    words = options(run_folder, 6, checkpoint__async_mode=mode)
    fault = {"armed_by": "torchtitan_lite.checkpoint.save.write_step", "fsize": 300_000}
    start = starts(words, fault)
    assert start.status == 1 and "Traceback" not in start.err
    line = "error: step 4 could not be saved ([Errno 27] File too large); step 3 is the newest that was"
    assert start.err.splitlines()[-1] == line
    assert sorted(path.name for path in (run_folder / "checkpoint").iterdir()) == [
        "latest",
        "step-2",
        "step-3",
    ]
    start = starts(words)
    assert start.status == 0 and "goes on from step 3 in " in start.out


def test_all_bytes_of_a_file_are_there_when_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes: dict[str, int] = {}
    sync = os.fsync

    def noted(descriptor: int) -> None:
        sizes[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    files = HashedFiles()
    x = torch.arange(5.0)
    write_tensors(tmp_path, {"x": Piece(local=x, shape=x.shape, offsets=torch.Size([0]))}, files, World())
    assert sizes[str(tmp_path / ".metadata.tmp")] == (tmp_path / ".metadata").stat().st_size
    assert sizes[str(tmp_path / "__0_0.distcp")] == (tmp_path / "__0_0.distcp").stat().st_size
