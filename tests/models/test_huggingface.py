"""Our decoder equals transformers' model, from config.json files that we write and from published ones."""

import dataclasses
import json
from pathlib import Path

import hub_cases as cases
import pytest
import torch
from torch.nn import functional as F

from torchtitan_lite.models.decoder import PARAMETERS, DecoderConfig
from torchtitan_lite.models.huggingface import config_json, differences, read_config
from torchtitan_lite.models.registry import families, resolve

# Every kind of model: plain, scaled and tied; with and without norms of queries and keys.
KINDS = {
    "llama3, plain": dataclasses.replace(families["llama3"]["8B"], rope_scaling=None),
    "llama3, 3.1 scaling": families["llama3"]["8B"],
    "llama3, 3.2 tied": families["llama3"]["1B"],
    "qwen3, tied": families["qwen3"]["0.6B"],
    "qwen3, untied": families["qwen3"]["8B"],
    "qwen3, window": dataclasses.replace(families["qwen3"]["8B"], sliding_window=7),
}
BEYOND = 5 * cases.ORIGINAL
CONFIGS = {name: cases.small(config) for name, config in {**cases.PRESETS, **KINDS}.items()}
# Presets that differ only in size become the same small model, which is tested once.
DISTINCT = {repr(config): name for name, config in CONFIGS.items()}.values()


@pytest.fixture(params=DISTINCT)
def config(request: pytest.FixtureRequest) -> DecoderConfig:
    return CONFIGS[request.param]


def test_logits_are_theirs_beyond_the_original_context(config: DecoderConfig, tmp_path: Path) -> None:
    their = cases.theirs(config, tmp_path)
    own = cases.ours(config, their)
    tokens_BS = torch.randint(config.vocab_size, (2, BEYOND))
    with torch.no_grad():
        wanted = their(tokens_BS).logits
    found = cases.logits_of(own, tokens_BS, cases.positions_of(BEYOND).expand(2, -1))
    assert (found - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_have_the_logits_that_each_has_alone(kind: str, tmp_path: Path) -> None:
    config = cases.small(KINDS[kind])
    their = cases.theirs(config, tmp_path)
    own = cases.ours(config, their)
    lengths = (1, 90, 17, 130)
    tokens_BS = torch.randint(config.vocab_size, (1, sum(lengths)))
    found = cases.logits_of(own, tokens_BS, cases.positions_of(*lengths))
    with torch.no_grad():
        wanted = torch.cat([their(part).logits for part in tokens_BS.split(lengths, dim=1)], dim=1)
    assert (found - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_every_gradient_are_theirs(kind: str, tmp_path: Path) -> None:
    config = cases.small(KINDS[kind])
    their = cases.theirs(config, tmp_path)
    own = cases.ours(config, their)
    tokens_BS = torch.randint(config.vocab_size, (2, 150))
    wanted = their(tokens_BS, labels=tokens_BS).loss
    wanted.backward()
    positions_BS = cases.positions_of(150).expand(2, -1)
    labels_BS = F.pad(tokens_BS[:, 1:], (0, 1), value=-100)
    mask = config.attention.mask(positions_BS, sliding_window=config.sliding_window)
    loss, count = own(tokens_BS, positions_BS, mask, labels_BS)
    (loss / count).backward()
    assert (loss / count).item() == pytest.approx(wanted.item(), rel=1e-6)
    gradients = {name: weight.grad for name, weight in their.named_parameters()}
    assert len(gradients) == len(list(own.parameters()))
    for name, weight in own.named_parameters():
        theirs = gradients[PARAMETERS.hub_name(name)]
        assert weight.grad is not None and theirs is not None
        assert (weight.grad - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


def test_a_written_config_json_is_read_as_the_same_config(config: DecoderConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_json(config, dtype="bfloat16", eos_id=3)))
    assert read_config(tmp_path) == (config, [])


def test_a_config_json_that_transformers_writes_is_read(config: DecoderConfig, tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(config_json(config, dtype="bfloat16", eos_id=3)))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again") == (config, [])


# The keys that affect the numbers, from huggingface.co/<name>/blob/main/config.json.
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "mlp_bias": False,
    "model_type": "llama", "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256,
    "max_position_embeddings": 131072, "num_key_value_heads": 8,
}  # fmt: skip
QWEN = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "hidden_act": "silu", "head_dim": 128,
    "model_type": "qwen3", "rms_norm_eps": 1e-06, "rope_theta": 1000000, "rope_scaling": None,
    "vocab_size": 151936, "max_position_embeddings": 40960, "num_key_value_heads": 8, "sliding_window": None,
    "use_sliding_window": False,
}  # fmt: skip
COLUMNS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "tie_word_embeddings",
)
SIZES = {
    ("llama3", "1B"): (2048, 8192, 16, 32, True),
    ("llama3", "3B"): (3072, 8192, 28, 24, True),
    ("llama3", "8B"): (4096, 14336, 32, 32, False),
    ("llama3", "70B"): (8192, 28672, 80, 64, False),
    ("llama3", "405B"): (16384, 53248, 126, 128, False),
    ("qwen3", "0.6B"): (1024, 3072, 28, 16, True),
    ("qwen3", "1.7B"): (2048, 6144, 28, 16, True),
    ("qwen3", "4B"): (2560, 9728, 36, 32, True),
    ("qwen3", "8B"): (4096, 12288, 36, 32, False),
    ("qwen3", "14B"): (5120, 17408, 40, 40, False),
    ("qwen3", "32B"): (5120, 25600, 64, 64, False),
}


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_an_exported_preset_has_the_published_config(name: str, size: str) -> None:
    published = {
        **(LLAMA if name == "llama3" else QWEN),
        **dict(zip(COLUMNS, SIZES[name, size], strict=True)),
    }
    if name == "llama3":
        published["head_dim"] = published["hidden_size"] // published["num_attention_heads"]
        published["rope_scaling"] = {
            "factor": 32.0 if size in ("1B", "3B") else 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        }
    exported = config_json(resolve(name, size), dtype="bfloat16", eos_id=0)
    assert {key: exported[key] for key in published} == published
    told = {
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "initializer_range",
        "torch_dtype",
        "use_cache",
    }
    assert exported.keys() - published.keys() <= told | {"max_window_layers", "pretraining_tp"}


