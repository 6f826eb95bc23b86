"""Standard output and standard error that never end a run: text that cannot be written is lost.

A disk may be full, a stream may be closed, and an encoding may lack a character of a path. `protect` replaces
`sys.stdout` and `sys.stderr`, through which all Python code prints: reports, bars, warnings and logs.
"""

import codecs
import contextlib
import io
import os
import select
import sys

_ESCAPE = "torchtitan_lite.escape"
_NAMES = {"stdout": "standard output", "stderr": "standard error"}
_is_outlived = False
"""True if this process goes on after the program that reads standard output has ended."""


class ReaderGone(BrokenPipeError):
    """The error for output that nobody needs: the program that reads it, such as `head`, has ended."""


def protect() -> None:
    """Replace the standard streams of this process by streams whose writes lose text instead of failing.

    Only a write to standard output may raise ReaderGone, once, and only until `outlive_reader`. A stream that
    other code has already replaced, such as a test or a notebook, stays.
    """
    _fill_closed_descriptors()
    streams = {name: getattr(sys, f"__{name}__") for name in _NAMES}
    are_open = {name: stream is not None and not stream.closed for name, stream in streams.items()}
    nowhere = -1 if all(are_open.values()) else os.open(os.devnull, os.O_WRONLY)
    descriptors = {name: stream.fileno() if are_open[name] else nowhere for name, stream in streams.items()}
    for (name, stream), other in zip(streams.items(), reversed(descriptors.values()), strict=True):
        if getattr(sys, name) is stream:
            file = _File(name, descriptors[name], other, is_closed=not are_open[name])
            setattr(sys, name, _text_stream(file, stream if are_open[name] else None))


def outlive_reader() -> None:
    """Never raise ReaderGone from now on: a run trains also if nobody reads its reports."""
    global _is_outlived
    _is_outlived = True


class _File(io.RawIOBase):
    """The unbuffered file of a standard stream. If a write fails, its bytes are lost, and one line says so.

    Args:
        name: "stdout" or "stderr".
        descriptor: the descriptor that the stream writes to.
        other: the descriptor of the other standard stream, which gets the line.
        is_closed: True if the stream was closed when the process started.
    """

    def __init__(self, name: str, descriptor: int, other: int, *, is_closed: bool = False) -> None:
        self.name = f"<{name}>"
        self._name, self._descriptor, self._other, self._is_closed = name, descriptor, other, is_closed
        self._has_failed = False

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: "bytes | bytearray | memoryview", /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write all of `data`, and return its size, also if the bytes are lost."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        if self._is_closed:
            self._say("is closed")
            return size
        try:
            while rest:
                rest = rest[self._write_some(rest) :]
        except OSError as error:
            self._lose(error)
        return size

    def _write_some(self, data: memoryview) -> int:
        """Write as much of `data` as the stream takes now, and return how many bytes that is."""
        try:
            return os.write(self._descriptor, data)
        except BlockingIOError:  # another process has made the stream non-blocking, and its reader is slow
            select.select([], [self._descriptor], [])
            return 0

    def _lose(self, error: OSError) -> None:
        is_reader_gone = isinstance(error, BrokenPipeError) and self._name == "stdout"
        if is_reader_gone and not _is_outlived and not self._has_failed:
            self._has_failed = True
            raise ReaderGone(*error.args) from None
        self._say(f"cannot be written ({error.strerror})")

    def _say(self, reason: str) -> None:
        """Write to the other stream, once, that text is lost."""
        if self._has_failed:
            return
        self._has_failed = True
        line = f"{_NAMES[self._name]} {reason}: what is printed there is lost"
        if _is_outlived:
            line += "; the run goes on, and the files in its folder show how"
        # Not by print, which takes the lock of the other stream: two threads could wait for each other.
        with contextlib.suppress(OSError):
            os.write(self._other, f"{line}\n".encode())


def _text_stream(file: _File, before: io.TextIOWrapper | None) -> io.TextIOWrapper:
    """Return a text stream that writes to `file`, with the encoding and the buffering of `before`."""
    is_buffered = before is None or isinstance(before.buffer, io.BufferedWriter)
    if before is not None:
        with contextlib.suppress(OSError):
            before.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(file) if is_buffered else file,  # pyright: ignore[reportArgumentType]
        encoding="utf-8" if before is None else before.encoding,
        errors=_ESCAPE,
        line_buffering=before is None or before.line_buffering,
        write_through=before is not None and before.write_through,
    )


def _fill_closed_descriptors() -> None:
    """Open /dev/null for each of the descriptors 0, 1 and 2 that is closed.

    Otherwise the next file that the process opens, such as a checkpoint, gets that number, and a C library
    that prints writes into the file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Return the characters that an encoding lacks, such as "\\u00e9", in the way that TOML reads back."""
    assert isinstance(error, UnicodeEncodeError)
    codes = map(ord, error.object[error.start : error.end])
    return "".join(f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}" for code in codes), error.end


codecs.register_error(_ESCAPE, _escaped)
