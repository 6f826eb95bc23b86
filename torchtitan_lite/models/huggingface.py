"""The config.json of Hugging Face: reading it as a DecoderConfig, and writing it for a DecoderConfig.

It describes dense Llama and Qwen3 models, as transformers computes them
(https://github.com/huggingface/transformers/tree/main/src/transformers/models/llama, .../qwen3).
"""

import json
import math
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from torchtitan_lite.config.load import MISSING, Problem
from torchtitan_lite.config.problem import of_sound_keys
from torchtitan_lite.config.validation import validate
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.models.qwen3 import PRESETS
from torchtitan_lite.models.rope import RopeScaling

CONFIG = "config.json"

_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn_dim",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
"""The DecoderConfig field for each key of config.json."""
_LARGEST = {
    "num_hidden_layers": 2**14,
    "max_position_embeddings": 2**31,
    "original_max_position_embeddings": 2**31,
}
_LARGEST_SIZE = 2**24
"""The limit of values without a row in `_LARGEST`. No model needs more, and torch may fail on more."""
_TYPES: dict[str, type] = {"norm_eps": float, "tie_embeddings": bool}
_COMMON = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
_DEFAULTS = {
    "llama": {**_COMMON, "max_position_embeddings": 2048},
    "qwen3": {
        **_COMMON,
        "max_position_embeddings": 32768,
        "head_dim": 128,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
    },
}
"""The values of missing keys, by model type. transformers does not write its defaults to the file."""
_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_seq_len",
}
_ROPE = {"rope_type", "type", "rope_theta", *_SCALING}
_MUST_BE: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "is_causal": (True, None),
    "quantization_config": (None,),
}
"""The values that this decoder can compute, by key. None: the key may be missing."""
_OTHER_FILE = "use the file that belongs to the weights"


def read_config(folder: Path) -> tuple[DecoderConfig | None, list[Problem]]:
    """Return the decoder that `folder`/config.json describes, and a problem for each unsupported value.

    The decoder is None if a field is missing or has a wrong type. Only numbers are taken from the file.
    """
    path = folder / CONFIG
    try:
        if not path.is_file():
            return None, [Problem(str(path), MISSING, "is not there", "name a folder with a model in it")]
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return None, [Problem(str(path), MISSING, f"cannot be read ({error})", "copy the model again")]
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        rule = "is not a model that this decoder can be"
        return None, [Problem(f"{path}: model_type", kind, rule, "use one of llama, qwen3")]
    return _Reader(str(path), {**_DEFAULTS[kind], **content}, kind).decoder()


class _Reader:
    """A reader of the content of a config.json, which collects problems."""

    def __init__(self, path: str, content: dict[str, Any], kind: str) -> None:
        self.path, self.content, self.kind = path, content, kind
        self.problems: list[Problem] = []
        if content.get("num_key_value_heads") is None and "num_attention_heads" in content:
            content["num_key_value_heads"] = content["num_attention_heads"]
        width, n_heads = content.get("hidden_size"), content.get("num_attention_heads")
        if content.get("head_dim") is None and isinstance(width, int) and isinstance(n_heads, int):
            content["head_dim"] = width // max(1, n_heads)

    def decoder(self) -> tuple[DecoderConfig | None, list[Problem]]:
        """Return the config of the decoder, or None, and all problems."""
        values = {
            ours: self.value(theirs, self.content.get(theirs, MISSING), _TYPES.get(ours, int))
            for theirs, ours in _FIELDS.items()
        }
        for key, allowed in _MUST_BE.items():
            if (value := self.content.get(key)) not in allowed:
                rule = "is not what this decoder computes"
                self.problem(key, value, rule, f"only {json.dumps(allowed[0])} is")
        theta, scaling = self.rope()
        window = self.window() if self.kind == "qwen3" else None  # Llama in transformers has no window
        if self.problems:
            return None, self.problems
        config = DecoderConfig(
            **values,
            rope_theta=theta,
            rope_scaling=scaling,
            qk_norm=self.kind == "qwen3",
            sliding_window=window,
        )
        # A preset's values stand in for wrong values.
        checked, wrong = validate(DecoderConfig, [asdict(PRESETS["debugmodel"]), asdict(config)], self.path)
        return config, [*wrong, *of_sound_keys(checked.problems(self.path), wrong)]

    def problem(self, key: str, value: object, rule: str, remedy: str) -> None:
        self.problems.append(Problem(f"{self.path}: {key}", value, rule, remedy))

    def value(self, key: str, value: object, wanted: type) -> Any:
        """Return `value`. Add a problem if it is not of type `wanted`, not finite, or too large."""
        if wanted is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        if type(value) is not wanted or (isinstance(value, float) and not math.isfinite(value)):
            rule = "is not there" if value is MISSING else f"is not of type {wanted.__name__}"
            self.problem(key, value, rule, _OTHER_FILE)
            return wanted()
        if isinstance(value, int) and value > (most := _LARGEST.get(key.rpartition(".")[2], _LARGEST_SIZE)):
            self.problem(key, value, f"is more than {most}", _OTHER_FILE)
            return wanted()
        return value

    def rope(self) -> tuple[float, RopeScaling | None]:
        """Return the rotary base and scaling, from the table `rope_parameters` or transformers 4's keys."""
        content = self.content
        # If the file has both tables, transformers 5 uses the older one, `rope_scaling`.
        key = "rope_scaling" if content.get("rope_scaling") else "rope_parameters"
        table = content.get(key)
        if table is not None and not isinstance(table, dict):
            self.problem(key, table, "is not a table", _OTHER_FILE)
            table = None
        table = table or {}
        for name in table.keys() - _ROPE:
            if table[name] is not None and (name, table[name]) != ("partial_rotary_factor", 1):
                rule = "is not a setting of this decoder"
                self.problem(f"{key}.{name}", table[name], rule, "use a model without it")
        theta = self.value("rope_theta", table.get("rope_theta", content.get("rope_theta")), float)
        kind = table.get("rope_type", table.get("type", "default"))
        if kind == "default":
            return theta, None
        if kind != "llama3":
            rule = "is not a scaling that this decoder computes"
            self.problem(f"{key}.rope_type", kind, rule, 'only "default" and "llama3" are')
            return theta, None
        values = {
            ours: self.value(f"{key}.{theirs}", table.get(theirs, MISSING), int if "max" in ours else float)
            for theirs, ours in _SCALING.items()
        }
        return theta, RopeScaling(**values)

    def window(self) -> int | None:
        """Return the sliding window of all layers, or None. A window of only some layers is a problem."""
        content = self.content
        if not content.get("use_sliding_window") or content.get("sliding_window") is None:
            return None
        n_layers, kinds = content.get("num_hidden_layers"), content.get("layer_types")
        first = content.get("max_window_layers", 28)
        n_layers = n_layers if isinstance(n_layers, int) else 0
        # Without layer_types, transformers gives a window to the layers from max_window_layers on.
        n_sliding = max(0, n_layers - first) if isinstance(first, int) else -1
        if isinstance(kinds, list):
            n_sliding = kinds.count("sliding_attention")
        if n_sliding == 0:
            return None
        if n_sliding == n_layers:
            return self.value("sliding_window", content["sliding_window"], int)
        rule = "is for some of the layers, and this decoder has one window for all"
        self.problem("sliding_window", content["sliding_window"], rule, "use a model without one")
        return None


