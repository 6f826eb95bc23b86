"""The tensors of a step: each rank writes its pieces to a file, and any number of ranks can read them.

A rank that writes has a file `tensors-<rank>.safetensors`. The file holds chunks, which are parts of tensors,
under the names of the tensors. `index.json` has the dtype and shape of each tensor, and the place of each
chunk in its tensor and in its file. A file is hashed while it is written. The format of a file is

    8 bytes: length of the header, little-endian | header: JSON, padded with spaces | the tensors' bytes

https://github.com/huggingface/safetensors#format. Names, dtypes and shapes alone determine every byte before
the tensors. So a reader computes the header from the index, and compares it with the header in the file.
"""

import hashlib
import io
import json
import math
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import Field, PlainSerializer, PlainValidator, TypeAdapter, ValidationError
from torch import Tensor

from torchtitan_lite import durable
from torchtitan_lite.checkpoint.manifest import Damaged, Digest, Manifest, reading, write_file
from torchtitan_lite.checkpoint.state import STATE
from torchtitan_lite.launch.world import World

INDEX = "index.json"
_FILE = "tensors-{rank}.safetensors"
_BLOCK = 16 << 20
"""The bytes to read at a time if they cannot be read straight into a tensor."""
_MOST_LINES = 10
"""The most tensors that an error message names."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes, by their names in the safetensors format."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The part of a tensor that a rank holds: a box, which is a range of indices in each dim."""

    local: Tensor
    shape: torch.Size
    """The shape of the whole tensor."""
    offsets: torch.Size
    """The index in the whole tensor at which the part starts, for each dim."""


def _dtype(name: object) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError("is no dtype that is written here")
    return DTYPES[name]


_Dtype = Annotated[torch.dtype, PlainValidator(_dtype), PlainSerializer(_DTYPE_NAMES.__getitem__)]
_Dims = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**63)], ...], Field(max_length=64)]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A box of a tensor, and the file that holds the box in the bytes from `start` to `stop`, row by row."""

    offsets: _Dims
    sizes: _Dims
    file: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The dtype, shape and chunks of a tensor in a checkpoint."""

    dtype: _Dtype
    shape: _Dims
    chunks: list[Chunk]


_Index = TypeAdapter(dict[str, Stored])


