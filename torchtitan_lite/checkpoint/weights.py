"""Weights in safetensors files, laid out as on the Hugging Face Hub: one file, or several with an index."""

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchtitan_lite.checkpoint.manifest import Damaged
from torchtitan_lite.checkpoint.tensors import Piece

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that become float32 without losing a bit."""
_ROWS = 1024
"""Rows of a tensor that are compared at a time."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The file of a tensor, and its dtype and shape there."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Weights:
    """The tensors in the safetensors files of a folder. Raises Damaged if the files are not whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[str, Place] = {}
        """By the tensor's name."""
        self._files: dict[str, Any] = {}
        listed = _listed(folder)
        for file in sorted(set(listed.values())) or [SINGLE]:
            self._read_header(file)
        if listed and listed != (found := {name: place.file for name, place in self.places.items()}):
            name = min(name for name in {*listed, *found} if listed.get(name) != found.get(name))
            raise Damaged(f"{INDEX} is not true of {name}: {_whereabouts(name, listed, found)}")

    def _read_header(self, file: str) -> None:
        from safetensors import SafetensorError, safe_open

        path = self.folder / file
        try:
            if not path.is_file():
                raise Damaged(f"{file} is missing")
            opened = safe_open(path, framework="pt")
            for name in opened.keys():  # noqa: SIM118 - no mapping, though it has keys
                if name in self.places:
                    raise Damaged(f"{name} is in {self.places[name].file} and in {file}")
                part = opened.get_slice(name)
                self.places[name] = Place(file=file, dtype=part.get_dtype(), shape=tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{file} is no whole safetensors file ({error})") from None
        self._files[file] = opened

    def box(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Return a box of a tensor in the dtype of the file."""
        part = self._files[self.places[name].file].get_slice(name)
        return part[tuple(slice(start, start + n) for start, n in zip(offsets, sizes, strict=True))]

    def differences(self, wanted: Mapping[str, Sequence[int]], ignored: Sequence[str] = ()) -> list[str]:
        """Return why tensors of these shapes cannot be read as float32, a line each.

        Tensors named in `ignored` may be in the files too.
        """
        lines = [f"{name} is missing" for name in wanted if name not in self.places]
        lines += [
            f"{name} belongs to no weight of the model"
            for name in self.places
            if name not in wanted and name not in ignored
        ]
        for name in wanted.keys() & self.places.keys():
            place = self.places[name]
            if place.shape != tuple(wanted[name]):
                lines.append(f"{name} is {list(place.shape)}, and the model's is {list(wanted[name])}")
            elif place.dtype not in _DTYPES:
                lines.append(f"{name} is {place.dtype}, and can be read from {', '.join(_DTYPES)}")
        return sorted(lines)

    @torch.no_grad()
    def read(self, pieces: Mapping[str, Piece]) -> None:
        """Read every piece, file by file. `differences` must have found none.

        Raises Damaged if a tensor has a number that is not finite.
        """
        for name in sorted(pieces, key=lambda name: (self.places[name].file, name)):
            piece = pieces[name]
            if piece.local.numel():
                piece.local.copy_(self.box(name, piece.offsets, piece.local.shape))
                if not piece.local.isfinite().all():
                    raise Damaged(f"{name} has numbers that are not finite")

    def are_equal(self, one: str, other: str) -> bool:
        """Return whether two tensors are the same, bit by bit."""
        a, b = self.places[one], self.places[other]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return False
        rest = a.shape[1:]
        for start in range(0, a.shape[0], _ROWS):
            box = (start, *[0] * len(rest)), (min(_ROWS, a.shape[0] - start), *rest)
            if not torch.equal(
                self.box(one, *box).view(torch.uint8), self.box(other, *box).view(torch.uint8)
            ):
                return False
        return True


def _listed(folder: Path) -> dict[str, str]:
    """Return the file of each tensor as the index says; empty if there is one file without an index."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).exists():
            pickles = sorted(path for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
            other = next((path.name for path in pickles), None)
            raise Damaged(
                f"{other} is a pickle, which can run anything: only safetensors are read"
                if other
                else f"neither {SINGLE} nor {INDEX} is there"
            )
        return {}
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
        raise Damaged(
            f"{SINGLE} is there, and an {INDEX} of other files"
        )  # some programs would read the file, others the index
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
    """Write tensors of these names and shapes in `dtype`, in files of at most `most_bytes` and an index.

    `read(names)` returns the tensors of one file: no more are in memory at a time. Raises OSError.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
    groups = _groups(sizes, most_bytes)
    files = (
        [SINGLE]
        if len(groups) == 1
        else [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    )
    for file, names in zip(files, groups, strict=True):
        tensors = {name: x.to(dtype).contiguous() for name, x in read(names).items()}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # raised for a full disk too
            raise OSError(errno.EIO, str(error), str(folder / file)) from None
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {name: file for file, names in zip(files, groups, strict=True) for name in names},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _groups(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Return the names in order, in groups of at most `most` bytes; a larger tensor is a group."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if groups[-1] and total + size > most:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups
