"""The command `torchtitan-lite`: train a model, use a trained model, or list the presets and backends."""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

USAGE = """\
usage: torchtitan-lite COMMAND

  train [options]                   train a model; `torchtitan-lite train --help` lists the options
  launch [torchrun's options] train.py [options]
                                    torchrun that waits until the ranks have saved, for schedulers
  generate RUN_OR_STEP [options]    continue a prompt with a trained model
  eval RUN_OR_STEP [options]        measure how well a trained model predicts a text
  export-hf RUN_OR_STEP --out DIR   write a trained model for transformers, vLLM and others
  import-hf PATH --out DIR          turn a Hugging Face model into a step, to start runs with
  models                            list the presets of every family with their parameter counts
  attention                         list the attention backends, what each can do, and what runs here

models and attention take --plugins MODULE ..., and then also list what these modules add.
"""
TRAINED = ("generate", "eval", "export-hf", "import-hf")
"""The commands that use a trained model."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default this process's), and return the exit status."""
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if command == "train":
        from torchtitan_lite import train

        return train.main(rest, prog="torchtitan-lite train")
    if command == "launch":
        from torchtitan_lite.launch import torchrun

        return torchrun.main(rest)
    if command in TRAINED:
        from torchtitan_lite.inference.commands import run

        return run(command, rest)
    if command in LISTINGS and rest[:1] in ([], ["--plugins"]):
        return _list(LISTINGS[command], rest[1:])
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    print(_refusal(command, rest), file=sys.stderr)
    return 2


def _list(listing: Callable[[], list[str]], plugins: Sequence[str]) -> int:
    """Print a listing, including what `plugins` add, and return the exit status."""
    # Register our own members first. A plugin that takes one of their names is then refused.
    from torchtitan_lite.config import job  # noqa: F401
    from torchtitan_lite.config.load import ConfigError
    from torchtitan_lite.launch.end import status_of
    from torchtitan_lite.registry import import_plugins

    try:
        if problems := import_plugins(plugins, [], "plugins"):
            raise ConfigError(problems)
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
    """Return the lines of a table of attention implementations, and the kernel that `varlen` uses here."""
    import torch

    from torchtitan_lite import registry
    from torchtitan_lite.attention import Varlen
    from torchtitan_lite.attention.capabilities import table

    implementations = [can for backend in registry.attentions.members.values() for can in backend.supports]
    header, *words = table(implementations)
    here = [(can.missing() or "yes",) for can in implementations]
    rows = [(*header, "on this machine"), *((*row, *last) for row, last in zip(words, here, strict=True))]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kernel = Varlen().resolve(device)
    return [
        *_aligned(rows, left=len(rows[0])),
        "",
        f'kind = "varlen", kernel = "auto" comes to "{kernel}" on {device}',
    ]


def _aligned(rows: Sequence[tuple[str, ...]], left: int) -> list[str]:
    """Return the rows as lines. The first `left` columns are aligned left, the other columns right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<" if column < left else ">" for column in range(len(widths))]
    line = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [line.format(*row).rstrip() for row in rows]


def _refusal(command: str, rest: Sequence[str]) -> str:
    from torchtitan_lite.config.load import near

    if command in LISTINGS:
        return f"torchtitan-lite {command} takes no option but --plugins: leave out {' '.join(rest)}"
    if command:
        commands = ("train", "launch", *TRAINED, *LISTINGS)
        return f"torchtitan-lite {command} is not a command: {near(command, commands)}"
    return USAGE.rstrip()


LISTINGS = {"models": models, "attention": attention}
"""The commands that print a list."""


def program() -> NoReturn:
    """Run the command line of this process, and end the process with the exit status."""
    from torchtitan_lite.launch.process import end_process

    end_process(main())


if __name__ == "__main__":
    program()
