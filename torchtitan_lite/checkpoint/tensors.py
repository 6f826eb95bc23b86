"""Tensors in torch's distributed checkpoint format, in pieces that any number of ranks can read.

The shards and their index (`.metadata`) are what torch.distributed.checkpoint writes, and its `load` reads
them. Here the index is read with an unpickler that knows a dozen classes and no others, and the tensors with
torch's own for weights: neither runs what a file says.
"""

import io
import operator
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from torchtitan_lite.checkpoint.files import HashedFiles, without_checksums
from torchtitan_lite.checkpoint.manifest import Damaged, Manifest, Unreadable, reading
from torchtitan_lite.launch.world import World

INDEX = ".metadata"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A rank's part of a tensor: a box of it."""

    local: Tensor
    shape: torch.Size
    """Of the whole tensor."""
    offsets: torch.Size
    """Where the part starts in the whole, in each dim."""


def write_tensors(folder: Path, pieces: Mapping[str, Piece], files: HashedFiles, ranks: World) -> None:
    """Write the pieces of all ranks into `folder`, each of them once, on the disk when this returns.

    Raises what a rank met with, as OnAnotherRank on the others.
    """
    # Nothing is copied ahead on a stream of a GPU's own: a copy in host memory needs no GPU.
    planner, writer = _Planner(), _Writer(folder, per_thread_copy_ahead=0)
    writer.fs = files
    planner.set_up_planner(dict(pieces), is_coordinator=ranks.is_first)
    writer.set_up_storage_writer(ranks.is_first, rank=ranks.rank, use_collectives=True)
    own = ranks.together(lambda: writer.prepare_local_plan(planner.create_local_plan()))
    # Every rank makes the same plan of all plans: nothing to hand out.
    plans, metadata = planner.create_global_plan(ranks.gather(own))
    plan = writer.prepare_global_plan(plans)[ranks.rank]
    with without_checksums():
        results = ranks.gather(
            ranks.together(lambda: writer.write_data(planner.finish_plan(plan), planner).wait())
        )
    ranks.together(lambda: writer.finish(metadata, results) if ranks.is_first else None)


class _Planner(DefaultSavePlanner):
    """Plans pieces, whose boxes are known, where torch's own plans DTensors."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(
            [_write_item(name, piece) for name, piece in self.state_dict.items() if _holds(piece)]
        )
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local.detach()


def _holds(piece: Piece) -> bool:
    """Whether there is something in the piece: where ranks are more than rows, some have none."""
    return piece.local.numel() > 0


def _write_item(name: str, piece: Piece) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name, piece.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=piece.offsets, sizes=piece.local.shape),
            properties=TensorProperties(dtype=piece.local.dtype),
            size=piece.shape,
        ),
    )


class _Writer(FileSystemWriter):
    """Leaves the folder's name out of the index: that name is a passing one."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        # The first rank has made the folder, which is new. torch would make it on every rank, also where a
        # machine does not see that one, and look for an index, which some clients of NFS then miss for long.
        return plan

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A box of a tensor, and where its bytes are."""

    offsets: torch.Size
    sizes: torch.Size
    file: str
    start: int
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a checkpoint."""

    dtype: torch.dtype
    shape: torch.Size
    chunks: list[Chunk]


def read_index(folder: Path, manifest: Manifest) -> dict[str, Stored]:
    """Which tensors there are, and where; raises Damaged for anything else than tensors in listed files."""
    with reading(INDEX):
        content = (folder / INDEX).read_bytes()
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
        return {name: _stored(name, metadata, manifest) for name in metadata.state_dict_metadata}
    except Damaged as error:
        raise Damaged(f"{INDEX} {error}") from None
    except MemoryError:
        raise Unreadable(f"{INDEX} cannot be read (no memory)") from None
    except Exception as error:  # noqa: BLE001 - a pickle can fail in any way, and it is then no index
        raise Damaged(f"{INDEX} is no index of tensors ({type(error).__name__}: {error})") from None


