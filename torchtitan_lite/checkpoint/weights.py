"""Weights in safetensors files, as on the Hugging Face Hub: one file, or several files with an index."""

import errno
import json
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from torchtitan_lite.checkpoint.manifest import Damaged
from torchtitan_lite.checkpoint.tensors import DTYPES, Chunk, Stored

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EXACT = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that convert to float32 without loss."""
_FREQUENCIES = re.compile(r"(.+\.)?rotary_emb\.inv_freq")
"""The names of buffers that old models hold beside their weights, in each layer or once.

config.json says how to compute these frequencies. transformers does so and ignores the buffers, in
`PreTrainedModel._adjust_missing_and_unexpected_keys`.
"""


def read_weights_index(folder: Path) -> dict[str, Stored]:
    """Return the dtype, shape and place of each tensor in the safetensors files of `folder`, by name.

    Rotary frequencies, which some models store, are left out. Raises Damaged unless every file is complete
    and the index, if there is one, agrees with the files.
    """
    listed = _listed(folder)
    index: dict[str, Stored] = {}
    for file in sorted(set(listed.values())) or [SINGLE]:
        for name, stored in _stored(folder, file):
            if name in index:
                raise Damaged(f"{name} is in {index[name].chunks[0].file} and in {file}")
            index[name] = stored
    found = {name: stored.chunks[0].file for name, stored in index.items()}
    has_index = bool(listed)
    listed = {name: file for name, file in listed.items() if not _FREQUENCIES.fullmatch(name)}
    if has_index and listed != found:
        name = min(name for name in {*listed, *found} if listed.get(name) != found.get(name))
        raise Damaged(f"{INDEX} is not true of {name}: {_whereabouts(name, listed, found)}")
    return index


def _stored(folder: Path, file: str) -> Iterator[tuple[str, Stored]]:
    """Yield the name of each tensor in a file, with its dtype, its shape and its bytes as one chunk."""
    from safetensors import SafetensorError, safe_open

    try:
        if not (folder / file).is_file():
            raise Damaged(f"{file} is missing")
        with safe_open(folder / file, framework="pt"), (folder / file).open("rb") as stream:
            # safe_open has checked that the header is sound and that the tensors fill the rest of the file.
            (n_bytes,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(n_bytes))
    except (SafetensorError, OSError) as error:
        raise Damaged(f"{file} is no whole safetensors file ({error})") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if _FREQUENCIES.fullmatch(name):
            continue
        if entry["dtype"] not in DTYPES:
            raise Damaged(f"{name} is {entry['dtype']}, which is not read here")
        shape = tuple(entry["shape"])
        start, stop = (8 + n_bytes + offset for offset in entry["data_offsets"])
        chunk = Chunk(offsets=(0,) * len(shape), sizes=shape, file=file, start=start, stop=stop)
        yield name, Stored(dtype=DTYPES[entry["dtype"]], shape=shape, chunks=[chunk])


def are_equal(folder: Path, one: Stored, other: Stored) -> bool:
    """Return whether two stored tensors are equal, bit by bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    chunks = one.chunks[0], other.chunks[0]
    a, b = (
        torch.from_file(str(folder / chunk.file), size=chunk.stop, dtype=torch.uint8)[chunk.start :]
        for chunk in chunks  # memory-mapped, not read
    )
    return torch.equal(a, b)


def _listed(folder: Path) -> dict[str, str]:
    """Return the file of each tensor according to the index, or {} for a single file without an index."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).exists():
            return {}
        for path in sorted(folder.glob("*")):
            if path.suffix in (".bin", ".pt", ".pth"):
                raise Damaged(f"{path.name} is a pickle, which can run anything: only safetensors are read")
        raise Damaged(f"neither {SINGLE} nor {INDEX} is there")
    try:
        listed = json.loads(index.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise Damaged(f"{INDEX} is no index of tensors") from None
    if not isinstance(listed, dict) or not listed:
        raise Damaged(f"{INDEX} is no index of tensors")
    for file in listed.values():
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise Damaged(f"{INDEX} names {file!r}, which is no safetensors file in the folder")
    if (folder / SINGLE).exists() and SINGLE not in listed.values():
        # Some programs would read the file, other programs the index.
        raise Damaged(f"{SINGLE} is there, and an {INDEX} of other files")
    return listed


def _whereabouts(name: str, listed: Mapping[str, str], found: Mapping[str, str]) -> str:
    if name not in listed:
        return f"{found[name]} has it, and the index does not"
    return f"it names {listed[name]}, and the tensor is {'in ' + found[name] if name in found else 'nowhere'}"


def write_weights(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    read: Callable[[Sequence[str]], Mapping[str, Tensor]],
    most_bytes: int = 5 << 30,
) -> None:
    """Write tensors with these names and shapes in `dtype`, as files of at most `most_bytes` and an index.

    `read(names)` returns the tensors of one file, and only these are in memory. Raises OSError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    groups: list[list[str]] = []
    total = 0
    for name, size in sizes.items():
        if not groups or total + size > most_bytes:  # a larger tensor gets its own file
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = SINGLE if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {name: x.to(dtype).contiguous() for name, x in read(names).items()}
        path = folder / file
        # safetensors replaces the file by one that only its owner may read. This one has the umask's mode.
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk raises this error too
            raise OSError(errno.EIO, str(error), str(path)) from None
        path.chmod(mode)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
