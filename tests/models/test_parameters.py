"""The table of parameters: every parameter has a row, and the first row that matches counts."""

from dataclasses import dataclass, fields
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.models.decoder import PARAMETERS, Block, DecoderConfig
from torchtitan_lite.models.parameters import Parameter, Table, hub_names
from torchtitan_lite.models.presets import Family
from torchtitan_lite.models.registry import families, resolve
from torchtitan_lite.models.rope import Rotation

PRESETS = [(name, size) for name in families for size in families[name]]
SMALL = {"n_layers": 2, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 96}


class GatedBlock(Block):
    """A block with a parameter that has no row in the decoder's table."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.gate = nn.Parameter(torch.empty(config.dim))

    def forward(self, x_BSD: Tensor, rotation: Rotation, mask: object) -> Tensor:
        return super().forward(x_BSD, rotation, mask) * self.gate


@dataclass(frozen=True, kw_only=True)
class Gated(DecoderConfig):
    """A decoder of gated blocks, without a row for the gate."""

    architecture: ClassVar[str] = "gated"

    def build_block(self) -> Block:
        return GatedBlock(self)


@dataclass(frozen=True, kw_only=True)
class GatedWithRow(Gated):
    """A decoder of gated blocks, with a row for the gate."""

    architecture: ClassVar[str] = "gated with a row"
    parameters: ClassVar[Table] = Table(
        [Parameter(pattern="blocks.*.gate", init="zeros", group="vector"), *PARAMETERS]
    )


def gated(cls: type[DecoderConfig]) -> DecoderConfig:
    preset = resolve("qwen3", "debugmodel", overrides=SMALL)
    return cls(**{field.name: getattr(preset, field.name) for field in fields(preset)})


@pytest.mark.parametrize(("name", "size"), PRESETS)
def test_every_parameter_of_every_preset_has_a_row_and_a_name_on_the_hub(name: str, size: str) -> None:
    config = families[name][size]
    assert config.rows.keys() == config.shapes.keys()
    assert sorted(hub_names(config.rows).values()) == sorted(config.shapes)
    for parameter, row in config.rows.items():
        assert config.parameters.row(parameter) is row
        assert (row.group == "vector") == (len(config.shapes[parameter]) == 1), parameter
        if row.shard_dim is not None:
            assert config.shapes[parameter][row.shard_dim] % getattr(config, row.split_by or "") == 0


def test_a_parameter_without_a_row_is_an_error_when_the_model_is_built() -> None:
    with torch.device("meta"), pytest.raises(ConfigError) as refused:
        gated(Gated).build()
    assert str(refused.value) == (
        "parameter blocks.*.gate of Gated has no row in its table of parameters: "
        "add a Parameter with a pattern that matches to Gated.parameters"
    )


def test_a_row_of_its_own_is_all_that_another_parameter_needs() -> None:
    config = gated(GatedWithRow)
    model = config.build()
    gates = [weight for name, weight in model.named_parameters() if name.endswith("gate")]
    assert len(gates) == 2 and not any(gate.any() for gate in gates), "drawn as its row says"
    assert config.n_params == sum(weight.numel() for weight in model.parameters())
    assert config.rows["blocks.1.gate"].shard_dim is None


def test_a_decoder_of_another_kind_has_another_architecture() -> None:
    with pytest.raises(TypeError, match="Unnamed has no architecture of its own"):

        class Unnamed(DecoderConfig):
            pass


def test_a_family_has_decoders_and_tables_that_fit_them() -> None:
    class Odd(DecoderConfig):
        architecture: ClassVar[str] = "odd"
        parameters: ClassVar[Table] = Table([Parameter(pattern="x", shard_dim=0, split_by="n_wheels")])

    with pytest.raises(TypeError, match="odd tiny is no DecoderConfig"):
        Family(name="odd", presets={"tiny": 3})  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="Odd has no field n_wheels, by which a row is split"):
        Family(name="odd", presets={"tiny": gated(Odd)})


def test_the_first_row_that_matches_counts() -> None:
    first, second = Parameter(pattern="blocks.*.ffn.*", init="ones"), Parameter(pattern="blocks.*.*.w1")
    assert Table([first, second]).row("blocks.3.ffn.w1") is first
    assert Table([second, first]).row("blocks.3.ffn.w1") is second


def test_a_wildcard_is_one_part_of_a_name_and_the_pattern_is_all_of_it() -> None:
    table = Table([Parameter(pattern="blocks.*.norm.weight")])
    assert table.row("blocks.12.norm.weight") is not None
    for other in ("blocks.1.ffn.norm.weight", "blocks.1.norm.weights", "x.blocks.1.norm.weight", "blocksx1"):
        assert table.row(other) is None, other


def test_a_name_on_the_hub_has_the_parts_that_the_wildcards_stand_for() -> None:
    row = Parameter(pattern="blocks.*.experts.*.w1", hub="model.layers.{}.mlp.experts.{}.gate_proj")
    assert row.hub_name("blocks.3.experts.17.w1") == "model.layers.3.mlp.experts.17.gate_proj"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("window", [None, 100])
def test_flops_are_those_worked_out_by_hand(tied: bool, window: int | None) -> None:
    changes = {**SMALL, "vocab_size": 512, "tie_embeddings": tied, "sliding_window": window}
    config = resolve("qwen3", "debugmodel", overrides={k: v for k, v in changes.items() if v is not None})
    per_block = 64 * 16 * (4 + 2 + 2) + 4 * 16 * 64 + 3 * 64 * 96
    # A document of 200 tokens: 100 keys in the mean; in a window of 100, 100 positions see half of it.
    keys = 100 if window is None else 75
    assert config.flops_per_token(200) == 6 * (2 * per_block + 512 * 64) + 12 * 2 * 4 * 16 * keys
