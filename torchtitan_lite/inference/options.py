"""The options of the commands that use a trained model."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from torchtitan_lite.attention import Sdpa
from torchtitan_lite.config.load import MISSING, Problem
from torchtitan_lite.models.registry import AnyAttention

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class _OfRun:
    """A trained model, and the parts of its run that a command needs."""

    tokenizer: str = ""
    """File or folder of the tokenizer, if it has moved since the run."""
    plugins: tuple[str, ...] = ()
    """The run's job.plugins: modules to import first. A checkpoint imports no module by itself."""


@dataclass(frozen=True, kw_only=True)
class _Use(_OfRun):
    """How the model is computed."""

    device: Device = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU."""
    attention: AnyAttention = dataclasses.field(default_factory=Sdpa)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(_Use):
    """Continue prompts with a trained model: torchtitan-lite generate RUN_OR_STEP --prompt "Once upon" """

    prompt: Annotated[tuple[str, ...], Field(min_length=1, examples=["some text"])] = ("",)
    """Texts to continue, all at once: one after the other, or a JSON list."""
    max_new_tokens: Annotated[int, Field(ge=1, le=2**20, examples=[128])] = 128
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """The logits are divided by this number; 0: always the likeliest token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from this many of the likeliest tokens; 0: from all."""
    top_p: Annotated[float, Field(gt=0, le=1, examples=[1.0])] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    seed: Annotated[int, Field(ge=0)] = 0


@dataclass(frozen=True, kw_only=True)
class EvalConfig(_Use):
    """Measure how well a trained model predicts text: torchtitan-lite eval RUN_OR_STEP --data FILE"""

    data: str = ""
    """A text file, a .jsonl file, a folder of either, or "python_stdlib". Empty: the run's held-out text."""
    field: str = "text"
    """Key of the text in the JSON objects of a .jsonl file."""
    seq_len: Annotated[int, Field(ge=0)] = 0
    """Tokens of a sample; 0: as in the run's training."""
    cache_dir: str = ""
    """Folder for the tokens of the text; empty: as in training."""
    batch_size: Annotated[int, Field(ge=1)] = 8


@dataclass(frozen=True, kw_only=True)
class ExportConfig(_OfRun):
    """Write a trained model for transformers and others: torchtitan-lite export-hf RUN_OR_STEP --out DIR"""

    out: str = ""
    """The new folder."""
    dtype: Dtype = "bfloat16"
    """Precision of the weights."""


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Turn a Hugging Face model into a step, to start runs with: torchtitan-lite import-hf PATH --out DIR"""

    out: str = ""
    """The new folder, for checkpoint.initial_load_path."""


def out_problems(config: object, *_: object) -> list[Problem]:
    """An output folder that is not named, or that is not empty, if the command writes one."""
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