def broken(tmp_path: Path, **changes: object) -> list[str]:
    """The problems of a config.json with these changes."""
    content = {**config_json(cases.small(families["qwen3"]["8B"]), dtype="bfloat16", eos_id=0), **changes}
    content = {key: value for key, value in content.items() if value != "gone"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    return [str(problem).replace(f"{tmp_path}/", "") for problem in read_config(tmp_path)[1]]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gpt2"}, 'config.json: model_type = "gpt2" is not a model that this decoder can be'),
        ({"hidden_act": "gelu"}, 'config.json: hidden_act = "gelu" is not what this decoder computes: only'),
        ({"attention_bias": True}, "config.json: attention_bias = true is not what this decoder computes"),
        ({"hidden_size": "gone"}, "config.json: hidden_size is not there: use the file that belongs"),
        ({"model_type": ["llama"]}, "config.json: model_type = "),
        ({"hidden_size": "wide", "head_dim": None}, 'config.json: hidden_size = "wide" is not of type int'),
        ({"rms_norm_eps": float("nan")}, "config.json: rms_norm_eps = "),
        ({"rope_theta": float("inf")}, "config.json: rope_theta = "),
        ({"rms_norm_eps": 10**400}, "config.json: rms_norm_eps = "),
        ({"vocab_size": 2**62}, "config.json: vocab_size = 4611686018427387904 is more than 16777216"),
        ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers = 1000000000 is more than 16384"),
        ({"max_position_embeddings": 10**400}, "config.json: max_position_embeddings = "),
        ({"is_causal": False}, "config.json: is_causal = false is not what this decoder computes"),
        (
            {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "config.json: rope_parameters.full_attention = ",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "config.json: rope_parameters.partial_rotary"),
        ({"rope_scaling": {"rope_type": "yarn"}}, 'config.json: rope_scaling.rope_type = "yarn" is not a'),
        ({"rope_scaling": {"rope_type": "llama3"}}, "config.json: rope_scaling.factor is not there"),
        ({"rope_scaling": 3}, "config.json: rope_scaling = 3 is not a table"),
        ({"quantization_config": {"bits": 4}}, "config.json: quantization_config = "),
        (
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            "config.json: sliding_window",
        ),
        ({"num_key_value_heads": 3}, "config.json.n_kv_heads = 3 does not divide n_heads"),
    ],
)
def test_a_config_that_this_decoder_does_not_compute_is_refused_by_key(
    changes: dict, expected: str, tmp_path: Path
) -> None:
    assert any(line.startswith(expected) for line in broken(tmp_path, **changes)), broken(tmp_path, **changes)


SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama3, plain", {"rope_scaling": SCALED, "rope_parameters": {"rope_type": "default"}}),
        ("llama3, plain", {"rope_scaling": None, "rope_parameters": {**SCALED, "rope_theta": 7e4}}),
        ("llama3, plain", {"rope_scaling": SCALED, "rope_parameters": {}}),
        (
            "llama3, plain",
            {"rope_scaling": SCALED, "rope_parameters": {"rope_theta": 7e4}, "rope_theta": "gone"},
        ),
        ("llama3, plain", dict.fromkeys(("rope_theta", "rms_norm_eps", "max_position_embeddings"), "gone")),
        ("qwen3, tied", {"use_sliding_window": True, "sliding_window": "gone", "max_window_layers": 0}),
        ("llama3, plain", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
        ("llama3, plain", {"num_key_value_heads": None, "head_dim": None}),
        ("qwen3, tied", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}),
        ("qwen3, tied", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
        (
            "qwen3, tied",
            {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["full_attention"] * 2},
        ),
        ("qwen3, tied", {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0}),
    ],
)
def test_a_config_means_the_same_here_and_in_transformers(kind: str, changes: dict, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    content = config_json(cases.small(KINDS[kind]), dtype="float32", eos_id=0)
    content = {key: value for key, value in {**content, **changes}.items() if value != "gone"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config, problems = read_config(tmp_path)
    assert config is not None and problems == []
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(tmp_path), attn_implementation="eager"
    )
    theirs = theirs.float().eval()
    tokens_BS = torch.randint(config.vocab_size, (1, BEYOND))
    with torch.no_grad():
        wanted = theirs(tokens_BS).logits
    found = cases.logits_of(cases.ours(config, theirs), tokens_BS, cases.positions_of(BEYOND))
    assert (found - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("name", cases.PRESETS)
def test_transformers_has_no_warning_about_the_export_of_a_preset(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoConfig, logging

    content = config_json(cases.PRESETS[name], dtype="bfloat16", eos_id=3, bos_id=1)
    (tmp_path / "config.json").write_text(json.dumps(content))
    logging.enable_propagation()
    try:
        AutoConfig.from_pretrained(tmp_path)
    finally:
        logging.disable_propagation()
    assert caplog.messages == []


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000])
def test_a_broken_config_json_is_reported_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    config, (problem,) = read_config(tmp_path)
    assert config is None and str(problem).startswith(str(tmp_path / "config.json"))


def test_every_difference_from_a_preset_is_reported_by_key(tmp_path: Path) -> None:
    found = dataclasses.replace(families["qwen3"]["0.6B"], n_layers=3, rope_theta=5.0, tie_embeddings=False)
    lines = [str(problem) for problem in differences(found, families["qwen3"]["0.6B"], "x/config.json")]
    assert [line.partition(":")[0] for line in lines] == [
        "model.overrides.n_layers = 28 is 3 in x/config.json",
        "model.overrides.rope_theta = 1000000.0 is 5.0 in x/config.json",
        "model.overrides.tie_embeddings = true is false in x/config.json",
    ]


def test_a_folder_describes_a_model_that_no_preset_does(tmp_path: Path) -> None:
    config = cases.small(families["llama3"]["1B"])
    (tmp_path / "config.json").write_text(json.dumps(config_json(config, dtype="float32", eos_id=0)))
    assert resolve("hf", str(tmp_path)) == config
    assert resolve("hf", f"{tmp_path}_varlen").attention.kind == "varlen"
    assert resolve("hf", str(tmp_path), overrides={"n_layers": 1}).n_layers == 1
