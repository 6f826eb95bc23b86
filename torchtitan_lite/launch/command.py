"""The command lines that a run prints, for pasting into a shell."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def program(needs_modules: bool) -> list[str]:
    """Return the words that start the command `torchtitan-lite` of this very package.

    Args:
        needs_modules: the command imports modules of the user, which may be in the working directory.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    # `python -m` finds modules in the working directory, and a path to a script does not.
    if needs_modules and spec is not None:
        return [sys.executable, "-m", "torchtitan_lite"]
    return [sys.executable, str(_PACKAGE / "cli.py")]


def again(argv: Sequence[str]) -> list[str] | None:
    """Return the words that start this program again. More options may follow them.

    With a launcher, such as torchrun or mpirun, these are its words. None: they are not known here.

    Args:
        argv: the options of the training program.
    """
    if "RANK" in os.environ:
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            return None  # each machine has a launcher with words of its own
        words = _words_of_parent()
        return words if _end_in(words, argv) and len(words) > 1 else None
    words = sys.orig_argv[1:] if _end_in(sys.orig_argv, argv) else [str(_PACKAGE / "train.py"), *argv]
    return [sys.executable, *words]


def _end_in(words: Sequence[str], argv: Sequence[str]) -> bool:
    return list(words[len(words) - len(argv) :]) == list(argv)


def _words_of_parent() -> list[str]:
    """Return the command line of the process that started this process.

    Returns [] if no /proc shows it, or if that process runs no Python, as mpirun and timeout do: `in_shell`
    puts Python's name in the place of the first word.
    """
    parent = Path(f"/proc/{os.getppid()}")
    try:
        if not os.path.samefile(parent / "exe", "/proc/self/exe"):
            return []
        text = (parent / "cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in text.split(b"\0")[:-1]]
