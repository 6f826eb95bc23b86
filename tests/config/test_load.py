"""Files and flags as layers, tested on a small configuration of this file."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from torchtitan_lite.config.load import ConfigError, Loaded, Problem, load, near
from torchtitan_lite.registry import Choice

INNER = Choice("inner", tag="kind", needs=())


@INNER.register
@dataclass(frozen=True, kw_only=True)
class Plain:
    kind: Literal["plain"] = "plain"


@INNER.register
@dataclass(frozen=True, kw_only=True)
class Tiled:
    kind: Literal["tiled"] = "tiled"
    size: int | tuple[int, int] = 128
    options: dict[str, Any] = field(default_factory=dict)


@INNER.register
@dataclass(frozen=True, kw_only=True)
class Packed:
    kind: Literal["packed"] = "packed"
    kernel: Literal["auto", "fast"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str = "small"
    inner: Annotated[Plain | Tiled | Packed, INNER] = field(default_factory=Plain)
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = 10
    lr: float = 1e-3
    ratio: float | None = None
    no_decay: bool = False
    fast: bool = True
    words: tuple[str, ...] = ()
    freq: Literal[-1] | Annotated[int, Field(ge=1)] = -1


@dataclass(frozen=True, kw_only=True)
class Run:
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def read(*argv: str, **files: str) -> Run:
    """The configuration of the files, in order, and then `argv`."""
    return loaded(*argv, **files).config


def loaded(*argv: str, **files: str) -> Loaded[Run]:
    named = []
    for name, text in files.items():
        Path(name).write_text(text, encoding="utf-8")
        named += ["--config", name]
    return load(Run, [*named, *argv], prog="run")


def problems(*argv: str, **files: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(*argv, **files)
    return str(caught.value).splitlines()


def test_later_files_win_over_earlier_ones_and_flags_over_files() -> None:
    one = "[train]\nsteps = 1\nlr = 1.0\nratio = 0.1"
    two = "[train]\nsteps = 2\nlr = 2"
    run = read("--train.steps", "3", one=one, two=two)
    assert run.train == Train(steps=3, lr=2.0, ratio=0.1)
    assert isinstance(run.train.lr, float)
    assert read(two=two, one=one).train.steps == 1
    assert read().train == Train()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--train.steps 5", Train(steps=5)),
        ("--train.steps=5", Train(steps=5)),
        ("--train.steps 4 --train.steps 5", Train(steps=5)),
        ("--train.steps -5", Train(steps=-5)),
        ("--train.lr 1", Train(lr=1.0)),
        ("--train.lr 1e-5", Train(lr=1e-5)),
        ("--train.lr -0.5", Train(lr=-0.5)),
        ("--train.ratio 0.5", Train(ratio=0.5)),
        ("--train.ratio 0.5 --train.ratio None", Train()),
        ("--train.ratio null", Train()),
        ("--train.no-decay", Train(no_decay=True)),
        ("--train.no_decay", Train(no_decay=True)),
        ("--train.no-no-decay", Train()),
        ("--train.fast", Train()),
        ("--train.no-fast", Train(fast=False)),
        ("--train.no_fast", Train(fast=False)),
        ("--train.fast false", Train(fast=False)),
        ("--train.fast=False", Train(fast=False)),
        ("--train.no-fast --train.fast", Train()),
        ("--train.words a 1 -b", Train(words=("a", "1", "-b"))),
        ('--train.words ["a","b"]', Train(words=("a", "b"))),
        ("--train.freq -1", Train()),
        ("--train.freq 3", Train(freq=3)),
    ],
)
def test_a_flag_sets_its_key(argv: str, expected: Train) -> None:
    assert read(*argv.split(" ")).train == expected


@pytest.mark.parametrize("text", ["5", "true", "null", "", " a b ", "[1]", "a=b", "-x", "é\n", '"q"'])
def test_the_text_of_a_string_is_taken_as_it_stands(text: str) -> None:
    assert read("--model.name", text).model.name == text
    assert read(f"--model.name={text}").model.name == text


def test_a_string_that_looks_like_a_flag_is_given_with_an_equals_sign() -> None:
    assert read("--model.name=--train.steps").model.name == "--train.steps"
    assert problems("--model.name", "--train.fast") == ["model.name has no value: write --model.name=VALUE"]


def test_a_table_is_given_as_json_and_merges_with_the_file_and_with_a_flag_before() -> None:
    file = "[model.overrides]\na = 1\n[model.overrides.deep]\nx = 1\ny = 2"
    flag = "--model.overrides"
    run = read(flag, '{"b": [1, 2.5]}', flag, '{"deep": {"y": 3}}', file=file)
    assert run.model.overrides == {"a": 1, "b": [1, 2.5], "deep": {"x": 1, "y": 3}}


def test_an_empty_table_removes_the_entries_of_earlier_layers() -> None:
    file = "[model.overrides]\na = 1"
    assert read(one=file, two="[model]\noverrides = {}").model.overrides == {}
    assert read("--model.overrides", "{}", "--model.overrides", '{"b": 2}', file=file).model.overrides == {
        "b": 2
    }


def test_flags_mean_the_same_in_any_order() -> None:
    flags = (
        ("--model.inner", "tiled"),
        ("--model.inner.size", "64", "32"),
        ("--model.inner.options", '{"a": 1}'),
        ("--train.no-fast",),
        ("--config", "file"),
    )
    Path("file").write_text("[model]\nname = 'large'\n[model.inner]\nkind = 'packed'\nkernel = 'fast'")
    expected = Run(
        model=Model(name="large", inner=Tiled(size=(64, 32), options={"a": 1})), train=Train(fast=False)
    )
    for order in itertools.permutations(flags):
        assert read(*itertools.chain(*order)) == expected


@pytest.mark.parametrize("size", ["64 32", "[64,32]", "[64, 32]"])
def test_a_pair_is_two_words_or_json(size: str) -> None:
    words = [size] if "[" in size else size.split()
    assert read("--model.inner", "tiled", "--model.inner.size", *words).model.inner == Tiled(size=(64, 32))


def test_both_spellings_of_a_kind_choose_it() -> None:
    assert read("--model.inner", "packed").model.inner == Packed()
    assert read("--model.inner.kind", "packed").model.inner == Packed()
    assert read("--model.inner.kind=tiled", "--model.inner", "packed").model.inner == Packed()


TILED = "[model.inner]\nkind = 'tiled'\nsize = 64\noptions = {a = 1}"


def test_a_later_layer_of_the_same_kind_keeps_the_options() -> None:
    run = read("--model.inner", "tiled", "--model.inner.size", "32", file=TILED)
    assert run.model.inner == Tiled(size=32, options={"a": 1})


def test_another_kind_drops_the_options_of_the_earlier_kind() -> None:
    assert read("--model.inner", "packed", file=TILED).model.inner == Packed()
    back = "[model.inner]\nkind = 'packed'"
    assert read("--model.inner", "tiled", file=TILED, back=back).model.inner == Tiled()


def test_options_may_come_before_the_kind_that_they_belong_to() -> None:
    assert read("--model.inner", "tiled", file="[model.inner]\nsize = 64").model.inner == Tiled(size=64)


def test_options_of_a_kind_that_is_not_chosen_are_refused() -> None:
    expected = 'model.inner.size = 8 belongs to kind "tiled", and model.inner.kind is "{}": ...'
    for kind in ("plain", "packed"):
        (line,) = problems("--model.inner.size", "8", "--model.inner", kind)
        assert line.startswith(expected.format(kind).removesuffix("..."))
    (line,) = problems("--model.inner.size", "8")
    assert line.startswith(expected.format("plain").removesuffix("..."))
    (line,) = problems("--model.inner.size", "8", file="[model.inner]\nkind = 'packed'")
    assert line.startswith(expected.format("packed").removesuffix("..."))


def test_layers_may_be_rewritten_before_they_are_laid_over_each_other() -> None:
    Path("file").write_text(TILED)

    def expand(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [layers[0], {"model": {"inner": {"size": 7}}}, *layers[1:]]

    run = load(Run, ["--config", "file", "--model.name", "again"], prog="run", expand=expand).config
    assert run.model == Model(name="again", inner=Tiled(size=7, options={"a": 1}))


def test_a_key_of_another_kind_is_refused_unless_a_later_layer_chooses_that_kind() -> None:
    first = "[model.inner]\nsize = 64"
    packed = "[model.inner]\nkind = 'packed'"
    tiled = "[model.inner]\nkind = 'tiled'"
    assert read(one=first, two=tiled).model.inner == Tiled(size=64)
    assert read(one=first, two=packed, three=tiled).model.inner == Tiled(size=64)
    (line,) = problems(one=first, two=packed)
    rule = 'belongs to kind "tiled", and model.inner.kind is "packed": '
    assert line.startswith(f"model.inner.size = 64 {rule}")
    # Once the kind has been chosen, a still later layer may choose another kind.
    assert read(one=first, two=tiled, three=packed).model.inner == Packed()
    wrong = "[model.inner]\nsize = 'x'"
    (line,) = problems(one=wrong, two=tiled)
    assert line.startswith('model.inner.size = "x" is not an integer')


def test_the_same_wrong_value_of_two_layers_is_reported_once() -> None:
    first, second = (f"[model.inner]\nkind = '{kind}'\nkernel = 'x'" for kind in ("tiled", "packed"))
    (line,) = problems(one=first, two=second)
    assert line.startswith('model.inner.kernel = "x" is not one of')


@pytest.mark.parametrize(
    ("value", "rule"), [("0", "must be -1 or at least 1: use 1 or more"), ("x", "is not -1 or an integer: ")]
)
def test_a_union_of_a_literal_and_a_number_has_one_message(value: str, rule: str) -> None:
    (line,) = problems("--train.freq", value)
    assert line.partition(" = ")[2].partition(" ")[2].startswith(rule)


def test_loaded_tells_of_a_dry_run() -> None:
    assert loaded("--dry-run").dry_run
    assert not loaded("--dry_run=false").dry_run
    assert not loaded().dry_run


def test_a_dry_run_may_be_for_another_number_of_ranks() -> None:
    def ranks(*argv: str) -> int:
        seen = []

        def check(run: Run, world_size: int, dry_run: bool) -> list[Problem]:
            seen.append(world_size)
            return []

        assert [load(Run, argv, prog="run", check=check, world_size=2).world_size] == seen
        return seen[0]

    assert ranks() == ranks("--dry-run") == 2
    assert ranks("--dry-run", "--world-size", "64") == ranks("--world_size=64", "--dry-run") == 64
    assert ranks("--dry-run", "--world-size", "64", "--world-size", "1_000") == 1000


@pytest.mark.parametrize(
    ("key", "reads", "is_reported"),
    [
        ("model.name", (), True),
        ("model.name", ("train.lr",), True),
        ("model.name", ("train.steps",), False),
        ("model.name", ("train",), False),
        ("model.name", ("model",), True),
        ("train.steps", (), False),
    ],
)
def test_a_problem_of_the_check_that_used_a_refused_key_or_its_section_is_not_reported(
    key: str, reads: tuple[str, ...], is_reported: bool
) -> None:
    seen = []

    def check(run: Run, world_size: int, dry_run: bool) -> list[Problem]:
        seen.append((run.train.lr, world_size, dry_run))
        return [Problem(key, 1, "is wrong", "x", reads)]

    argv = ["--train.steps", "x", "--train.lr", "7", "--dry-run"]
    with pytest.raises(ConfigError) as caught:
        load(Run, argv, prog="run", check=check, world_size=3)
    assert seen == [(7, 3, True)]
    assert [problem.key for problem in caught.value.problems] == ["train.steps", *[key] * is_reported]


def test_deep_nesting_is_refused() -> None:
    (line,) = problems("--model.overrides", '{"a": ' + "[" * 99 + "]" * 99 + "}")
    assert line == "model.overrides.a is nested more than 32 levels deep: write a flatter table"
    assert "is not a table" in problems("--model.overrides", '{"a": ' + "[" * 99999)[0]
    deep = '{"a":' * 400 + "1" + "}" * 400
    assert "levels deep" in problems("--model.overrides", deep, "--model.overrides", deep)[0]


def test_a_wrong_value_in_a_table_is_not_called_a_missing_table() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Counts:
        counts: dict[str, int] = field(default_factory=dict)

    rule = r'counts = \{"a": "x"\} is not a table of integers: write a table, or'
    with pytest.raises(ConfigError, match=rule):
        load(Counts, ["--counts.a", "x"], prog="count")


def test_a_near_miss_is_suggested_and_otherwise_the_choice_is_listed() -> None:
    assert near("stps", ["steps", "lr"]) == 'did you mean "steps"?'
    assert near("SEQ-LEN", ["steps", "seq_len"]) == 'did you mean "seq_len"?'
    assert near("x", ["steps", "lr"]) == 'choose one of "steps", "lr"'
    assert near(7, [1]) == "use 1"
    assert near("x", []) == "leave it out"


def test_a_problem_reads_as_key_value_rule_and_remedy() -> None:
    problem = Problem("a.b", 4, "does not divide c.d = 6", "use 1, 2, 3 or 6")
    assert str(problem) == "a.b = 4 does not divide c.d = 6: use 1, 2, 3 or 6"
    assert str(ConfigError([problem, problem])) == f"{problem}\n{problem}"
    assert str(Problem("k", {"a": [1, None, "ü"]}, "r", "m")) == 'k = {"a": [1, null, "ü"]} r: m'


@pytest.mark.parametrize(
    ("text", "value"), [(".001", 0.001), ("+5", 5), ("1_000", 1000), ("5.", 5), ("1e-3", 1e-3)]
)
def test_numbers_may_be_written_as_in_toml_or_python(text: str, value: float) -> None:
    assert read("--train.lr", text).train.lr == value
    if isinstance(value, int) and "." not in text:
        assert read("--train.steps", text).train.steps == value
