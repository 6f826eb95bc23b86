"""Files that are hashed while they are written: reading them again would nearly double the time."""

import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from torchtitan_lite.checkpoint.manifest import Digest

_BLOCK = 1 << 20
"""Bytes that are hashed at a time."""
_MOST_BEHIND = 16
"""Blocks that may wait for the hash, in memory."""


class HashedFiles(FileSystem):
    """torch's own file system, which notes the digest of every file that is written through it."""

    def __init__(self) -> None:
        self.digests: dict[str, Digest] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """The file at `path`, opened; raises the first error of writing it, whatever came of that."""
        with super().create_stream(path, mode) as file, ThreadPoolExecutor(1) as hasher:
            if mode != "wb":
                yield file
                return
            stream = _HashedStream(file, hasher)
            try:
                yield stream
            finally:
                if stream.error is not None:
                    raise stream.error
            self.digests[Path(path).name] = stream.digest()

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Rename a file, and its digest."""
        super().rename(path, new_path)
        self.digests[Path(new_path).name] = self.digests.pop(Path(path).name)

    def write_json(self, path: Path, content: dict[str, Any]) -> None:
        """Write `content`, and see to it that it is on the disk."""
        with self.create_stream(path, "wb") as stream:
            stream.write((json.dumps(content, indent=1) + "\n").encode())
            stream.flush()
            os.fsync(stream.fileno())


@contextmanager
def without_checksums() -> Iterator[None]:
    """torch.save adds no CRC-32 of its own, which takes half of its time: what is hashed needs none."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _HashedStream(io.RawIOBase):
    """Writes to a file; a thread hashes copies of the same bytes, and may be some way behind."""

    def __init__(self, file: Any, hasher: ThreadPoolExecutor) -> None:
        self._file, self._hasher = file, hasher
        self._hash, self._size = hashlib.sha256(), 0
        self._block, self._filled = bytearray(_BLOCK), 0
        self._free: list[bytearray] = []
        """Blocks that were hashed, to be used again: memory that is new costs as much as the hash."""
        self._behind: deque[Future[None]] = deque()
        self.error: OSError | None = None

    def digest(self) -> Digest:
        """Of all that was written, once the thread is through with it."""
        self._pass_on()
        for hashing in self._behind:
            hashing.result()
        return Digest(self._size, self._hash.hexdigest())

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        with memoryview(data).cast("B") as view:
            for start in range(0, len(view), _BLOCK):
                self._write(view[start : start + _BLOCK])
            self._size += len(view)
            return len(view)

    def _write(self, part: memoryview) -> None:
        # What calls this is torch's C++, which cannot say later what went wrong here: the error is kept.
        if self.error is not None:
            return
        n = min(len(part), _BLOCK - self._filled)
        self._take(part[:n])
        self._take(part[n:])
        try:
            self._file.write(part)
        except OSError as error:
            self.error = error

    def _take(self, part: memoryview) -> None:
        """Copy what has room in the block, and hand that over when it is full."""
        end = self._filled + len(part)
        memoryview(self._block)[self._filled : end] = part
        self._filled = end
        if end == _BLOCK:
            self._pass_on()

    def _pass_on(self) -> None:
        self._behind.append(self._hasher.submit(self._update, self._block, self._filled))
        if len(self._behind) > _MOST_BEHIND:
            self._behind.popleft().result()
        self._block, self._filled = self._free.pop() if self._free else bytearray(_BLOCK), 0

    def _update(self, block: bytearray, n_bytes: int) -> None:
        self._hash.update(memoryview(block)[:n_bytes])
        self._free.append(block)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        if self._file.closed:  # Python flushes this stream again when it deletes the object
            return
        try:
            self._file.flush()
        except OSError as error:
            self.error = self.error or error

    def fileno(self) -> int:
        # Whoever asks wants what was written to be on the disk, and not what Python has passed on of it.
        self.flush()
        return self._file.fileno()
