"""The names and locks of the folders in a cache; `durable` builds the folders."""

import math
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO

from torchtitan_lite import durable

_OURS = re.compile(r"([A-Za-z0-9_]+-[0-9a-f]{24})(\.tmp-[0-9a-f]{8}|\.lock)?")


def name(kind: str, key: str) -> str:
    """Return the name of the folder for the content with the hash `key`."""
    made = f"{kind}-{key[:24]}"
    assert is_ours(made), made
    return made


def is_ours(name: str) -> bool:
    """Return whether a file or folder of this name belongs to a cache. Other files may be beside it."""
    return _OURS.fullmatch(name) is not None


def exclusive(folder: Path, seconds: float = math.inf) -> IO[str]:
    """Lock `folder`, to build it, until the returned file is closed; see `durable.lock`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return durable.lock(folder.with_name(f"{folder.name}.lock"), seconds)


def sweep(parent: Path) -> None:
    """Remove unfinished folders of killed processes in `parent`, not those of living processes."""
    for left in parent.glob("*.tmp-????????"):
        if ours := _OURS.fullmatch(left.name):
            # OSError: the folder may be read-only.
            with suppress(OSError, durable.InUse), exclusive(parent / ours[1], seconds=0):
                shutil.rmtree(left)
