"""The command `torchtitan-lite`: train a model, use a trained model, or list the presets and backends.

This file also runs by its path, from any folder, without an installation. Imports are inside the functions:
the usage and the versions need no slow import, such as torch.
"""

import platform
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NoReturn

if not __package__:
    # If the file is run by its path, Python searches its folder for imports first. Remove that folder.
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]

USAGE = """\
usage: torchtitan-lite COMMAND

  train [options]                  train a model
  launch [torchrun's options] train.py [options]
                                   torchrun that lets all ranks save first
  generate RUN_OR_STEP [options]   continue a prompt with a trained model
  eval RUN_OR_STEP [options]       measure how well a model predicts text
  export-hf RUN_OR_STEP --out DIR  write a model for transformers and vLLM
  import-hf PATH --out DIR         turn a Hugging Face model into a step
  models                           list the presets of every model family
  attention                        list the attention backends that run here
  help [COMMAND]                   show this text, or the options of a command

`torchtitan-lite --version` shows the versions of the package and of torch.
models and attention take --plugins MODULE ..., and list its members too.
"""
_LISTING_OPTIONS = ("--plugins", "-h", "--help")
_WIDTH = 100
"""The most columns of the attention listing."""
TRAINED = ("generate", "eval", "export-hf", "import-hf")
"""The commands that use a trained model."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default this process's), and return the exit status."""
    from torchtitan_lite.launch.output import protect

    protect()
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if command == "help" and rest:
        command, *rest = [*rest, "--help"]
    # The words after the script that torchrun is to launch are the script's.
    if "--version" in (command, *(rest[:1] if command == "launch" else rest)):
        print(versions())
        return 0
    if command == "train":
        from torchtitan_lite import train

        return train.main(rest, prog="torchtitan-lite train")
    if command == "launch":
        from torchtitan_lite.launch import torchrun

        return torchrun.main(rest)
    if command in TRAINED:
        from torchtitan_lite.launch.process import ending_at_interrupt

        with ending_at_interrupt():
            from torchtitan_lite.inference.commands import run
        return run(command, rest)
    # The text before "=" is an option; the words after --plugins are its value.
    if command in LISTINGS and (not rest or rest[0].partition("=")[0] in _LISTING_OPTIONS):
        return _list(command, rest)
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    print(_refusal(command, rest), file=sys.stderr)
    return 2


def versions() -> str:
    """Return a line with the versions of this package, torch and Python, without an import of torch."""
    from torchtitan_lite import __version__

    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "is not installed"
    return f"torchtitan_lite {__version__}, torch {torch}, Python {platform.python_version()}"


@dataclass(frozen=True, kw_only=True)
class Plugins:
    """The option of the commands that print a list."""

    plugins: tuple[str, ...] = ()
    """Modules to import first. The list then includes what these modules add."""


@dataclass(frozen=True, kw_only=True)
class ModelsConfig(Plugins):
    """List the presets of every model family with their parameter counts."""


@dataclass(frozen=True, kw_only=True)
class AttentionListConfig(Plugins):
    """List the attention backends, what each can do, and what runs on this machine."""


def _list(command: str, argv: Sequence[str]) -> int:
    """Print the listing of `command`, as its options `argv` say, and return the exit status."""
    from torchtitan_lite.launch.process import ending_at_interrupt

    with ending_at_interrupt():
        # Register our own members first. A plugin that takes one of their names is then refused.
        from torchtitan_lite.config import job  # noqa: F401
        from torchtitan_lite.config.load import load
        from torchtitan_lite.launch.end import status_of

    options, listing = LISTINGS[command]
    try:
        load(options, argv, prog=f"torchtitan-lite {command}", plugins="plugins", of_a_run=False)
        print("\n".join(listing()), flush=True)
    except BaseException as error:  # noqa: BLE001 - status_of raises it again unless one line explains it
        return status_of(error)
    return 0


def models() -> list[str]:
    """Return the lines of a table with a row for each size of each model family."""
    from torchtitan_lite.models.registry import families

    rows: list[tuple[str, ...]] = [
        ("name", "flavor", "parameters", "layers", "dim", "heads", "kv heads", "longest sequence")
    ]
    for name, sizes in families.items():
        for size, config in sizes.items():
            counts = (config.n_params, config.n_layers, config.dim, config.n_heads, config.n_kv_heads)
            rows.append((name, size, *(f"{count:,}" for count in counts), f"{config.max_seq_len:,}"))
    suffixes = "every flavor also comes as <flavor>_flex, <flavor>_flex_flash and <flavor>_varlen"
    return [*_aligned(rows, left=2), "", suffixes]


def attention() -> list[str]:
    """Return the lines of a table of attention implementations, and the kernel that `varlen` uses here.

    The table is too wide for one line per implementation, so the later columns stand below the row.
    """
    import torch

    from torchtitan_lite import registry
    from torchtitan_lite.attention import Varlen
    from torchtitan_lite.attention.capabilities import table

    implementations = [can for backend in registry.attentions.members.values() for can in backend.supports]
    header, *words = table(implementations)
    here = ["on this machine", *(can.missing() or "yes" for can in implementations)]
    columns = [(*row[:3], last) for row, last in zip([header, *words], here, strict=True)]
    title, *rows = _aligned(columns, left=4)
    lines = _folded(title)
    for row, facts in zip(rows, words, strict=True):
        *others, needs = (f"{name}: {fact}" for name, fact in zip(header[3:], facts[3:], strict=True))
        lines += [*_folded(row), *_folded("; ".join(others), indent=4), *_folded(needs, indent=4)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = Varlen().resolve(device)
    return [
        *lines,
        "",
        f'kind = "varlen", kernel = "auto" comes to "{kernel}" on {device}',
    ]


def _folded(text: str, indent: int = 0) -> list[str]:
    """Return `text` as lines of at most `_WIDTH` columns, all indented, the later lines by two more."""
    first = " " * indent
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=f"{first}  ", break_on_hyphens=False
    )


def _aligned(rows: Sequence[tuple[str, ...]], left: int) -> list[str]:
    """Return the rows as lines. The first `left` columns are aligned left, the other columns right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if column < left else ">" for column in range(len(widths))]
    line = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [line.format(*row).rstrip() for row in rows]


def _refusal(command: str, rest: Sequence[str]) -> str:
    if command in LISTINGS:
        return f"torchtitan-lite {command} takes no option but --plugins: leave out {' '.join(rest)}"
    if command:
        from torchtitan_lite.config.problem import near

        commands = ("train", "launch", *TRAINED, *LISTINGS, "help", "--help", "--version")
        return f"torchtitan-lite {command} is not a command: {near(command, commands)}"
    return USAGE.rstrip()


LISTINGS: dict[str, tuple[type, Callable[[], list[str]]]] = {
    "models": (ModelsConfig, models),
    "attention": (AttentionListConfig, attention),
}
"""The commands that print a list: the options of each, and the function that returns its lines."""


def program() -> NoReturn:
    """Run the command line of this process, and end the process with the exit status."""
    from torchtitan_lite.launch.process import end_process

    end_process(main())


if __name__ == "__main__":
    program()
