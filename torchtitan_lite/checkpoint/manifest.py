"""The manifest of a step: size and SHA-256 of every file, and the run, mesh and torch that made the step."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.launch.world import SameOnAllRanks

FORMAT_VERSION = 1
"""The version of the format. A change that makes older steps unreadable raises it by one."""
MANIFEST = "manifest.json"


class Damaged(SameOnAllRanks):
    """An error: a step differs from what was written. The message says which file differs, and how."""


class Unreadable(SameOnAllRanks):
    """An error: a step cannot be read now, so it may be good or damaged. The message says why."""


@dataclass(frozen=True)
class Digest:
    """The size and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of the manifest.json of one step."""

    step: int
    files: dict[str, Digest]
    """All files of the step except the manifest."""
    made: dict[str, Any]
    """The fingerprints of configuration, tokenizer and data, the mesh, and the version of torch."""

    def text(self) -> str:
        """Return the manifest as JSON that ends with its own hash. A manifest has exactly one text."""
        return _signed({"format_version": FORMAT_VERSION, **asdict(self)})


def write_file(path: Path, content: bytes) -> Digest:
    """Write a small file, and return its digest. `Steps.publish` makes sure that it is on the disk."""
    path.write_bytes(content)
    return Digest(len(content), hashlib.sha256(content).hexdigest())


def _signed(content: dict[str, Any]) -> str:
    """Return `content` as JSON, with the hash of this JSON added as the last value."""
    return _text({**content, "sha256": hashlib.sha256(_text(content).encode()).hexdigest()})


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest in `folder`. Raises Damaged if any byte of the manifest has changed."""
    path = folder / MANIFEST
    with reading(MANIFEST):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise Damaged(f"{MANIFEST} is not a file")
        found = path.read_bytes()
    try:
        content = json.loads(found)
        del content["sha256"]
        # Believe the version only if the hash is right: a flipped bit can change the version too.
        if _signed(content).encode() == found and (version := content["format_version"]) > FORMAT_VERSION:
            raise Unreadable(
                f"{MANIFEST} has format {version}, and this version reads up to {FORMAT_VERSION}"
            )
        manifest = TypeAdapter(Manifest).validate_json(found, strict=True)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # pydantic raises ValueError
        raise Damaged(f"{MANIFEST} is not what was written") from None
    if manifest.text().encode() != found:
        raise Damaged(f"{MANIFEST} is not what was written")
    return manifest


@contextmanager
def reading(name: str) -> Iterator[None]:
    """A context manager: an OSError inside becomes Damaged if the file `name` is missing, else Unreadable."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise Damaged(f"{name} is missing") from None
    except OSError as error:
        raise Unreadable(f"{name} cannot be read ({error.strerror})") from None


@contextmanager
def refusing_damage(key: str, value: object, rule: str, remedy: str) -> Iterator[None]:
    """A context manager: Damaged or Unreadable inside becomes a ConfigError about `key`."""
    try:
        yield
    except (Damaged, Unreadable) as problem:
        raise ConfigError([Problem(key, value, f"{rule}: {problem}", remedy)]) from None


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise Damaged unless `folder` holds exactly the files of the manifest, with the same sizes."""
    with reading("the folder"):
        there = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    for name in sorted({*manifest.files, *there} - {MANIFEST}):
        if name not in there:
            raise Damaged(f"{name} is missing")
        if name not in manifest.files:
            raise Damaged(f"{name} does not belong there")
        if not stat.S_ISREG(there[name].st_mode):
            raise Damaged(f"{name} is not a file")
        size, written = there[name].st_size, manifest.files[name].size
        if size != written:
            raise Damaged(f"{name} has {size} bytes, and {written} were written")


def check_hash(folder: Path, name: str, digest: Digest) -> None:
    """Raise Damaged unless the file `name` has the hash in `digest`."""
    with reading(name), (folder / name).open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256")
    if found.hexdigest() != digest.sha256:
        raise Damaged(f"{name} is not what was written (its SHA-256 differs)")
