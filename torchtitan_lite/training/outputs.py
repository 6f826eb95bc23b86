"""The run's own folder: config.toml, metrics.jsonl, the TensorBoard and trace folders, and exit.json."""

import json
import time
from pathlib import Path

_FILES = ("config.toml", "metrics.jsonl", "exit.json")
_EARLIER = "earlier"


def is_inside(subfolder: str) -> bool:
    """Whether a configured subfolder stays within the run's folder and is nothing else that is there."""
    path = Path(subfolder)
    inside = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return inside and path.parts[0] not in (*_FILES, _EARLIER)


def new_folder(dump_folder: str, name: str, flavor: str, subfolders: tuple[str, ...] = ()) -> Path:
    """Make the run's folder: `dump_folder` as given, or `outputs/<name>-<flavor>-<time>` when that is empty.

    What an earlier run left in a given folder, `subfolders` included, moves to a folder `earlier` inside it:
    two runs in one metrics file would read as one.
    """
    if not dump_folder:
        return _free_folder(Path("outputs").absolute(), f"{name}-{flavor}-{time.strftime('%Y%m%d-%H%M%S')}")
    folder = Path(dump_folder).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    names = (*_FILES, *(Path(subfolder).parts[0] for subfolder in subfolders))
    left = [folder / name for name in names if (folder / name).exists()]
    if left:
        earlier = _free_folder(folder, _EARLIER)
        for path in left:
            path.rename(earlier / path.name)
    return folder


def write_exit(
    folder: Path, status: int, outcome: str, *, step: int | None = None, message: str = ""
) -> None:
    """Say in `exit.json` how the run ended, for programs that torchrun tells no more than 0 or 1."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"status": status, "outcome": outcome, "step": step, "message": message}
    partial = folder / "exit.json.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / "exit.json")


def write_refusal(folder: Path, message: str) -> None:
    """Say in `exit.json` that a start was refused; what it said of an earlier run moves to `earlier`."""
    if (folder / "exit.json").exists():
        (folder / "exit.json").rename(_free_folder(folder, _EARLIER) / "exit.json")
    write_exit(folder, 2, "refused", step=0, message=message)


def _free_folder(parent: Path, stem: str) -> Path:
    """A new folder in `parent`, with a number added to its name when that is taken."""
    for number in range(1, 10_000):
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{parent / stem} and 9998 more are taken")
