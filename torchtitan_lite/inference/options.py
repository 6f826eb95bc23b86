"""What the commands that use a trained model can be told."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchtitan_lite.attention import Sdpa
from torchtitan_lite.config.load import MISSING, Problem
from torchtitan_lite.models.registry import AnyAttention

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class _Use:
    """On what, and how, a trained model is used."""

    device: Device = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: float32 on a CPU, bfloat16 on a GPU."""
    attention: AnyAttention = dataclasses.field(default_factory=Sdpa)
    tokenizer: str = ""
    """File or folder of the tokenizer, where it is no longer where the run left it."""
    plugins: tuple[str, ...] = ()
    """The run's job.plugins: modules to import first, which a checkpoint never chooses by itself."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(_Use):
    """Let a trained model go on from prompts: torchtitan-lite generate RUN_OR_STEP --prompt "Once upon" """

    prompt: tuple[str, ...] = ("",)
    """Texts to go on from, all at once; several stand one after the other, or in a JSON list."""
    max_new_tokens: int = 128
    temperature: float = 0.0
    """Logits are divided by it before a token is drawn; 0: always the likeliest token."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that have this much of the probability between them."""
    seed: int = 0

    def problems(self) -> list[Problem]:
        """Values out of range."""
        rules = (
            ("max_new_tokens", 1 <= self.max_new_tokens <= 2**20, "is not in [1, 1048576]", "use 128 or so"),
            ("temperature", self.temperature >= 0, "must be at least 0", "use 0 for the likeliest token"),
            ("top_k", self.top_k >= 0, "must be at least 0", "use 0 for all tokens"),
            ("top_p", 0 < self.top_p <= 1, "is not in (0, 1]", "use 1 for all tokens"),
            ("seed", 0 <= self.seed < 2**63, "is not in [0, 2^63)", "use 0 or so"),
            ("prompt", len(self.prompt) > 0, "is empty", 'write --prompt "some text"'),
        )
        return [Problem(key, getattr(self, key), rule, fix) for key, ok, rule, fix in rules if not ok]


@dataclass(frozen=True, kw_only=True)
class EvalConfig(_Use):
    """Measure how well a trained model predicts text: torchtitan-lite eval RUN_OR_STEP --data FILE"""

    data: str = ""
    """A text file, a .jsonl file, a folder of either, or "python_stdlib". Empty: the run's held-out text."""
    field: str = "text"
    """Key of the JSON objects that holds a jsonl document's text."""
    seq_len: int = 0
    """Tokens of a sample; 0: as in the run's training."""
    cache_dir: str = ""
    """Where the tokens of the text are kept; empty: as in training."""
    batch_size: int = 8

    def problems(self) -> list[Problem]:
        """Values out of range."""
        rules = (
            ("seq_len", self.seq_len >= 0, "must be at least 0", "use 0 for that of the training"),
            ("batch_size", self.batch_size >= 1, "must be at least 1", "use 8 or so"),
        )
        return [Problem(key, getattr(self, key), rule, fix) for key, ok, rule, fix in rules if not ok]


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a trained model for transformers and others: torchtitan-lite export-hf RUN_OR_STEP --out DIR"""

    out: str = ""
    """Folder that is made."""
    dtype: Dtype = "bfloat16"
    """Precision of the weights."""
    tokenizer: str = ""
    """File or folder of the tokenizer, where it is no longer where the run left it."""
    plugins: tuple[str, ...] = ()
    """The run's job.plugins: modules to import first, which a checkpoint never chooses by itself."""

    def problems(self) -> list[Problem]:
        """No folder, or one that is there."""
        return _out_problems(self.out)


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Make a step of a Hugging Face model, to start runs with: torchtitan-lite import-hf PATH --out DIR"""

    out: str = ""
    """Folder that is made, for checkpoint.initial_load_path."""

    def problems(self) -> list[Problem]:
        """No folder, or one that is there."""
        return _out_problems(self.out)


def _out_problems(out: str) -> list[Problem]:
    if not out:
        return [Problem("out", MISSING, "has no value", "write --out FOLDER")]
    path = Path(os.path.expanduser(out)).absolute()
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            return [Problem("out", out, "is there already", "name another folder")]
    except OSError as error:
        return [Problem("out", out, f"cannot be read ({error.strerror})", "name another folder")]
    return []
