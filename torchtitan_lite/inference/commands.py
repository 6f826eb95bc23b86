"""The commands of `torchtitan-lite` that need a trained model: generate, eval, export-hf, import-hf."""

import logging
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from torchtitan_lite import registry
from torchtitan_lite.attention import AttentionConfig, Sdpa
from torchtitan_lite.checkpoint.restore import refusing_bad_step
from torchtitan_lite.config.load import MISSING, ConfigError, Problem, load
from torchtitan_lite.config.validation import validate
from torchtitan_lite.data import (
    DataConfig,
    Jsonl,
    PythonStdlib,
    Split,
    Text,
    load_tokenizer,
    prepare,
)
from torchtitan_lite.inference.evaluate import evaluate
from torchtitan_lite.inference.generate import Sampling, generate
from torchtitan_lite.inference.printer import PRINTERS
from torchtitan_lite.inference.trained import (
    KEY,
    Trained,
    build,
    find_trained,
    lay_out_for_text,
    renaming_keys,
)
from torchtitan_lite.launch.end import status_of
from torchtitan_lite.launch.scheduler import adopt
from torchtitan_lite.launch.world import World, join, leave
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.models.refusals import KEYS_OF_A_COMMAND, Conditions, attention_problems
from torchtitan_lite.models.registry import AnyAttention
from torchtitan_lite.training import hub

_LOG = logging.getLogger(__name__)

_KEYS = {  # a key of the run's configuration: the option of `eval` with the same meaning
    "data.path": "data",
    "data.field": "field",
    "data.cache_dir": "cache_dir",
    "data.max_lost_fraction": "max_lost_fraction",
    "training.seq_len": "seq_len",
}
_SEQ_LEN = 2048
"""The longest sample, in tokens, when `eval` does not know the length of the training samples."""


@dataclass(frozen=True, kw_only=True)
class _OfRun:
    """The options for finding the tokenizer and the plugins of a trained model."""

    tokenizer: str = ""
    """File or folder of the tokenizer, if it has moved since the run."""
    plugins: tuple[str, ...] = ()
    """Modules to import first: the run's job.plugins. A checkpoint imports no module by itself."""


@dataclass(frozen=True, kw_only=True)
class _Use(_OfRun):
    """The device, precision and attention backend of a model in use."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU."""
    attention: AnyAttention = field(default_factory=Sdpa)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Sampling, _Use):
    """Continue prompts with a trained model: torchtitan-lite generate RUN_OR_STEP --prompt "Once upon" """

    prompt: Annotated[tuple[str, ...], Field(min_length=1, examples=["some text"])] = ("",)
    """Texts to continue together: several arguments, or one JSON list."""
    max_new_tokens: Annotated[int, Field(ge=1, le=2**20, examples=[128])] = 128
    format: Literal["text", "json"] = "text"
    """text: for people, while the texts grow. json: a line for each text, with its prompt and the text."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(_Use):
    """Measure how well a trained model predicts text: torchtitan-lite eval RUN_OR_STEP --data FILE"""

    data: str = ""
    """A text file, a .jsonl file, a folder of such files, or "python_stdlib". Empty: the held-out text."""
    field: str = "text"
    """Key of the text in the JSON objects of a .jsonl file."""
    max_lost_fraction: Annotated[float, Field(ge=0, le=1)] = Text.max_lost_fraction
    """Share of the text in --data that may be left out because files are not UTF-8. 1 allows any loss."""
    seq_len: Annotated[int, Field(ge=0)] = 0
    """Tokens of a sample. 0: as many as in the run's training."""
    cache_dir: str = ""
    """Folder for the tokens of the text. Empty: the same folder as in training."""
    batch_size: Annotated[int, Field(ge=1)] = 8


@dataclass(frozen=True, kw_only=True)
class ExportConfig(_OfRun):
    """Write a trained model for transformers and others: torchtitan-lite export-hf RUN_OR_STEP --out DIR"""

    out: str = ""
    """The folder to write, new or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the weights."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Turn a Hugging Face model into a step, to start runs with: torchtitan-lite import-hf PATH --out DIR"""

    out: str = ""
    """The folder to write, new or empty. Pass it to a run as checkpoint.initial_load_path."""


def run(command: str, argv: Sequence[str]) -> int:
    """Run `command` with its arguments `argv`, and return the exit status."""
    options, act = _COMMANDS[command]
    path = argv[0] if argv and not argv[0].startswith("-") else ""
    try:
        act(path, _read(options, command, path, argv[1:] if path else argv))
    except BaseException as error:  # noqa: BLE001 - status_of raises it again unless one line explains it
        return status_of(error)
    return 0


