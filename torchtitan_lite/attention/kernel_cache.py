"""The folders where torch keeps the code that it compiles, and loads it from."""

import mmap
import os
import sys
import tempfile

_INDUCTOR, _TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"


def fault(device: str | None) -> tuple[str, str] | None:
    """Return why inductor cannot keep and load code for `device` here, or None if it can.

    The answer is the rule and the remedy of an error. Without this check torch raises an error in the first
    step. If `device` is None, no code is loaded, and torch only needs to write to the folder.
    """
    try:
        folders = [_folder_of_inductor()]
    except FileNotFoundError:  # of tempfile
        return "needs a temporary folder, and there is none that can be written", "name one in TMPDIR"
    if device == "cuda" and _TRITON in os.environ:
        folders.append((_TRITON, os.path.abspath(os.environ[_TRITON])))
    for variable, folder in folders:
        if found := _fault_of(folder, is_loaded=device is not None):
            (why, other), source = found, f" ({variable})" if variable else ""
            remedy = f"set {_TRITON if variable == _TRITON else _INDUCTOR} to a folder {other}"
            return f"keeps compiled code in {folder}{source}, which {why}", remedy
    return None


def _folder_of_inductor() -> tuple[str, str]:
    """Return the variable that places inductor's folder, or "", and the folder itself or its parent.

    Raises FileNotFoundError if inductor would use a temporary folder and there is none.
    """
    # Not inductor's own function: importing inductor makes the folder, and sets the variable.
    if _INDUCTOR in os.environ:
        return _INDUCTOR, os.path.abspath(os.environ[_INDUCTOR])
    folder = tempfile.gettempdir()  # passes over folders that cannot be written
    for name in ("TMPDIR", "TEMP", "TMP"):
        if os.environ.get(name) and os.path.abspath(os.environ[name]) == folder:
            return name, folder
    return "", folder


def _fault_of(folder: str, is_loaded: bool) -> tuple[str, str] | None:
    """Return why code cannot be kept in `folder` or, if `is_loaded`, not loaded from there, or None.

    The second text says which folder would do.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(mmap.PAGESIZE))
            file.flush()
            can_run = not is_loaded or _can_run(file.fileno())
    except OSError as error:
        return f"cannot be written ({error.strerror})", "that can be written"
    if can_run:
        return None
    return "is mounted with noexec, so no code can be loaded from there", "on another file system"


def _can_run(descriptor: int) -> bool:
    """Return whether the system maps this file as code, as it must do to load a library."""
    if sys.platform != "linux":
        return True  # macOS may refuse this file, which has no signature, and still load libraries
    prot = mmap.PROT_READ | mmap.PROT_EXEC
    try:
        mmap.mmap(descriptor, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE, prot=prot).close()
    except PermissionError:
        return False
    return True