class _Box(NamedTuple):
    """The dtype and place of a piece, without its values. The ranks exchange boxes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def write_tensors(folder: Path, pieces: Mapping[str, Piece], world: World) -> dict[str, Digest]:
    """Write the pieces of all ranks to `folder`, and wait until the pieces are on the disk.

    A piece that several ranks hold is written once. Returns the digests of the files that this rank wrote. If
    a rank fails, it raises its own error, and the other ranks raise OnAnotherRank.
    """
    held = {
        name: _Box(piece.local.dtype, tuple(piece.shape), tuple(piece.offsets), tuple(piece.local.shape))
        for name, piece in pieces.items()
        if piece.local.numel()  # with more ranks than rows, some ranks hold nothing
    }
    # Every rank computes the same division from the same boxes, so no rank needs to send it.
    division = _divide(world.gather(held))

    def write() -> dict[str, Digest]:
        digests = {}
        if own := division[world.rank]:
            file = _FILE.format(rank=world.rank)
            digests[file] = _write_file(folder / file, {name: pieces[name].local for name in own})
        if world.is_first:
            digests[INDEX] = write_file(folder / INDEX, _Index.dump_json(_index_of(division)))
        return digests

    return world.together(write)


def _write_file(path: Path, tensors: Mapping[str, Tensor]) -> Digest:
    """Write `tensors` to a new file, wait until the file is on the disk, and return its digest.

    The tensors must not change meanwhile: a second thread hashes the memory that this thread writes. At most
    two tensors of a GPU are in host memory at a time. Raises OSError.
    """
    layout = _layout({name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()})
    sha256 = hashlib.sha256(layout.header)
    hashing: Future[None] | None = None
    with ThreadPoolExecutor(1) as hasher:
        with path.open("wb") as stream:
            stream.write(layout.header)
            for name, (start, stop) in layout.places.items():
                content = _bytes_of(tensors[name].detach().cpu().contiguous())
                if hashing is not None:
                    hashing.result()
                hashing = hasher.submit(sha256.update, content)
                stream.write(content)
                durable.begin_sync(stream, start, stop)
        durable.sync(path)
    return Digest(layout.n_bytes, sha256.hexdigest())


class _Layout(NamedTuple):
    """The layout of a tensor file: the header, the byte range of each tensor, and the size."""

    header: bytes
    """The bytes before the tensors."""
    places: dict[str, tuple[int, int]]
    """The start and stop of each tensor in bytes from the start of the file, in the order of the file."""
    n_bytes: int
    """The size of the file."""


def _layout(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> _Layout:
    """Return the layout of a file with tensors of these dtypes and shapes."""
    # The widest dtypes first, so that each tensor starts at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0]))
    described, ranges, end = {}, {}, 0
    for name, (dtype, shape) in ordered:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        described[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
        ranges[name] = start, end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    n = len(header)
    return _Layout(header, {name: (n + start, n + end) for name, (start, end) in ranges.items()}, n + end)


def _divide(held: Sequence[Mapping[str, _Box]]) -> list[dict[str, _Box]]:
    """Return the boxes that each rank writes, by tensor name. All ranks write about the same number of bytes.

    `held` lists the boxes that each rank holds, by tensor name.
    """
    holders: dict[tuple[str, _Box], list[int]] = {}
    for rank, boxes in enumerate(held):
        for item in boxes.items():
            holders.setdefault(item, []).append(rank)
    size = {item: math.prod(item[1].sizes) * item[1].dtype.itemsize for item in holders}
    # First the boxes that only one rank holds, then large boxes before small boxes, which even out.
    order = sorted(holders, key=lambda item: (len(holders[item]) > 1, -size[item], item[0], item[1].offsets))
    division: list[dict[str, _Box]] = [{} for _ in held]
    n_bytes = [0] * len(held)
    for name, box in order:
        rank = min(holders[name, box], key=lambda rank: (n_bytes[rank], rank))
        division[rank][name] = box
        n_bytes[rank] += size[name, box]
    return division


def _index_of(division: Sequence[Mapping[str, _Box]]) -> dict[str, Stored]:
    index: dict[str, Stored] = {}
    for rank, boxes in enumerate(division):
        places = _layout({name: (box.dtype, box.sizes) for name, box in boxes.items()}).places
        for name, (start, stop) in places.items():
            box = boxes[name]
            stored = index.setdefault(name, Stored(dtype=box.dtype, shape=box.shape, chunks=[]))
            assert (stored.dtype, stored.shape) == (box.dtype, box.shape), name
            file = _FILE.format(rank=rank)
            chunk = Chunk(offsets=box.offsets, sizes=box.sizes, file=file, start=start, stop=stop)
            stored.chunks.append(chunk)
    return index


def read_index(folder: Path, manifest: Manifest, world: World) -> dict[str, Stored]:
    """Return the dtype, shape and chunks of each tensor of a step, by name.

    Raises Damaged unless the chunks of each tensor fill the tensor, and each file agrees with its chunks: in
    its size in `manifest`, the places of the chunks, and its header. Each rank reads some of the headers.
    """
    with reading(INDEX):
        content = (folder / INDEX).read_bytes()
    try:
        index = _Index.validate_json(content, strict=True)
    except ValidationError as error:
        raise Damaged(f"{INDEX} is no index of tensors ({error.error_count()} values are wrong)") from None
    for name, stored in index.items():
        n_dims = {len(dims) for chunk in stored.chunks for dims in (chunk.offsets, chunk.sizes)}
        if n_dims - {len(stored.shape)} or not _fill(stored.chunks, stored.shape):
            raise Damaged(f"{INDEX} does not have all of {name}, and each part once")
    layouts = _layouts_of(index)
    if strangers := manifest.files.keys() - layouts.keys() - {INDEX, STATE}:
        raise Damaged(f"{INDEX} names no tensor in {min(strangers)}")
    for file, wanted in layouts.items():
        if file not in manifest.files or manifest.files[file].size != wanted.n_bytes:
            raise Damaged(f"{INDEX} says of {file} what the manifest does not")
    for name, stored in index.items():
        for chunk in stored.chunks:
            if (chunk.start, chunk.stop) != layouts[chunk.file].places[name]:
                raise Damaged(f"{INDEX} places {name} where {chunk.file} does not have it")
    for file in sorted(layouts)[world.rank :: world.size]:
        header = layouts[file].header
        with reading(file), (folder / file).open("rb") as stream:
            if stream.read(len(header)) != header:
                raise Damaged(f"{file} has another header than its tensors in the index need")
    return index


def _layouts_of(index: Mapping[str, Stored]) -> dict[str, _Layout]:
    """Return the layout of each file of an index. Raises Damaged if a file has two chunks of a tensor."""
    files: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {}
    for name, stored in index.items():
        for chunk in stored.chunks:
            tensors = files.setdefault(chunk.file, {})
            if name in tensors:
                raise Damaged(f"{INDEX} has two chunks of {name} in {chunk.file}")
            tensors[name] = stored.dtype, chunk.sizes
    return {file: _layout(tensors) for file, tensors in files.items()}


def _fill(chunks: Sequence[Chunk], shape: Sequence[int], dim: int = 0) -> bool:
    """Return whether chunks that agree in the dims before `dim` fill the remaining dims without overlaps.

    The function groups the chunks into slabs along `dim`, and checks each slab along the next dim. This is
    enough, because ranks cut a tensor only into slabs.
    """
    if dim == len(shape):
        return len(chunks) == 1
    slabs: dict[tuple[int, int], list[Chunk]] = {}
    for chunk in chunks:
        slabs.setdefault((chunk.offsets[dim], chunk.sizes[dim]), []).append(chunk)
    end = 0
    for (offset, size), parts in sorted(slabs.items()):
        if offset != end or size == 0 or not _fill(parts, shape, dim + 1):
            return False
        end += size
    return end == shape[dim]


def differences(
    pieces: Mapping[str, Piece],
    index: Mapping[str, Stored],
    dtypes: Sequence[torch.dtype] = (),
    place: str = "the checkpoint",
) -> list[str]:
    """Return how `pieces` and the stored tensors differ in names, shapes and dtypes: one line for each.

    Args:
        dtypes: the dtypes from which pieces of any dtype can be read.
        place: the words for the place of the stored tensors.
    """
    readable = ", ".join(_DTYPE_NAMES[dtype] for dtype in dtypes)
    lines = [f"{name} is not in {place}" for name in pieces if name not in index]
    lines += [f"{name} is in {place} alone" for name in index if name not in pieces]
    for name in pieces.keys() & index.keys():
        piece, stored = pieces[name], index[name]
        if piece.shape != stored.shape:
            lines.append(f"{name} is {list(piece.shape)} here and {list(stored.shape)} in {place}")
        elif dtypes and stored.dtype not in dtypes:
            lines.append(f"{name} is {_DTYPE_NAMES[stored.dtype]}, and can be read from {readable}")
        elif not dtypes and stored.dtype != piece.local.dtype:
            lines.append(f"{name} is {piece.local.dtype} here and {stored.dtype} in {place}")
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return [*sorted(lines)[:_MOST_LINES], *more]


@torch.no_grad()
def read_tensors(folder: Path, pieces: Mapping[str, Piece], index: Mapping[str, Stored]) -> None:
    """Read every piece from the chunks that overlap it. `differences` must have returned no lines.

    If a piece has the layout and dtype of the file, the bytes go straight into its memory. Otherwise they are
    read in blocks of 16 MiB or one row, and converted. Raises Damaged if a file has become shorter.
    """
    chunks = [(chunk.file, chunk.start, name, chunk) for name in pieces for chunk in index[name].chunks]
    for file, of_file in groupby(sorted(chunks, key=lambda item: item[:2]), key=lambda item: item[0]):
        with reading(file), (folder / file).open("rb") as stream:
            for _, _, name, chunk in of_file:
                if overlap := _overlap(pieces[name], chunk):
                    source, target = overlap
                    _read(stream, chunk, index[name].dtype, source, pieces[name].local.detach()[target])


def _overlap(piece: Piece, chunk: Chunk) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Return the overlap as slices of the chunk and slices of the piece, or None if they do not overlap."""
    in_chunk, in_piece = [], []
    for a, n_a, b, n_b in zip(piece.offsets, piece.local.shape, chunk.offsets, chunk.sizes, strict=True):
        start, stop = max(a, b), min(a + n_a, b + n_b)
        if start >= stop:
            return None
        in_chunk.append(slice(start - b, stop - b))
        in_piece.append(slice(start - a, stop - a))
    return tuple(in_chunk), tuple(in_piece)


