"""The last lines of a run: losses, a sample of text, its files, and the commands that are of use next."""

import contextlib
import os
import shlex
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from torchtitan_lite.checkpoint.steps import Steps
from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.data import DataConfig, Jsonl, PythonStdlib, Text
from torchtitan_lite.inference.sample import TEMPERATURE
from torchtitan_lite.launch import command
from torchtitan_lite.launch.log import COLUMNS, say
from torchtitan_lite.models.huggingface import export_problems
from torchtitan_lite.training.hooks.console import duration
from torchtitan_lite.training.outputs import shortened
from torchtitan_lite.training.trainer import Trainer

_MEASURE = "Measure the loss"


def say_losses(trainer: Trainer, seconds: float) -> None:
    """Print how far the run has come, and the last losses. `seconds` is the duration of this process."""
    state, last = trainer.state, trainer.last
    own, tokens = state.step - state.steps_before, state.n_tokens_seen
    say(f"{own:,} steps in {duration(seconds)}; the run is at step {state.step:,}, after {tokens:,} tokens")
    if last is not None:
        say(f"Training loss: {last.loss:.4f} nats per token at step {last.step}")
    if trainer.validations and (last is None or trainer.validations[-1].step > state.steps_before):
        first, result = trainer.validations[0], trainer.validations[-1]
        before = "" if first is result else f" ({first.loss:.4f} at step {first.step})"
        say(f"Validation loss: {result.loss:.4f} nats per token at step {result.step}{before}")
        say(
            f"In nats per byte: {result.nats_per_byte:.4f}, "
            f"where byte frequencies alone give {result.unigram_entropy:.4f}"
        )


def say_sample(text: str, step: int) -> None:
    """Print a text that the model of the saved `step` has written, in lines that fit a terminal."""
    say(f"A text that the model of step {step} writes:")
    for line in text.strip("\n").split("\n"):
        shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line.expandtabs(4))
        for part in _parts(shown, COLUMNS - 4):
            say(f"  | {part}".rstrip(), fold=False)


def _parts(text: str, columns: int) -> Iterator[str]:
    """Yield `text` in parts of at most `columns` columns. A Chinese character, for example, takes two."""
    part, used = "", 0
    for character in text:
        width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used + width > columns:
            yield part
            part, used = "", 0
        part, used = part + character, used + width
    yield part


def say_resume(job: JobConfig, folder: Path, argv: Sequence[str], reason: str) -> None:
    """Print the command that goes on from the step that a stopped run in `folder` has saved.

    Args:
        argv: the options of this process.
        reason: the reason why the run stopped, and what it has saved.
    """
    options = [] if job.job.dump_folder else ["--job.dump-folder", str(folder)]
    if job.checkpoint.load_step >= 0:  # it would go back to that step again
        options += ["--checkpoint.load-step", "-1"]
    words = command.again(argv)
    if words is not None:
        say(f"{reason}; go on with:")
        say(shlex.join([*words, *options]), fold=False)
        return
    say(f"{reason}; go on with the same command{' and:' if options else ''}")
    if options:
        say(shlex.join(options), fold=False)


def say_files(trainer: Trainer, folder: Path) -> None:
    """Print where the files of the run in `folder` are, and the next commands, each on a line of its own."""
    job = trainer.job
    say(f"Files: {folder}", fold=False)
    if not job.checkpoint.enable:
        say("No step was saved: --checkpoint.enable saves the model.")
    for purpose, words in next_commands(trainer, folder).items():
        say(f"{purpose}:")
        reads_here = bool(job.job.plugins) or (purpose == _MEASURE and _is_relative(job.data))
        say(_change_of_folder() * reads_here + shlex.join(words), fold=False)
    if job.metrics.enable_tensorboard:
        logs = str(folder / job.metrics.save_tb_folder)
        say("TensorBoard:")
        say(shlex.join([sys.executable, "-m", "tensorboard.main", "--logdir", logs]), fold=False)


def _is_relative(data: DataConfig) -> bool:
    """Return True if the path of the text is relative to the working directory."""
    return isinstance(data, Text | Jsonl) and not os.path.isabs(os.path.expanduser(data.path))


def _change_of_folder() -> str:
    """Return the start of a command line that reads files, or modules, of the working directory."""
    with contextlib.suppress(OSError):  # the working directory may have been removed
        return f"cd {shlex.quote(os.getcwd())} && "
    return ""


def next_commands(trainer: Trainer, folder: Path) -> dict[str, list[str]]:
    """Return the commands that use the newest step of the run in `folder`. Without a step there are none.

    A command that this run's model or data does not allow is left out.
    """
    job = trainer.job
    if not job.checkpoint.enable or not Steps(folder / job.checkpoint.folder).published():
        return {}
    plugins = ["--plugins", *job.job.plugins] if job.job.plugins else []
    start = command.program(needs_modules=bool(plugins))
    found = {
        "Write text": [*start, "generate", str(folder), "--temperature", str(TEMPERATURE), *plugins],
    }
    if (text := _text_to_evaluate(trainer)) is not None:
        found[_MEASURE] = [*start, "eval", str(folder), *text, *plugins]
    if not export_problems(job.decoder, "model"):
        out = str(_free(folder.with_name(f"{shortened(folder.name)}-hf")))
        found["Export to Hugging Face's format"] = [
            *(*start, "export-hf", str(folder), "--out", out),
            *plugins,
        ]
    return found


def _text_to_evaluate(trainer: Trainer) -> list[str] | None:
    """Return the options of `eval` for a text: [] for the held-out text, None if no text is known."""
    if trainer.corpus.shards.validation.n_tokens >= trainer.job.training.seq_len:
        return []
    return _text_options(trainer.job.data)


def _text_options(data: DataConfig) -> list[str] | None:
    if isinstance(data, PythonStdlib):
        return ["--data", data.dataset]
    if not isinstance(data, Text | Jsonl):
        return None
    options = ["--data", str(Path(data.path).expanduser().absolute())]
    return [*options, "--field", data.field] if isinstance(data, Jsonl) else options


def _free(path: Path) -> Path:
    """Return `path`, with a number added to its name if the name is taken."""
    number = 1
    while (found := path if number == 1 else path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return found
