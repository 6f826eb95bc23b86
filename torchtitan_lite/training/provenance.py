"""The file run.json in the run's folder: when, where and with which software the run was started."""

import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import torchtitan_lite
from torchtitan_lite.durable import replaced
from torchtitan_lite.training.outputs import free_folder

_FILE = "run.json"
_EARLIER = "earlier_starts"
_OF_GIT_HOOKS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
_GIT_SECONDS = 10
"""The longest time to wait for one answer of git, which may be slow on a network file system."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The place of one rank: its host and the name of its device."""

    host: str
    device: str


def place_of(device: torch.device) -> Place:
    """Return the place of this rank, which computes on `device`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return Place(host=socket.gethostname(), device=name)


def write_start(folder: Path, places: Sequence[Place], resumed_step: int | None) -> None:
    """Write to `folder`/run.json the facts of this start, and keep the facts of earlier starts.

    An unreadable file is moved to a folder "earlier". Raises OSError.

    Args:
        places: the places of all ranks, ordered by rank.
        resumed_step: the step that the run resumes from; None in a new run.
    """
    path = folder / _FILE
    starts = _earlier_starts(path)
    if starts is None:
        path.rename(free_folder(folder, "earlier") / _FILE)
    facts = {**_facts(places), "resumed_step": resumed_step, _EARLIER: starts or []}
    with replaced(path) as stream:
        stream.write((json.dumps(facts, indent=2) + "\n").encode())


def _earlier_starts(path: Path) -> list[Any] | None:
    """Return the facts of the starts in the file `path`, the oldest first; None if the file is unreadable."""
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(facts, dict) or not isinstance(earlier := facts.pop(_EARLIER, []), list):
        return None
    return [*earlier, facts]


def _facts(places: Sequence[Place]) -> dict[str, Any]:
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": _versions(),
        "commit": _commits(Path(torchtitan_lite.__file__), Path(os.curdir)),
        "command": shlex.join(sys.orig_argv),
        "working_directory": _working_directory(),
        "host": places[0].host,
        "ranks": len(places),
        "ranks_on_hosts": Counter(place.host for place in places),
        "devices": Counter(place.device for place in places),
    }


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # the folder has been removed since the program's start
        return None


def _versions() -> dict[str, str]:
    found = {
        "torchtitan_lite": torchtitan_lite.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    cuda = torch.version.cuda
    return found if cuda is None else {**found, "cuda": cuda}


def _commits(module: Path, directory: Path) -> dict[str, str]:
    """Return the commit of the package's checkout and, if it is another, of the repository of `directory`.

    A commit ends with "-dirty" if its files have been changed since. A missing entry means that there is no
    repository, or no git.

    Args:
        module: a file of the package. An installed package may be in a repository that does not track it.
    """
    is_tracked = _git(module.parent, "ls-files", "--error-unmatch", module.name) is not None
    own, other = (_git(folder, "rev-parse", "--show-toplevel") for folder in (module.parent, directory))
    roots = {"torchtitan_lite": own if is_tracked else None}
    if other != roots["torchtitan_lite"]:
        roots["working_directory"] = other
    # git describe --always names the commit itself, and --exclude keeps it from naming a tag.
    describe = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    commits = {name: _git(Path(root), *describe) for name, root in roots.items() if root}
    return {name: commit for name, commit in commits.items() if commit}


def _git(folder: Path, *words: str) -> str | None:
    """Return what `git words` prints in `folder`; None if git is absent, fails or is too slow."""
    # These variables, which git sets for its hooks, name another repository than that of `folder`.
    environment = {key: value for key, value in os.environ.items() if key not in _OF_GIT_HOOKS}
    try:
        done = subprocess.run(
            ["git", *words],
            cwd=folder,
            env={**environment, "GIT_OPTIONAL_LOCKS": "0"},  # git then writes nothing to the repository
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def _cpu_name() -> str:
    """Return the name of the CPU's model, or its architecture if the system does not tell the name."""
    try:
        if sys.platform == "darwin":
            words = ["sysctl", "-n", "machdep.cpu.brand_string"]
            done = subprocess.run(words, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
            return done.stdout.strip() or platform.machine()
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.machine()