def _stored(name: str, metadata: Metadata, manifest: Manifest) -> Stored:
    tensor = metadata.state_dict_metadata[name]
    if type(name) is not str or type(tensor) is not TensorStorageMetadata:
        raise Damaged(f"holds {name!r}, which is no tensor")
    dtype, shape = tensor.properties.dtype, torch.Size(tensor.size)
    if not isinstance(dtype, torch.dtype):
        raise Damaged(f"has no dtype for {name}")
    places = metadata.storage_data
    chunks = [
        _chunk(name, chunk, places[MetadataIndex(name, chunk.offsets)], manifest) for chunk in tensor.chunks
    ]
    boxes = [
        tuple((start, start + n) for start, n in zip(chunk.offsets, chunk.sizes, strict=True))
        for chunk in chunks
    ]
    if not all(0 <= a < b <= n for box in boxes for (a, b), n in zip(box, shape, strict=True)):
        raise Damaged(f"has a part of {name} that is outside of it")
    if not _are_all_of(boxes, shape):
        raise Damaged(f"does not have all of {name}, and each part once")
    return Stored(dtype=dtype, shape=shape, chunks=chunks)


def _chunk(name: str, chunk: ChunkStorageMetadata, place: _StorageInfo, manifest: Manifest) -> Chunk:
    digest = manifest.files.get(place.relative_path)
    start, n_bytes = operator.index(place.offset), operator.index(place.length)
    if digest is None or not 0 <= start <= start + n_bytes <= digest.size:
        raise Damaged(f"places {name} outside of the step's files")
    if place.transform_descriptors:
        raise Damaged(f"has {name} in a form that is not written here")
    return Chunk(
        offsets=torch.Size(chunk.offsets),
        sizes=torch.Size(chunk.sizes),
        file=place.relative_path,
        start=start,
        n_bytes=n_bytes,
    )


def _are_all_of(boxes: Sequence[tuple[tuple[int, int], ...]], shape: Sequence[int]) -> bool:
    """Whether the boxes, from-to in each dim, leave no gap and do not overlap.

    Slab by slab of the first dim, and so on: what ranks cut a tensor into always has slabs.
    """
    if not shape:
        return len(boxes) == 1
    slabs: dict[tuple[int, int], list[tuple[tuple[int, int], ...]]] = {}
    for first, *others in boxes:
        slabs.setdefault(first, []).append(tuple(others))
    end = 0
    for (start, stop), parts in sorted(slabs.items()):
        if start != end or not _are_all_of(parts, shape[1:]):
            return False
        end = stop
    return end == shape[0]


_DTYPES = {name: dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)}
_METADATA = "torch.distributed.checkpoint.metadata"
_PARTS = {
    **{
        (_METADATA, cls.__name__): cls
        for cls in (
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            StorageMeta,
            TensorProperties,
            TensorStorageMetadata,
        )
    },
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
}
_IN_KEYS = (str, int, torch.Size, type(None))
_OPCODES = (
    "PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 "
    "SHORT_BINUNICODE BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT "
    "SETITEM SETITEMS STACK_GLOBAL REDUCE NEWOBJ BUILD"
)


def _reduce(unpickler: Any) -> None:
    """Call what makes a value; the parts themselves are made empty, and given their attributes after that."""
    if unpickler.stack[-2] in _PARTS.values():
        raise Damaged("makes a part of it in another way")
    pickle._Unpickler.dispatch[pickle.REDUCE[0]](unpickler)


def _build(unpickler: Any) -> None:
    """Give a part its attributes; a class or a function would keep them after the index.

    What is a key holds no other: hashing many of them, one in the other, would never end.
    """
    state, built = unpickler.stack[-1], unpickler.stack[-2]
    if type(built) not in _PARTS.values():
        raise Damaged("changes what is no part of it")
    if type(built) is MetadataIndex and not all(type(x) in _IN_KEYS for x in state.values()):
        raise Damaged("nests the keys of its parts")
    pickle._Unpickler.dispatch[pickle.BUILD[0]](unpickler)


def _shallow(make: Callable[[Any], None]) -> Callable[[Any], None]:
    """Make a tuple of tuples at most: hashing many of them, one in the other, would end the process."""

    def checked(unpickler: Any) -> None:
        make(unpickler)
        inner = [x for x in unpickler.stack[-1] if type(x) is tuple]
        if any(type(x) is tuple for part in inner for x in part):
            raise Damaged("nests tuples")

    return checked


