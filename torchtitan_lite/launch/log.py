"""What a run tells its reader: lines on standard output, warnings on standard error, all of them in log.txt.

Everything goes through Python's logging, below the logger "torchtitan_lite".
"""

import contextlib
import logging
import sys
import textwrap
from pathlib import Path
from typing import Literal

from tqdm import tqdm

COLUMNS = 78
"""The most columns of a line. Longer lines are folded, because many terminals have 80 columns."""
_LOG = logging.getLogger(__name__)
_PACKAGE = logging.getLogger("torchtitan_lite")
_SAID = logging.getLogger("torchtitan_lite.said")
"""The logger of the lines for standard output. Its records reach the file log.txt through its parent."""


class ConsoleHandler(logging.Handler):
    """A handler that prints to standard output or standard error, without breaking a progress bar."""

    def __init__(self, stream: Literal["stdout", "stderr"]) -> None:
        super().__init__()
        self._stream = stream
        self.addFilter(lambda record: (record.name == _SAID.name) == (stream == "stdout"))

    def emit(self, record: logging.LogRecord) -> None:
        stream = getattr(sys, self._stream)  # now, because a program may replace its streams
        tqdm.write(self.format(record), file=stream)
        stream.flush()


class _File(logging.FileHandler):
    """A handler that appends to a file. Until `begin`, it keeps the lines in memory.

    If writes fail, one warning says so and the run continues.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "a", "utf-8", delay=True, errors="backslashreplace")
        self._has_failed = False
        self._kept: list[logging.LogRecord] | None = []

    def begin(self) -> None:
        """Open the file, and write the lines so far. Raises OSError if the file cannot be opened."""
        assert self.lock is not None
        with self.lock:  # lines of other threads come after these
            if self._kept is not None:
                self.stream = self._open()
                kept, self._kept = self._kept, None
                for record in kept:
                    super().emit(record)

    def emit(self, record: logging.LogRecord) -> None:
        if self._kept is None:
            super().emit(record)
        else:
            self._kept.append(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._has_failed:
            self._has_failed = True  # first, because this handler also gets the warning
            path, error = self.baseFilename, sys.exception()
            _LOG.warning("lines of %s are lost: it cannot be written (%s)", path, error)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the disk is still full
            super().close()


_SAID.setLevel(logging.INFO)
_SAID.addHandler(ConsoleHandler("stdout"))


def say(text: str, *, fold: bool = True) -> None:
    """Print lines on standard output and write them to the log file. Only the first rank should call this.

    Args:
        fold: fold lines of more than `COLUMNS` columns. Commands that are to be pasted are not folded.
    """
    lines = text.split("\n")
    _SAID.info("%s", "\n".join(map(folded, lines) if fold else lines))


def folded(line: str) -> str:
    """Return `line` in lines of at most `COLUMNS` columns. A line with an absolute path stays whole."""
    if len(line) <= COLUMNS or any(word.startswith("/") for word in line.split()):
        return line
    indent = line[: len(line) - len(line.lstrip())] + "  "
    return textwrap.fill(
        line, COLUMNS, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def keep_log(path: Path) -> None:
    """Keep what the run says and logs from now on for the file `path`, instead of the file before.

    `begin_log` opens the file: a start that is refused must not change the file of an earlier start.
    """
    close_log()
    _PACKAGE.addHandler(_File(path))


def begin_log() -> None:
    """Open the log file, and append the lines so far. Raises OSError if the file cannot be opened."""
    for handler in _files():
        handler.begin()


def close_log() -> None:
    """Close the log file, if there is one."""
    for handler in _files():
        _PACKAGE.removeHandler(handler)
        handler.close()


def note(text: str) -> None:
    """Write lines to the log file alone, because they are printed in another way. Raises OSError."""
    begin_log()
    for handler in _files():
        handler.handle(logging.makeLogRecord({"msg": text}))


def _files() -> list[_File]:
    return [handler for handler in _PACKAGE.handlers if isinstance(handler, _File)]