def _read(
    stream: io.BufferedReader, chunk: Chunk, dtype: torch.dtype, source: tuple[slice, ...], target: Tensor
) -> None:
    """Read the box `source` of a chunk, which is stored in `dtype`, into `target`."""
    if not chunk.sizes:  # read a scalar as a row of one number
        source, target = (slice(0, 1),), target.view(1)
    rows, *rest = source
    row = list(chunk.sizes[1:])
    row_bytes = math.prod(row) * dtype.itemsize
    stream.seek(chunk.start + rows.start * row_bytes)
    has_whole_rows = list(target.shape[1:]) == row
    if has_whole_rows and target.dtype == dtype and target.is_cpu and target.is_contiguous():
        _read_into(stream, target)
        return
    n_most = min(len(target), max(1, _BLOCK // row_bytes))
    block = torch.empty((n_most, *row), dtype=dtype)
    for part in target.split(n_most):
        read = block[: len(part)]
        _read_into(stream, read)
        part.copy_(read[(slice(None), *rest)])


def _read_into(stream: io.BufferedReader, target: Tensor) -> None:
    """Read the next bytes of the file into the memory of a contiguous tensor."""
    memory = _bytes_of(target)
    if stream.readinto(memory) != len(memory):
        raise Damaged(f"{Path(stream.name).name} has become shorter")


def _bytes_of(x: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, without a copy."""
    return x.detach().reshape(-1).view(torch.uint8).numpy().data
