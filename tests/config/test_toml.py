"""A configuration that is written as TOML loads back equal."""

import random
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tomli

from torchtitan_lite.attention import Flex, Sdpa, Varlen
from torchtitan_lite.config.job import JobConfig, ModelSection, load_job
from torchtitan_lite.config.load import load, to_toml
from torchtitan_lite.config.schema import choice_of, field_types, plain_types
from torchtitan_lite.inference.commands import EvalConfig, GenerateConfig

DEFAULT = JobConfig()

TEXTS = [
    "",
    "a\nb",
    "\r\n\t",
    "\"quoted\" and 'quoted'",
    '"""',
    "'''",
    "back\\slash \\n",
    "# no comment",
    "[x]\ny = 1",
    "ünï-cødé ✓ 日本語 🙂",
    "\u2028\u0085\ufeff",
    "\x01\x1b\x7f",
    " spaces ",
    "a" * 10_000,
]

NUMBERS = [1e-8, 1e22, 1e-300, 0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 123456789.123456789]

TABLES = [
    {},
    {"BACKEND": "FLASH", "BLOCK_M": 64, "num_warps": 4},
    {"a b": 1, "": 2, "x.y": {"q": [1, [2.5, "s"], {"z": True}]}, 'quote"': [], "é": {}, "n\nl": "v"},
    {"big": 2**63 - 1, "small": -(2**63), "float": 1.0, "bool": False, "list": [{"a": 1}, {"b": 2}]},
]


def with_value(section: str, **values: Any) -> JobConfig:
    return replace(DEFAULT, **{section: replace(getattr(DEFAULT, section), **values)})


def again(config: JobConfig, folder: Path) -> JobConfig:
    """`config` after it is written to a file in `folder` and loaded."""
    path = folder / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    return load(JobConfig, ["--config", str(path)], prog="run").config


def typed(value: Any) -> Any:
    """`value` with the types of its parts: 1 == 1.0 == True, but their types differ."""
    if is_dataclass(value):
        return type(value), [typed(getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, dict):
        return {name: typed(child) for name, child in value.items()}
    return [typed(child) for child in value] if isinstance(value, list) else (type(value), repr(value))


CONFIGS = {
    "default": DEFAULT,
    **{f"text {text[:12]!r}": with_value("job", description=text) for text in TEXTS},
    **{f"number {number}": with_value("metrics", peak_flops=number) for number in NUMBERS},
    "whole number as a float": with_value("training", max_norm=2.0),
    "optional numbers set": with_value("lr_scheduler", total_steps=7, decay_ratio=0.25, warmup_steps=0),
    "varlen": with_value("model", attention=Varlen(kernel="documents")),
    "flex with a number": with_value("model", attention=Flex(block_size=64)),
    "flex with a pair": with_value("model", attention=Flex(block_size=(64, 32))),
    "sdpa": with_value("model", attention=Sdpa()),
    **{
        f"table {number}": with_value("model", attention=Flex(kernel_options=table), overrides=table)
        for number, table in enumerate(TABLES)
    },
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=[*CONFIGS])
def test_a_configuration_written_as_toml_loads_back_equal(config: JobConfig, tmp_path: Path) -> None:
    assert typed(again(config, tmp_path)) == typed(config)


def test_random_configurations_load_back_equal(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(200):
        attention = rng.choice([Sdpa(), Varlen(), Flex(block_size=rng.choice([16, (32, 64)]))])
        if isinstance(attention, Flex):
            attention = replace(attention, kernel_options=random_table(rng))
        config = replace(
            with_value("optimizer", lr=rng.random() * 10 ** rng.randint(-12, 12)),
            model=ModelSection(name=random_text(rng), attention=attention, overrides=random_table(rng)),
        )
        assert typed(again(config, tmp_path)) == typed(config)


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice("ab \"'\\\n\t#=[].,é✓\x01\u2028") for _ in range(rng.randint(0, 8)))


def random_table(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    def value() -> Any:
        options = [rng.randint(-5, 5), rng.random(), rng.random() < 0.5, random_text(rng), [1, "a", 2.5]]
        return rng.choice([*options, random_table(rng, depth + 1)] if depth < 3 else options)

    return {random_text(rng): value() for _ in range(rng.randint(0, 4))}


def fields_that_may_be_none(config: Any) -> list[tuple[str, Any]]:
    found = []
    for name, annotation in field_types(type(config)).items():
        value = getattr(config, name)
        if is_dataclass(value):
            found += fields_that_may_be_none(value)
        elif type(None) in plain_types(annotation):
            found.append((name, value))
    return found


def test_every_field_that_may_be_none_is_none_by_default() -> None:
    optional = fields_that_may_be_none(DEFAULT)
    assert len(optional) >= 3
    assert all(value is None for _, value in optional), optional


@pytest.mark.parametrize("config", [JobConfig(), GenerateConfig(), EvalConfig()])
def test_the_default_of_every_choice_is_its_first_member(config: object) -> None:
    types = field_types(type(config))
    choices = {name: choice for name, tp in types.items() if (choice := choice_of(tp))}
    assert choices
    for name, choice in choices.items():
        assert type(getattr(config, name)) is next(iter(choice.members.values()))


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--model.flavor debugmodel_flex",
        "--model.flavor debugmodel_varlen",
        "--model.flavor debugmodel_flex_flash --job.device cuda",
        '--job.device cuda --model.flavor 8B_flex_flash --model.attention.kernel-options {"num_warps":4}',
        "--model.flavor debugmodel_flex_flash --model.attention varlen",
        '--model.flavor debugmodel_flex --model.overrides {"n_layers":2,"norm_eps":1e-8}',
        "--model.attention flex --model.attention.block-size 64 32",
        "--lr-scheduler.decay-ratio 0.2 --training.steps 20 --validation.enable",
        "--config flash.toml --config varlen.toml --model.attention flex",
    ],
)
def test_a_resolved_job_loads_back_equal(flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("flash.toml").write_text("[model]\nflavor = 'debugmodel_flex_flash'")
    Path("varlen.toml").write_text("[model.attention]\nkind = 'varlen'")
    job = load_job([*flags.split(), "--dry-run"]).config
    Path("resolved.toml").write_text(to_toml(job))
    assert typed(load_job(["--config", "resolved.toml", "--dry-run"]).config) == typed(job)


def test_the_resolved_file_has_every_section() -> None:
    tables = tomli.loads(to_toml(load_job([]).config))
    assert list(tables) == [
        section.name for section in fields(DEFAULT) if fields(getattr(DEFAULT, section.name))
    ]
    assert tables["training"]["steps"] == DEFAULT.training.steps
    assert tables["model"]["attention"] == {"kind": "sdpa"}