def _read(options: type, command: str, path: str, argv: Sequence[str]) -> Any:
    """Return a command's options from `argv`.

    Raises ConfigError if the options are wrong, if `path` is empty, or if a launcher has started several
    processes, and the command needs only one process or the processes cannot meet.
    """
    adopted = adopt("-m torchtitan_lite.cli generate ..." if command == "generate" else "")
    n_ranks = os.environ.get("WORLD_SIZE", "1")
    if command != "generate" and n_ranks != "1":
        remedy = f"start it as one process: torchtitan-lite {command}"
        raise ConfigError([Problem("WORLD_SIZE", n_ranks, f"is more than {command} needs", remedy)])
    name = "PATH" if command == "import-hf" else KEY
    prog = f"torchtitan-lite {command} {name}"
    if issubclass(options, ExportConfig | ImportConfig):
        prog += " --out DIR"
    loaded = load(options, argv, prog=prog, check=_out_problems, plugins="plugins", of_a_run=False)
    if adopted.problems:
        raise ConfigError(adopted.problems)
    if not path:
        rule, remedy = "is not named", f"write torchtitan-lite {command} FOLDER"
        raise ConfigError([Problem(name, MISSING, rule, remedy)])
    return loaded.config


def _out_problems(config: object, *_: object) -> list[Problem]:
    """Return a problem if the command writes a folder and the folder has no name, or is not empty."""
    if not isinstance(config, ExportConfig | ImportConfig):
        return []
    if not config.out:
        return [Problem("out", MISSING, "has no value", "write --out FOLDER")]
    path = Path(os.path.expanduser(config.out)).absolute()
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            return [Problem("out", config.out, "is there already", "name another folder")]
    except OSError as error:
        return [Problem("out", config.out, f"cannot be read ({error.strerror})", "name another folder")]
    return []


def _generate(path: str, config: GenerateConfig) -> None:
    device, dtype = _placement(config)
    world = join(device.type)
    saving = world.saving
    try:
        trained = find_trained(path, saving, config.tokenizer)
        _check(trained.config, config.attention, device, dtype)
        model = build(trained, attention=config.attention, device=device, dtype=dtype, world=saving)
        if device.type == "cpu" and world.size == 1:
            lay_out_for_text(model, len(config.prompt))
        tokenizer = trained.tokenizer
        # An empty prompt becomes the token that ends a document, so that a new document begins.
        prompts = [tokenizer.encode(text).tolist() or [tokenizer.eos_id] for text in config.prompt]
        if world.is_first:
            longest = max(map(len, prompts))
            whole = f"prompt + max_new_tokens = {longest} + {config.max_new_tokens}"
            _warn_if_too_long(longest + config.max_new_tokens, whole, trained.config)
        printer = PRINTERS[config.format](tokenizer, config.prompt, prompts) if world.is_first else None
        generate(
            model,
            prompts,
            max_new_tokens=config.max_new_tokens,
            stop_ids=tokenizer.stop_ids,
            sampling=config,
            on_tokens=printer or (lambda tokens: None),
        )
        leave()
    except BaseException:
        leave(wait=False)
        raise


def _eval(path: str, config: EvalConfig) -> None:
    device, dtype = _placement(config)
    trained = find_trained(path, World(), config.tokenizer)
    _check(trained.config, config.attention, device, dtype)
    split = _text(config, trained)
    longest = min(trained.config.max_seq_len, _SEQ_LEN)
    seq_len = config.seq_len or trained.found.state.identity.get("training.seq_len", longest)
    _warn_if_too_long(seq_len, f"seq_len = {seq_len}", trained.config)
    model = build(trained, attention=config.attention, device=device, dtype=dtype, world=World())
    with renaming_keys(_KEYS):
        result = evaluate(model, split, seq_len=seq_len, batch_size=config.batch_size, rest=bool(config.data))
    print(
        f"loss {result.loss:.4f} nats per token, perplexity {result.perplexity:.2f}, "
        f"{result.bits_per_byte:.4f} bits per byte; {result.n_tokens:,} tokens, {result.n_bytes:,} bytes"
    )


def _warn_if_too_long(n_tokens: int, what: str, model: DecoderConfig) -> None:
    """Warn that `n_tokens`, described by `what`, are more than the model's max_seq_len, if they are."""
    if n_tokens > model.max_seq_len:
        _LOG.warning(
            "%s: more than the %d tokens that the model is meant for (max_seq_len), so it may predict badly",
            what,
            model.max_seq_len,
        )


