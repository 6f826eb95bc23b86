"""Presets against the published totals, flavors by rule, and the errors for bad names and overrides."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch

from torchtitan_lite import registry
from torchtitan_lite.attention import Flex, Sdpa, Varlen
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.models.presets import Family
from torchtitan_lite.models.registry import config_class, families, flavors, read, resolve, split_flavor
from torchtitan_lite.models.rope import RopeScaling

# Totals on the Hugging Face Hub (safetensors.total of huggingface.co/api/models/<model>).
# The files of Qwen3-0.6B and 1.7B hold the tied head twice; the second copy is subtracted here.
PUBLISHED_TOTALS = {
    ("qwen3", "0.6B"): 751_632_384 - 151_936 * 1024,
    ("qwen3", "1.7B"): 2_031_739_904 - 151_936 * 2048,
    ("qwen3", "4B"): 4_022_468_096,
    ("qwen3", "8B"): 8_190_735_360,
    ("qwen3", "14B"): 14_768_307_200,
    ("qwen3", "32B"): 32_762_123_264,
    ("llama3", "1B"): 1_235_814_400,
    ("llama3", "3B"): 3_212_749_824,
    ("llama3", "8B"): 8_030_261_248,
    ("llama3", "70B"): 70_553_706_496,
    ("llama3", "405B"): 405_853_388_800,
}

ALL_PRESETS = [(name, size) for name, presets in families.items() for size in presets]


def problems(*args, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(*args, **kwargs)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(("name", "size"), ALL_PRESETS)
def test_parameters_on_the_meta_device_are_as_many_as_published(name: str, size: str):
    config = resolve(name, size)
    with torch.device("meta"):
        model = config.build()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == config.n_params
    if size == "debugmodel":
        assert 4.8e6 < total < 5.0e6
    else:
        assert total == PUBLISHED_TOTALS[name, size]


def test_each_published_size_has_its_preset():
    assert [key for key in ALL_PRESETS if key[1] != "debugmodel"] == sorted(
        PUBLISHED_TOTALS, key=lambda key: (key[0], PUBLISHED_TOTALS[key])
    )


@pytest.mark.parametrize(("name", "size"), ALL_PRESETS)
def test_every_size_comes_with_every_backend(name: str, size: str):
    expected = {
        "": Sdpa(),
        "_flex": Flex(),
        "_flex_flash": Flex(kernel_options={"BACKEND": "FLASH"}),
        "_varlen": Varlen(),
    }
    for suffix, attention in expected.items():
        assert size + suffix in flavors(name)
        assert split_flavor(size + suffix)[0] == size
        assert resolve(name, size + suffix) == dataclasses.replace(families[name][size], attention=attention)
    assert sum(flavor.startswith(size) for flavor in flavors(name)) == len(expected)


def test_the_tables_of_two_flavors_are_not_one_object():
    split_flavor("8B_flex_flash")[1]["kernel_options"]["BACKEND"] = "changed"  # pyright: ignore
    assert split_flavor("8B_flex_flash") == ("8B", {"kind": "flex", "kernel_options": {"BACKEND": "FLASH"}})
    assert split_flavor("8B") == ("8B", None)


def test_a_given_attention_replaces_that_of_the_flavor():
    assert resolve("qwen3", "8B_flex", attention=Varlen()).attention == Varlen()


def test_overrides_reach_every_field():
    changes = {
        "vocab_size": 1000, "dim": 64, "n_layers": 2, "n_heads": 6, "n_kv_heads": 3, "head_dim": 8,
        "ffn_dim": 40, "max_seq_len": 99, "norm_eps": 1, "rope_theta": 5.0, "qk_norm": True,
        "tie_embeddings": True, "sliding_window": 7, "rope_scaling": {"factor": 4},
    }  # fmt: skip
    config = resolve("llama3", "8B", overrides=changes)
    assert {field.name for field in dataclasses.fields(config)} == {*changes, "attention"}
    assert config.rope_scaling == RopeScaling(factor=4.0)
    assert type(config.norm_eps) is float
    del changes["rope_scaling"]
    assert {field: getattr(config, field) for field in changes} == changes


def test_a_table_of_rope_scaling_is_laid_over_that_of_the_preset():
    config = resolve("llama3", "1B", overrides={"rope_scaling": {"low_freq_factor": 2.0}})
    assert config.rope_scaling == RopeScaling(factor=32.0, low_freq_factor=2.0)
    assert resolve("qwen3", "8B", overrides={"rope_scaling": {"factor": 2.0}}).rope_scaling == RopeScaling(
        factor=2.0
    )
    assert resolve("llama3", "1B", overrides={"rope_scaling": None}).rope_scaling is None


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("gpt2", "8B"), 'model.name = "gpt2" is not a model family: choose one of "llama3", "qwen3"'),
        (("qwen3", "8b"), 'model.flavor = "8b" is not a flavor of qwen3: did you mean "8B"?'),
        (("llama3", "8B_flx"), 'model.flavor = "8B_flx" is not a flavor of llama3: did you mean "8B_flex"?'),
        (("llama3", "_flex"), 'model.flavor = "_flex" is not a flavor of llama3: '),
        (("llama3", "8B_flex_flex"), 'model.flavor = "8B_flex_flex" is not a flavor of llama3: '),
    ],
)
def test_an_unknown_name_is_answered_with_what_was_meant(args: tuple[str, str], line: str):
    (found,) = problems(*args)
    assert found.startswith(line)


OVERRIDES = (
    '"vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "max_seq_len", '
    '"norm_eps", "rope_theta", "rope_scaling", "qk_norm", "tie_embeddings", "sliding_window"'
)
"""The keys that overrides take. `attention` is none of them, as it has a table of its own."""
BAD_OVERRIDES = [
    ({"dims": 3}, 'dims = 3 is not a known key: did you mean "dim"?'),
    ({"atention": "flex"}, f'atention = "flex" is not a known key: choose one of {OVERRIDES}'),
    ({"n_layers": 1.5}, "n_layers = 1.5 is not an integer: write a whole number such as 64"),
    ({"n_layers": True}, "n_layers = true is not an integer: write a whole number such as 64"),
    ({"n_layers": 0}, "n_layers = 0 must be at least 1: use 1 or more"),
    ({"norm_eps": "small"}, 'norm_eps = "small" is not a number: write a number such as 0.1'),
    ({"norm_eps": float("nan")}, "norm_eps = nan is not a finite number: write a finite number"),
    ({"norm_eps": -1e-6}, "norm_eps = -1e-06 must be greater than 0: use a number in this range"),
    ({"qk_norm": 1}, "qk_norm = 1 is not true or false: write true or false"),
    ({"sliding_window": 0}, "sliding_window = 0 must be at least 1: use 1 or more"),
    ({"head_dim": 31}, "head_dim = 31 is odd, and rotary embedding turns pairs: use 32"),
    ({"n_heads": 1}, "n_kv_heads = 4 does not divide n_heads = 1: use 1"),
    ({"attention": "flex"}, 'attention = "flex" has a table of its own: set model.attention'),
]
BAD_SCALINGS = [
    (8, " = 8 is not a table: write model.overrides.rope_scaling.factor = ..."),
    ({"factor": "a"}, '.factor = "a" is not a number: write a number such as 0.1'),
    ({"factr": 2}, '.factr = 2 is not a known key: did you mean "factor"?'),
    ({"factor": 0.5}, ".factor = 0.5 must be at least 1: use 1 or more"),
    ({"low_freq_factor": 0}, ".low_freq_factor = 0 must be greater than 0: use 1.0 or so"),
    ({"high_freq_factor": 1}, ".high_freq_factor = 1.0 must exceed low_freq_factor = 1.0: use 4.0"),
    ({"original_max_seq_len": 0}, ".original_max_seq_len = 0 must be at least 1: use 1 or more"),
]


@pytest.mark.parametrize(("overrides", "line"), BAD_OVERRIDES)
def test_a_bad_override_is_answered_on_one_line(overrides: dict, line: str):
    assert problems("qwen3", "debugmodel", overrides=overrides) == [f"model.overrides.{line}"]


@pytest.mark.parametrize(("scaling", "line"), BAD_SCALINGS)
def test_a_bad_rope_scaling_is_answered_on_one_line(scaling: object, line: str):
    overrides = {"rope_scaling": scaling}
    assert problems("qwen3", "debugmodel", overrides=overrides) == [f"model.overrides.rope_scaling{line}"]


def test_all_bad_overrides_are_reported_at_once():
    assert len(problems("qwen3", "debugmodel", overrides={"dims": 1, "n_layers": "x", "qk_norm": 2})) == 3
    assert len(problems("qwen3", "debugmodel", overrides={"dim": 0, "n_heads": 9, "head_dim": 3})) == 3
    assert len(problems("qwen3", "9B", overrides={"dims": 1, "n_layers": "x"})) == 3
    assert len(problems("qwen", "9B", overrides={"dims": 1, "n_layers": "x"})) == 3


def test_sound_overrides_are_checked_beside_wrong_ones():
    found = problems("qwen3", "debugmodel", overrides={"nlayers": 2, "head_dim": -4, "n_heads": 3})
    assert [line.split(" ")[0].rpartition(".")[2] for line in found] == ["nlayers", "head_dim", "n_kv_heads"]
    found = problems(
        "qwen3", "debugmodel", overrides={"n_layers": 2.0, "rope_scaling": {"x": 1, "factor": 0}}
    )
    assert [line.split(" ")[0].rpartition(".")[2] for line in found] == ["n_layers", "factor", "x"]
    assert found[0].endswith("is not an integer: write 2")


def test_a_value_that_stands_in_for_a_wrong_one_causes_no_problem():
    assert len(problems("qwen3", "debugmodel", overrides={"n_kv_heads": 3, "n_heads": "x"})) == 1
    assert len(problems("qwen3", "debugmodel", overrides={"n_kv_heads": "x", "n_heads": 3})) == 1
    assert len(problems("qwen3", "9B", overrides={"n_heads": 3})) == 1
    scaling = {"low_freq_factor": "x", "high_freq_factor": 0.5}
    assert len(problems("qwen3", "debugmodel", overrides={"rope_scaling": scaling})) == 1


def test_the_remedy_for_the_high_frequencies_satisfies_the_rule():
    (problem,) = RopeScaling(low_freq_factor=6.0).problems("scaling")
    remedied = RopeScaling(low_freq_factor=6.0, high_freq_factor=float(problem.remedy.removeprefix("use ")))
    assert remedied.problems("scaling") == []


@dataclass(frozen=True, kw_only=True)
class Wide(DecoderConfig):
    """A config with fields that a plugin may have."""

    architecture: ClassVar[str] = "wide"
    norm: Literal["before", "after"] = "after"
    widths: tuple[int, ...] = ()
    gate: int | str = 0
    note: str = ""
    known: ClassVar[int] = 3


def test_the_fields_of_a_plugins_config_are_overridden_by_their_types(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preset = families["qwen3"]["debugmodel"]
    base = Wide(**{field.name: getattr(preset, field.name) for field in dataclasses.fields(preset)})
    monkeypatch.setitem(registry.families.members, "wide", Family(name="wide", presets={"tiny": base}))
    good = {"norm": "before", "widths": [1, 2], "gate": "x", "note": "n", "dim": 64}
    config = resolve("wide", "tiny_flex", None, good)
    assert isinstance(config, Wide) and config.attention == Flex()
    assert [getattr(config, name) for name in good] == ["before", (1, 2), "x", "n", 64]
    wrong = {"norm": "x", "widths": [1.5], "gate": 1.5, "note": 1, "dim": "x", "known": 4}
    with pytest.raises(ConfigError) as caught:
        resolve("wide", "tiny", None, wrong)
    assert {problem.key for problem in caught.value.problems} == {f"model.overrides.{key}" for key in wrong}
    assert read("wide", "tiny", None, wrong)[0] == base


def test_an_architecture_of_two_classes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = families["qwen3"]["debugmodel"]
    values = {field.name: getattr(preset, field.name) for field in dataclasses.fields(preset)}

    class Other(DecoderConfig):
        architecture: ClassVar[str] = "wide"

    for name, cls in (("wide", Wide), ("other", Other)):
        monkeypatch.setitem(
            registry.families.members, name, Family(name=name, presets={"tiny": cls(**values)})
        )
    with pytest.raises(ConfigError, match=r"is that of Wide and .*Other: name one of their plugins alone"):
        config_class("wide")
