"""Flags that set keys inside of free tables, and lists of numbers."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import pytest

from torchtitan_lite.config.flags import read_flags
from torchtitan_lite.config.load import ConfigError, load
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.registry import FieldsOf


@dataclass(frozen=True, kw_only=True)
class Run:
    fields: Annotated[dict[str, Any], FieldsOf(lambda run: DecoderConfig)] = field(default_factory=dict)
    """A table whose keys are names in Python."""
    options: dict[str, Any] = field(default_factory=dict)
    """A table with keys of any kind."""
    size: int | tuple[int, int] = 128
    shares: tuple[float, ...] = (0.5,)


def loaded(*argv: str) -> Run:
    return load(Run, argv, prog="run").config


def refused(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(*argv)
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["4"], 4),
        (["1_000"], 1000),
        (["5e5"], 5e5),
        (["true"], True),
        (["False"], False),
        ([], True),
        (["text"], "text"),
        (['{"a": [1]}'], {"a": [1]}),
        (['"4"'], "4"),
    ],
)
def test_a_dotted_flag_sets_one_key_of_a_free_table(words: list[str], value: object) -> None:
    assert loaded("--options.KEY", *words).options == {"KEY": value}
    if words:
        assert loaded(f"--options.KEY={words[0]}").options == {"KEY": value}


def test_a_dotted_flag_may_reach_into_tables_inside_of_the_free_table() -> None:
    argv = ["--options.outer.inner", "1", "--options", '{"outer": {"other": 2}}']
    assert loaded(*argv).options == {"outer": {"inner": 1, "other": 2}}


def test_dotted_flags_and_json_merge_in_the_order_of_the_command_line() -> None:
    dotted, table = ["--options.a", "1"], ["--options", '{"a": 2, "b": 3}']
    assert loaded(*dotted, *table).options == {"a": 2, "b": 3}
    assert loaded(*table, *dotted).options == {"a": 1, "b": 3}
    assert loaded(*table, "--options.b", "none").options == {"a": 2}
    assert loaded(*dotted, "--options", "{}").options == {}


def test_dotted_flags_merge_with_a_file(tmp_path) -> None:
    (tmp_path / "run.toml").write_text("[options]\na = 1\nb = 2\n")
    assert loaded("--options.b", "3", "--config", str(tmp_path / "run.toml")).options == {"a": 1, "b": 3}


def test_a_dash_is_an_underscore_in_names_of_python_and_stays_in_other_keys() -> None:
    run = loaded(
        "--fields.n-layers", "4", "--fields.rope-scaling.low-freq-factor", "2", "--options.BLOCK-M", "64"
    )
    assert run.fields == {"n_layers": 4, "rope_scaling": {"low_freq_factor": 2}}
    assert run.options == {"BLOCK-M": 64}


@pytest.mark.parametrize("name", ["--options.", "--options..a", "--options.a."])
def test_a_dotted_flag_without_a_key_is_refused(name: str) -> None:
    assert refused(name, "1") == f"{name} = 1 names no key of options: write --options.KEY VALUE"


def test_a_dotted_flag_may_be_too_deep_for_a_file_but_not_for_python() -> None:
    assert "is nested more than 32 levels deep" in refused("--options" + ".a" * 3000, "1")


@pytest.mark.parametrize(
    "words", ["128,64", "128, 64", "128 64", "[128,64]", "[128, 64]", "128 ,64", "+128,6_4"]
)
@pytest.mark.parametrize("is_split", [False, True])
def test_a_pair_is_written_with_a_comma_a_space_or_as_json(words: str, is_split: bool) -> None:
    assert loaded("--size", *(words.split() if is_split else [words])).size == (128, 64)


@pytest.mark.parametrize(
    ("words", "shares"), [("1", (1,)), ("0.5,.25", (0.5, 0.25)), ("1,2,3", (1, 2, 3)), ("[1]", (1,))]
)
def test_a_list_of_numbers_is_written_in_the_same_ways(words: str, shares: tuple[float, ...]) -> None:
    assert loaded("--shares", words).shares == shares


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("128,", '"128,"'),
        (",64", '",64"'),
        ("128,,64", '"128,,64"'),
        ("a,b", '"a,b"'),
        ("128x64", '"128x64"'),
        ("128,64,32", "[128, 64, 32]"),
        ("[128]", "[128]"),
        ("128,64.5", "[128, 64.5]"),
    ],
)
def test_what_is_no_pair_is_refused_with_both_forms(words: str, shown: str) -> None:
    rule = "is not an integer or a list of 2 integers"
    remedy = "write a whole number such as 128, or a list such as [128, 128]"
    assert refused("--size", words) == f"size = {shown} {rule}: {remedy}"


@pytest.mark.parametrize("flag", ["--config", "--dry-run", "--world-size", "--dry_run"])
def test_flags_of_a_run_are_refused_where_there_is_no_run(flag: str) -> None:
    (problem,) = read_flags(Run, [flag], of_a_run=False).problems
    assert str(problem) == f"{flag.replace('_', '-')} is for training: leave it out"
    (problem,) = read_flags(Run, [flag, "3", "--size", "5"], of_a_run=False).problems
    assert str(problem) == f'{flag.replace("_", "-")} = "3" is for training: leave it out'
    assert not read_flags(Run, [flag, "3"]).problems or flag != "--config"
