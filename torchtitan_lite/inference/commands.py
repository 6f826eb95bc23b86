"""The commands of `torchtitan-lite` that need a trained model: generate, eval, export-hf, import-hf."""

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtitan_lite import registry
from torchtitan_lite.attention import AttentionConfig, refusals
from torchtitan_lite.checkpoint.ranks import Ranks
from torchtitan_lite.config.load import MISSING, ConfigError, Problem, load
from torchtitan_lite.config.validation import validate
from torchtitan_lite.data import (
    DataConfig,
    Jsonl,
    PythonStdlib,
    Split,
    Text,
    Tokenizer,
    load_tokenizer,
    prepare,
)
from torchtitan_lite.inference.evaluate import evaluate
from torchtitan_lite.inference.generate import Sampling, generate
from torchtitan_lite.inference.options import (
    Device,
    EvalConfig,
    ExportConfig,
    GenerateConfig,
    ImportConfig,
    out_problems,
)
from torchtitan_lite.inference.trained import (
    KEY,
    Trained,
    build,
    find,
    lay_out_for_text,
    told_as,
    told_of_step,
)
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.parallel.world import join, leave
from torchtitan_lite.training import hub
from torchtitan_lite.training.record import ranks_of

T = TypeVar("T")
_KEYS = {
    "data.path": "data",
    "data.field": "field",
    "data.cache_dir": "cache_dir",
    "training.seq_len": "seq_len",
}
_SEQ_LEN = 2048
"""Tokens of a sample of an evaluation, at the most, of a model that was not trained here."""


def run(command: str, argv: Sequence[str]) -> int:
    """Do what the command line says; the exit status."""
    commands: dict[str, Callable[[str, Sequence[str]], None]] = {
        "generate": _generate,
        "eval": _eval,
        "export-hf": _export,
        "import-hf": _import,
    }
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # whatever the model says
    place = argv[0] if argv and not argv[0].startswith("-") else ""
    try:
        _check_ranks(command)
        commands[command](place, argv[1:] if place else argv)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output, such as `head`, has had enough; Python would complain again on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _check_ranks(command: str) -> None:
    """Raise ConfigError where torchrun has started several processes of what is done by one."""
    n_ranks = os.environ.get("WORLD_SIZE", "1")
    if command != "generate" and n_ranks != "1":
        rule, remedy = (
            f"is more than {command} needs",
            f"start it without torchrun: torchtitan-lite {command}",
        )
        raise ConfigError([Problem("WORLD_SIZE", n_ranks, rule, remedy)])


def _read(
    cls: type[T],
    command: str,
    place: str,
    argv: Sequence[str],
    name: str = KEY,
    check: Callable[[T], list[Problem]] = lambda config: [],
) -> T:
    loaded = load(
        cls,
        argv,
        prog=f"torchtitan-lite {command} {name}",
        check=lambda config, *_: check(config),
        plugins="plugins",
    )
    if loaded.dry_run:
        raise ConfigError([Problem("--dry-run", MISSING, "is for training", "leave it out")])
    if not place:
        rule, remedy = "is not named", f"write torchtitan-lite {command} FOLDER"
        raise ConfigError([Problem(name, MISSING, rule, remedy)])
    return loaded.config


def _generate(place: str, argv: Sequence[str]) -> None:
    config = _read(GenerateConfig, "generate", place, argv)
    device, dtype = _device(config.device), _dtype(config.dtype, config.device)
    world = join(device.type)
    ranks = ranks_of(world)
    try:
        trained = find(place, ranks, config.tokenizer)
        _check(trained.config, config.attention, device, dtype)
        tensor = _mesh(trained.config, device, world.size)
        model = build(
            trained, attention=config.attention, device=device, dtype=dtype, ranks=ranks, tensor=tensor
        )
        if device.type == "cpu" and tensor is None:
            lay_out_for_text(model, len(config.prompt))
        tokenizer = trained.tokenizer
        prompts = [_prompt(tokenizer, text) for text in config.prompt]
        writer = _Stream(tokenizer, prompts) if world.is_first else None
        generate(
            model,
            prompts,
            max_new_tokens=config.max_new_tokens,
            eos_id=tokenizer.stop_ids,
            sampling=Sampling(
                temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed
            ),
            on_tokens=writer or (lambda tokens: None),
        )
        if writer is not None:
            writer.end()
        leave()
    except BaseException:
        leave(wait=False)
        raise


