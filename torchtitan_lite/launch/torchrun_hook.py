"""Print a line instead of a traceback when a signal ends the plain torchrun of a run of ours.

torch calls `rendezvous_handler`, an entry point of the group "torchrun.handlers", in each torchrun of the
environment, other projects' too. So this module imports the standard library alone, and changes only how one
exception is shown, and only if the script or the module that torchrun starts is of this package. Record:
docs/decisions/0016-one-line-of-torchrun.md
"""

import os
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

_PACKAGE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def rendezvous_handler() -> Callable[..., Any]:
    """Install the hook if this process starts ranks of this package.

    Returns what torch asks of this entry point: a function that makes a rendezvous. This one refuses.
    """
    if _starts_us(sys.argv[1:]):
        before = sys.excepthook

        def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            # By name, because an import of torch does not belong here: torch imports this module.
            if kind.__name__ != "SignalException":
                return before(kind, error, trace)
            signal_name = getattr(getattr(error, "sigval", None), "name", "a signal")
            print(f"torchrun was ended by {signal_name}: exit.json has the end of the run", file=sys.stderr)

        sys.excepthook = show
    return _refuse


def _starts_us(words: Sequence[str]) -> bool:
    """Return whether a word of torchrun's command line is a script, a module or the command of us."""
    module = os.path.basename(_PACKAGE) + "."
    return any(
        os.path.realpath(word).startswith(_PACKAGE + os.sep)
        or word.startswith(module)
        or os.path.basename(word) == "torchtitan-lite"
        for word in words
    )


def _refuse(*_: object) -> None:
    raise ValueError("torchtitan_lite is no rendezvous backend: use c10d")