def differences(found: DecoderConfig, config: DecoderConfig, path: str) -> list[Problem]:
    """Return a problem for each field, except attention, in which `found` (of `path`) and `config` differ."""
    remedy = "choose the model of these weights, or use --model.name hf --model.flavor with their folder"
    if found.architecture != config.architecture:
        rule = f"is {json.dumps(found.architecture)} in {path}"
        return [Problem("model.architecture", config.architecture, rule, remedy)]
    return [
        Problem(f"model.overrides.{field.name}", ours, f"is {_as_text(theirs)} in {path}", remedy)
        for field in fields(config)
        if field.name != "attention"
        and (theirs := getattr(found, field.name)) != (ours := getattr(config, field.name))
    ]


def _as_text(value: object) -> str:
    return str(value) if is_dataclass(value) else json.dumps(value)


def export_problems(config: DecoderConfig, key: str) -> list[Problem]:
    """Return a problem if transformers has no model that computes what this decoder computes."""
    if config.architecture != DecoderConfig.architecture:
        rule = "is an architecture that has no config.json for transformers here"
        return [Problem(f"{key}.architecture", config.architecture, rule, "leave out the export")]
    if config.sliding_window is None or config.qk_norm:
        return []
    rule = "has no model in transformers: Llama, without qk_norm, has no window there"
    return [
        Problem(f"{key}.sliding_window", config.sliding_window, rule, "leave out the window or the export")
    ]


def config_json(
    config: DecoderConfig, *, dtype: str, eos_id: int, bos_id: int | None = None
) -> dict[str, Any]:
    """Return the content of config.json: Qwen3 if queries and keys have a norm, otherwise Llama."""
    assert not export_problems(config, "")
    is_qwen = config.qk_norm
    ours = {theirs: getattr(config, name) for theirs, name in _FIELDS.items()}
    scaling = None
    if config.rope_scaling is not None:
        values = {theirs: getattr(config.rope_scaling, name) for theirs, name in _SCALING.items()}
        scaling = {**values, "rope_type": "llama3"}
    family: dict[str, Any] = {"mlp_bias": False, "pretraining_tp": 1}
    if is_qwen:
        window = config.sliding_window
        family = {"sliding_window": window, "use_sliding_window": window is not None}
        family["max_window_layers"] = config.n_layers if window is None else 0
    return {
        "architectures": ["Qwen3ForCausalLM" if is_qwen else "LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": "qwen3" if is_qwen else "llama",
        "rope_scaling": scaling,
        "rope_theta": config.rope_theta,
        "torch_dtype": dtype,
        "use_cache": True,
        **ours,
        **family,
    }