def _prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a prompt; where it is empty, what every document comes after."""
    return tokenizer.encode(text).tolist() or [tokenizer.eos_id]


class _Stream:
    """Prints the texts as they come, one after the other: one waits for those before it to end."""

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> None:
        self._tokenizer = tokenizer
        self._tokens, self._ended = [list(prompt) for prompt in prompts], [False] * len(prompts)
        self._row = self._n_shown = 0
        self._show()

    def __call__(self, tokens: Sequence[int | None]) -> None:
        for row, token in enumerate(tokens):
            if token is None:
                self._ended[row] = True
            else:
                self._tokens[row].append(token)
        self._show()

    def end(self) -> None:
        """No more tokens come."""
        self._ended = [True] * len(self._ended)
        self._show()

    def _show(self) -> None:
        while self._row < len(self._tokens):
            ended = self._ended[self._row]
            text = self._tokenizer.decode(self._tokens[self._row])
            # A character of several tokens is not there yet; later ones can change nothing before it.
            end = len(text) if ended else len(text.rstrip("\N{REPLACEMENT CHARACTER}"))
            if end > self._n_shown:
                print(text[self._n_shown : end], end="", flush=True)
                self._n_shown = end
            if not ended:
                return
            print(f"\n{'-' * 20}" if len(self._tokens) > 1 else "", flush=True)
            self._row, self._n_shown = self._row + 1, 0


def _eval(place: str, argv: Sequence[str]) -> None:
    config = _read(EvalConfig, "eval", place, argv)
    device, dtype = _device(config.device), _dtype(config.dtype, config.device)
    trained = find(place, Ranks(), config.tokenizer)
    _check(trained.config, config.attention, device, dtype)
    split = _text(config, trained)
    longest = min(trained.config.max_seq_len, _SEQ_LEN)
    seq_len = config.seq_len or trained.found.state.identity.get("training.seq_len", longest)
    model = build(trained, attention=config.attention, device=device, dtype=dtype, ranks=Ranks())
    parts = {"seq_len": seq_len, "batch_size": config.batch_size, "rest": bool(config.data)}
    with told_as(_KEYS):
        found = evaluate(model, split, **parts)
    print(
        f"loss {found.loss:.4f} nats per token, perplexity {found.perplexity:.2f}, "
        f"{found.bits_per_byte:.4f} bits per byte; {found.n_tokens:,} tokens, {found.n_bytes:,} bytes"
    )


def _text(config: EvalConfig, trained: Trained) -> Split:
    """The text to evaluate on: all of what is named, or what the run held out."""
    if config.data:
        with told_as(_KEYS):
            return prepare(_named_data(config), trained.tokenizer).train
    where = str(trained.found.folder)
    data = _saved_data(config, trained.found.state.config.get("data"), where)
    split = prepare(data, trained.tokenizer).validation if data else None
    if split is None or split.n_tokens == 0:
        raise ConfigError([Problem(KEY, where, "has no held-out text", "name a text with --data")])
    return split


def _saved_data(config: EvalConfig, saved: object, where: str) -> DataConfig | None:
    """The data section of the run; None where the step does not say."""
    if not isinstance(saved, dict) or not isinstance(name := saved.get("dataset"), str):
        return None
    if name not in registry.datasets.members:
        rule = f'was trained on the dataset "{name}", which is not registered'
        raise ConfigError([Problem(KEY, where, rule, "name the module that has it with --plugins")])
    # Keys that the dataset does not have are of another version.
    data, _ = validate(registry.datasets.members[name], [saved])
    return replace(data, cache_dir=config.cache_dir or data.cache_dir)


def _named_data(config: EvalConfig) -> DataConfig:
    """All of the text that is named."""
    common: dict[str, Any] = {"validation_fraction": 0.0, "cache_dir": config.cache_dir}
    if config.data == "python_stdlib":
        return PythonStdlib(**common)
    path = Path(os.path.expanduser(config.data))
    is_jsonl = path.suffix == ".jsonl" or (path.is_dir() and any(path.rglob("*.jsonl")))
    json, text = Jsonl(path=str(path), field=config.field, **common), Text(path=str(path), **common)
    data = json if is_jsonl else text
    if problems := data.problems("data"):
        raise ConfigError(problems)
    return data


def _export(place: str, argv: Sequence[str]) -> None:
    config = _read(ExportConfig, "export-hf", place, argv, check=out_problems)
    trained = find(place, Ranks(), config.tokenizer)
    out = Path(os.path.expanduser(config.out)).absolute()
    with _writing(config.out), told_of_step(place):
        hub.export(trained.found, trained.tokenizer, out, getattr(torch, config.dtype))
    print(f"Files: {out}")


def _import(place: str, argv: Sequence[str]) -> None:
    config = _read(ImportConfig, "import-hf", place, argv, "PATH", check=out_problems)
    folder, out = (Path(os.path.expanduser(path)).absolute() for path in (place, config.out))
    with told_as({"data.tokenizer": "PATH"}):
        tokenizer = load_tokenizer(str(folder)) if (folder / "tokenizer.json").is_file() else None
    with _writing(config.out):
        hub.import_(folder, out, tokenizer)
    print(f"Step: {out / 'step-0'}; start a run with it: --checkpoint.initial-load-path {out}")


@contextmanager
def _writing(out: str) -> Iterator[None]:
    """Within it, what cannot be written to the folder `out` is a ConfigError."""
    try:
        yield
    except OSError as error:
        rule, remedy = f"cannot be written ({error})", "name a folder that you can write to"
        raise ConfigError([Problem("out", out, rule, remedy)]) from None


def _device(name: Device) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        rule, remedy = "is not available, as torch finds no GPU", 'use "cpu" or "auto"'
        raise ConfigError([Problem("device", name, rule, remedy)])
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _dtype(name: str, device: Device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if _device(device).type == "cuda" else torch.float32
    return getattr(torch, name)


def _check(
    config: DecoderConfig, attention: AttentionConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise ConfigError where the backend cannot run this model here."""
    refused = refusals(
        attention,
        device=device.type,
        dtype=dtype,
        head_dim=config.head_dim,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        sliding_window=config.sliding_window,
        deterministic=False,
    )
    if refused:
        raise ConfigError(
            [Problem(f"attention.{name}", value, rule, remedy) for name, value, rule, remedy in refused]
        )


def _mesh(config: DecoderConfig, device: torch.device, n_ranks: int) -> DeviceMesh | None:
    """All ranks that torchrun has started, as one tensor-parallel group."""
    if n_ranks == 1 or not dist.is_initialized():
        return None
    wrong = [name for name, size in config.splits.items() if size % n_ranks]
    if wrong:
        rule = f"does not divide the model's {wrong[0]} = {config.splits[wrong[0]]}"
        remedy = "start a number of ranks that divides it"
        raise ConfigError([Problem("WORLD_SIZE", n_ranks, rule, remedy)])
    return init_device_mesh(device.type, (n_ranks,))