def _loads() -> dict[int, Callable[[Any], None]]:
    """What is done for each opcode that an index needs."""
    loads = {getattr(pickle, name)[0]: name for name in _OPCODES.split()}
    found = {code: pickle._Unpickler.dispatch[code] for code in loads}
    found |= {code: _shallow(found[code]) for code, name in loads.items() if name.startswith("TUPLE")}
    return {**found, pickle.BUILD[0]: _build, pickle.REDUCE[0]: _reduce}


class _Unpickler(pickle._Unpickler):
    """Makes what an index of tensors consists of, and refuses all else.

    In Python, where the one in C would change classes, and takes as much memory as it is told to.
    """

    dispatch: ClassVar = _loads()
    _ALLOWED: ClassVar = {
        **_PARTS,
        **{("torch", name): dtype for name, dtype in _DTYPES.items()},
        ("torch", "Size"): torch.Size,
        ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
        (_METADATA, "_MEM_FORMAT_ENCODING"): _MEM_FORMAT_ENCODING,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise Damaged(f"asks for {module}.{name}, which no index of tensors needs")
        return self._ALLOWED[module, name]


def differences(pieces: Mapping[str, Piece], index: Mapping[str, Stored]) -> list[str]:
    """Why `pieces` cannot be read from what is stored: names, shapes and dtypes, a line each."""
    lines = [f"{name} is not in the checkpoint" for name in pieces if name not in index]
    lines += [f"{name} is in the checkpoint alone" for name in index if name not in pieces]
    for name in pieces.keys() & index.keys():
        piece, stored = pieces[name], index[name]
        if piece.shape != stored.shape:
            lines.append(f"{name} is {list(piece.shape)} here and {list(stored.shape)} in the checkpoint")
        elif piece.local.dtype != stored.dtype:
            lines.append(f"{name} is {piece.local.dtype} here and {stored.dtype} in the checkpoint")
    return sorted(lines)


@torch.no_grad()
def read_tensors(folder: Path, pieces: Mapping[str, Piece], index: Mapping[str, Stored]) -> None:
    """Read every piece from the chunks that it lies in; the names, shapes and dtypes are those of `index`.

    Raises Damaged for a chunk that is no plain tensor of its box.
    """
    wanted = sorted(
        ((chunk.file, chunk.start, name, chunk) for name in pieces for chunk in index[name].chunks),
        key=lambda place: place[:2],
    )
    for file, _, name, chunk in wanted:
        piece = pieces[name]
        if overlap := _overlap(piece, chunk):
            source, target = overlap
            with reading(file), (folder / file).open("rb") as stream:
                tensor = _read_chunk(stream, name, chunk, index[name].dtype)
            piece.local[target].copy_(tensor[source])


def _overlap(piece: Piece, chunk: Chunk) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """What the two have in common, as a place in the chunk and one in the piece."""
    in_chunk, in_piece = [], []
    for a, n_a, b, n_b in zip(piece.offsets, piece.local.shape, chunk.offsets, chunk.sizes, strict=True):
        start, stop = max(a, b), min(a + n_a, b + n_b)
        if start >= stop:
            return None
        in_chunk.append(slice(start - b, stop - b))
        in_piece.append(slice(start - a, stop - a))
    return tuple(in_chunk), tuple(in_piece)


def _read_chunk(stream: Any, name: str, chunk: Chunk, dtype: torch.dtype) -> Tensor:
    stream.seek(chunk.start)
    content = io.BytesIO(stream.read(chunk.n_bytes))
    try:
        tensor = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, it is no tensor
        line = str(error).partition("\n")[0]
        raise Damaged(
            f"{chunk.file} holds no plain tensor for {name} ({type(error).__name__}: {line})"
        ) from None
    is_plain = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_meta
    if not is_plain or tensor.dtype != dtype or tensor.shape != chunk.sizes:
        raise Damaged(f"{chunk.file} holds something else than {name}")
    return tensor
