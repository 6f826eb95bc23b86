"""A file of tensors in the safetensors format, hashed while it is written.

    8 bytes: length of the header, little-endian | header: JSON, padded with spaces | the tensors' bytes

https://github.com/huggingface/safetensors#format. Names, dtypes and shapes alone decide every byte before the
tensors: a reader computes the header that must be there, and never parses the header that is there.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_lite import durable
from torchtitan_lite.checkpoint.manifest import Damaged, Digest, reading

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
"""The format's names of dtypes."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Layout(NamedTuple):
    """Where everything is in a file."""

    header: bytes
    """All bytes before the tensors."""
    places: dict[str, tuple[int, int]]
    """Of each tensor, in the file's order, the bytes that it has: from, to."""
    n_bytes: int
    """Size of the file."""


def layout(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> Layout:
    """Return the layout of a file with tensors of these dtypes and shapes."""
    # The widest first, so that each tensor starts at a multiple of its item size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1][0].itemsize, item[0]))
    described, ranges, end = {}, {}, 0
    for name, (dtype, shape) in ordered:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        described[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
        ranges[name] = start, end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    n = len(header)
    return Layout(header, {name: (n + start, n + end) for name, (start, end) in ranges.items()}, n + end)


def write(path: Path, tensors: Mapping[str, Tensor]) -> Digest:
    """Write `tensors` to a new file, and wait until it is on the disk.

    The tensors must not change meanwhile: a thread hashes the memory that this one writes. At most two
    tensors of a GPU are in host memory at a time. Raises OSError.
    """
    plan = layout({name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()})
    sha256 = hashlib.sha256(plan.header)
    hashing: Future[None] | None = None
    with ThreadPoolExecutor(1) as hasher:
        with path.open("wb") as stream:
            stream.write(plan.header)
            for name, (start, stop) in plan.places.items():
                content = bytes_of(tensors[name].detach().cpu().contiguous())
                if hashing is not None:
                    hashing.result()
                hashing = hasher.submit(sha256.update, content)
                stream.write(content)
                durable.begin_sync(stream, start, stop)
        durable.sync(path)
    return Digest(plan.n_bytes, sha256.hexdigest())


def check_header(folder: Path, file: str, header: bytes) -> None:
    """Raise Damaged unless a file begins with `header`."""
    with reading(file), (folder / file).open("rb") as stream:
        found = stream.read(len(header))
    if found != header:
        raise Damaged(f"{file} has another header than its tensors in the index need")


def bytes_of(x: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor of the CPU, without a copy."""
    return x.detach().reshape(-1).view(torch.uint8).numpy().data