def _text(config: EvalConfig, trained: Trained) -> Split:
    """Return the text to evaluate on: all of `config.data`, or if unset, the run's held-out text."""
    if config.data:
        with renaming_keys(_KEYS):
            return prepare(_named_data(config), trained.tokenizer).train
    where = str(trained.found.folder)
    data = _saved_data(config, trained.found.state.config.get("data"), where)
    split = prepare(data, trained.tokenizer).validation if data else None
    if split is None or split.n_tokens == 0:
        raise ConfigError([Problem(KEY, where, "has no held-out text", "name a text with --data")])
    return split


def _saved_data(config: EvalConfig, saved: object, where: str) -> DataConfig | None:
    """Return the data config of a run from `saved`, its `[data]` table, or None if there is no such table.

    `where` is the folder of the step that holds the table, for error messages.
    """
    if not isinstance(saved, dict) or not isinstance(name := saved.get("dataset"), str):
        return None
    if name not in registry.datasets.members:
        rule = f'was trained on the dataset "{name}", which is not registered'
        raise ConfigError([Problem(KEY, where, rule, "name the module that has it with --plugins")])
    # Ignore keys that the dataset does not have: another version of it wrote them.
    data, _ = validate(registry.datasets.members[name], [saved])
    return replace(data, cache_dir=config.cache_dir or data.cache_dir)


def _named_data(config: EvalConfig) -> DataConfig:
    """Return a data config that reads all of the text in `config.data`."""
    common: dict[str, Any] = {"validation_fraction": 0.0, "cache_dir": config.cache_dir}
    if config.data == "python_stdlib":
        return PythonStdlib(**common)
    path = Path(os.path.expanduser(config.data))
    common["path"] = str(path)
    lines = Jsonl(field=config.field, **common)
    data = lines if lines.has_jsonl() else Text(max_lost_fraction=config.max_lost_fraction, **common)
    if problems := data.problems("data"):
        raise ConfigError(problems)
    return data


def _export(path: str, config: ExportConfig) -> None:
    trained = find_trained(path, World(), config.tokenizer)
    out = Path(os.path.expanduser(config.out)).absolute()
    with _reporting_os_errors(config.out), refusing_bad_step(KEY, path):
        hub.export(trained.found, trained.tokenizer, out, config.dtype)
    print(f"Files: {out} ({config.dtype})")


def _import(path: str, config: ImportConfig) -> None:
    folder, out = (Path(os.path.expanduser(given)).absolute() for given in (path, config.out))
    with renaming_keys({"data.tokenizer": "PATH"}):
        tokenizer = load_tokenizer(str(folder)) if (folder / "tokenizer.json").is_file() else None
    with _reporting_os_errors(config.out):
        hub.import_(folder, out, tokenizer)
    options = ["--model.name", "hf", "--model.flavor", str(folder)]
    if tokenizer is not None:
        options += ["--data.tokenizer", str(folder)]
    print(f"Step: {out / 'step-0'}\nOptions of a run that starts with it:")
    print(shlex.join([*options, "--checkpoint.initial-load-path", str(out)]))


@contextmanager
def _reporting_os_errors(out: str) -> Iterator[None]:
    """A context manager: an OSError inside becomes a ConfigError about the folder `out`."""
    try:
        yield
    except OSError as error:
        rule, remedy = f"cannot be written ({error})", "name a folder that you can write to"
        raise ConfigError([Problem("out", out, rule, remedy)]) from None


def _placement(config: GenerateConfig | EvalConfig) -> tuple[torch.device, torch.dtype]:
    """Return the torch device and dtype for the options of a command, with "auto" resolved."""
    if config.device == "cuda" and not torch.cuda.is_available():
        rule, remedy = "is not available, as torch finds no GPU", 'use "cpu" or "auto"'
        raise ConfigError([Problem("device", config.device, rule, remedy)])
    is_cuda = config.device != "cpu" and torch.cuda.is_available()
    auto = "bfloat16" if is_cuda else "float32"
    dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
    return torch.device("cuda" if is_cuda else "cpu"), dtype


def _check(
    config: DecoderConfig, attention: AttentionConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise ConfigError if `attention` cannot run this model on `device` in `dtype`."""
    conditions = Conditions(decoder=config, device=device.type, dtype=dtype)
    if problems := attention_problems(attention, conditions, KEYS_OF_A_COMMAND):
        raise ConfigError(problems)


_COMMANDS: dict[str, tuple[type, Callable[[str, Any], None]]] = {
    "generate": (GenerateConfig, _generate),
    "eval": (EvalConfig, _eval),
    "export-hf": (ExportConfig, _export),
    "import-hf": (ImportConfig, _import),
}
"""The options class of each command, and the function that runs the command."""
