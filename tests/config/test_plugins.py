"""Plugins: their options in files, flags, help, errors and the JSON schema."""

import re
from collections.abc import Iterator
from pathlib import Path

import plugin_cases as cases
import pytest

from torchtitan_lite import cli
from torchtitan_lite.attention import BACKENDS
from torchtitan_lite.config.job import JobConfig, load_job
from torchtitan_lite.config.load import ConfigError, to_toml
from torchtitan_lite.config.schema import at, choice_of, leaves
from torchtitan_lite.data import Jsonl, PythonStdlib, Text
from torchtitan_lite.train import main
from torchtitan_lite.training.optimizer import AdamW

ALL = ["--job.plugins", "mine"]
CHOSEN = """
[job]
plugins = ["mine"]
[model]
name = "olmo"
flavor = "tiny"
overrides = {norm = "before", dim = 128}
attention = {kind = "plain", chunk = 4}
[data]
dataset = "counting"
n_documents = 30
tokenizer = "shifted"
[tokenizers.shifted]
shift = 3
[optimizer]
name = "Descent"
momentum = 0.5
[hooks.clock]
every_steps = 7
"""
FLAGS = """
--model.name olmo --model.flavor tiny --model.attention plain --model.attention.chunk 4
--data.dataset counting --model.overrides {"norm":"before","dim":128} --data.n-documents 30
--data.tokenizer shifted
--tokenizers.shifted.shift 3 --optimizer.name Descent --optimizer.momentum 0.5 --hooks.clock.every-steps 7
"""


@pytest.fixture(autouse=True)
def plugin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Write the plugin `mine`, with a member for every door, to an empty working directory."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(cases.ALL)
    with cases.forgotten():
        yield


def read(*argv: str, **files: str) -> JobConfig:
    named = []
    for name, text in files.items():
        Path(name).write_text(text)
        named += ["--config", name]
    return load_job([*named, *argv]).config


def problems(*argv: str, **files: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(*argv, **files)
    return str(caught.value).splitlines()


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The help as one line of words."""
    with pytest.raises(SystemExit) as caught:
        load_job(argv)
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def values(job: JobConfig) -> list[object]:
    """The name and one option of the member that is chosen at every door."""
    assert job.attention.kind == "plain" and job.data.dataset == "counting"
    shifted, clock = job.tokenizers.shifted, job.hook_configs["clock"]
    options = [(job.model.attention, "chunk"), (job.data, "n_documents"), (job.optimizer, "momentum")]
    options += [(shifted, "shift"), (clock, "every_steps"), (job.decoder, "norm"), (job.decoder, "dim")]
    return [job.decoder.n_layers, job.optimizer.name, *(getattr(owner, name) for owner, name in options)]


def test_members_of_a_plugin_are_chosen_and_set_by_a_file_and_by_flags() -> None:
    expected = [3, "Descent", 4, 30, 0.5, 3, 7, "before", 128]
    assert values(read(file=CHOSEN)) == expected
    assert values(read(*ALL, *FLAGS.split())) == expected


def test_a_configuration_with_plugins_written_as_toml_loads_back_equal() -> None:
    job = read(file=CHOSEN)
    text = to_toml(job)
    assert "[tokenizers.shifted]\n" in text and "[hooks.clock]\n" in text
    assert read(again=text) == job
    assert read(again=to_toml(read(*ALL))) == read(*ALL)


def test_a_hook_is_active_as_soon_as_its_plugin_is_named() -> None:
    before = read().hook_configs
    hooks = read(*ALL).hook_configs
    assert hooks.keys() - before.keys() == {"clock"} and hooks["clock"].every_steps == 10


def test_a_later_list_of_plugins_replaces_an_earlier_one() -> None:
    Path("other.py").write_text("raise ValueError('not to be imported')")
    file = "[job]\nplugins = ['other']"
    assert read(*ALL, file=file).job.plugins == ("mine",)
    assert read(one=file, two="[job]\nplugins = []").job.plugins == ()


def test_help_shows_what_a_plugin_adds_at_every_door(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, *ALL, "--help", "--model.attention", "plain", "--data.dataset", "counting")
    for words in (
        "--job.plugins [STR [STR ...]] Modules to import",
        "Names: llama3, qwen3, olmo. (default: qwen3)",
        f"--model.attention {{{','.join([*(backend.kind for backend in BACKENDS), 'plain'])}}} ",
        "plain: Attention by another name. Each has options",
        "--model.attention.chunk INT Queries that are computed at a time. (default: 16)",
        "--data.dataset {python_stdlib,text,jsonl,counting} ",
        "--data.n-documents INT How many texts there are. (default: 200)",
        "Names: bytes, shifted. (default: bytes)",
        "--tokenizers.shifted.shift INT A number that only the fingerprint knows. (default: 1)",
        "--tokenizers.shifted.name {shifted} The name of this section; nothing else may stand here. ",
        "--optimizer.name {AdamW,Descent} ",
        "--hooks.clock.every-steps INT Steps from one time to the next. (default: 10)",
    ):
        assert words in text, words
    text = printed(capsys, *ALL, "--help", "--optimizer.name", "Descent")
    assert "--optimizer.momentum FLOAT Share of the last" in text and "--optimizer.beta1" not in text


def test_help_without_plugins_has_no_empty_section(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--help")
    assert "tokenizers options" not in text and "hooks options" not in text


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--model.name olm", 'model.name = "olm" is not a model family: did you mean "olmo"?'),
        (
            "--model.name olmo --model.flavor tiny_flx",
            'model.flavor = "tiny_flx" is not a flavor of olmo: did you mean "tiny_flex"?',
        ),
        (
            '--model.name olmo --model.flavor tiny --model.overrides {"nrom":1}',
            'model.overrides.nrom = 1 is not a known key: did you mean "norm"?',
        ),
        (
            '--model.name olmo --model.flavor tiny --model.overrides {"norm":"befor"}',
            'model.overrides.norm = "befor" is not one of "before", "after": did you mean "before"?',
        ),
        (
            "--model.attention plian",
            'model.attention.kind = "plian" is not a known kind: did you mean "plain"?',
        ),
        (
            "--model.attention plain --model.attention.chnk 3",
            'model.attention.chnk = 3 is not a known key: did you mean "chunk"?',
        ),
        (
            "--model.attention plain --model.attention.chunk 0",
            "model.attention.chunk = 0 must be greater than 0: use 16",
        ),
        (
            "--model.attention.chunk 3",
            'model.attention.chunk = 3 belongs to kind "plain", and model.attention.kind is "sdpa": ...',
        ),
        (
            "--data.dataset countin",
            'data.dataset = "countin" is not a known dataset: did you mean "counting"?',
        ),
        (
            "--data.dataset counting --data.n-document 3",
            'data.n_document = 3 is not a known key: did you mean "n_documents"?',
        ),
        ("--data.dataset counting --data.n-documents 0", "data.n_documents = 0 must be at least 1: use 200"),
        ("--data.tokenizer shiftd", 'data.tokenizer = "shiftd" does not exist: did you mean "shifted"?'),
        ("--data.tokenizer shifted --tokenizers.shifted.shift 0", "tokenizers.shifted.shift = 0 is 0: use 1"),
        (
            "--tokenizers.shiftd.shift 2",
            'tokenizers.shiftd = {"shift": 2} is not a known key: did you mean "shifted", or name ...',
        ),
        (
            "--optimizer.name Desent",
            'optimizer.name = "Desent" is not a known name: did you mean "Descent"?',
        ),
        (
            "--optimizer.name Descent --optimizer.momentm 0.1",
            'optimizer.momentm = 0.1 is not a known key: did you mean "momentum"?',
        ),
        ("--optimizer.name Descent --optimizer.lr 0", "optimizer.lr = 0.0 must be greater than 0: use 0.1"),
        (
            "--optimizer.name Descent --optimizer.beta1 0.5",
            'optimizer.beta1 = 0.5 belongs to name "AdamW", and optimizer.name is "Descent": ...',
        ),
        (
            "--hooks.clok.every-steps 3",
            'hooks.clok = {"every_steps": 3} is not a known key: did you mean "clock", or name ...',
        ),
        (
            "--hooks.clock.every-step 3",
            'hooks.clock.every_step = 3 is not a known key: did you mean "every_steps"?',
        ),
        ("--hooks.clock.every-steps x", 'hooks.clock.every_steps = "x" is not an integer: ...'),
        ("--hooks.clock.every-steps 0", "hooks.clock.every_steps = 0 must be at least 1: use 10"),
        (
            "--hooks.clock 3",
            "hooks.clock = 3 is a section, and a flag sets one key: write --hooks.clock.every_steps VALUE",
        ),
    ],
)
def test_errors_for_options_of_a_plugin_read_like_those_for_ours(flags: str, line: str) -> None:
    (found,) = problems(*ALL, *flags.split())
    assert found == line or (line.endswith("...") and found.startswith(line[:-3]))


def test_options_of_a_plugin_that_is_not_named_are_unknown() -> None:
    assert problems("--hooks.clock.every-steps", "3") == [
        'hooks.clock = {"every_steps": 3} is not a known key: leave it out, '
        + "or name the plugin that has it in job.plugins"
    ]
    assert problems("--hooks", "3") == [
        "hooks = 3 is a section, and a flag sets one key: write --hooks.KEY VALUE"
    ]
    assert problems(file="hooks = 3") == ["hooks = 3 is not a table: write hooks.KEY = ..."]


def test_the_schema_has_what_a_plugin_adds() -> None:
    keys = {"model.attention.chunk", "data.n_documents", "tokenizers.shifted.shift", "optimizer.momentum"}
    keys |= {"hooks.clock.every_steps"}
    assert not keys & set(leaves(JobConfig))
    read(*ALL)
    assert keys <= set(leaves(JobConfig))
    assert at(JobConfig, ["hooks", "clock", "every_steps"]) is int
    optimizers = choice_of(at(JobConfig, ["optimizer"]))
    assert optimizers and list(optimizers.members) == ["AdamW", "Descent"]


DESCENT = "[optimizer]\nname = 'Descent'\nlr = 2.0"
JSONL = "[data]\ndataset = 'jsonl'\npath = 'mine.py'\nfield = 'body'\ncache_dir = 'c'\n"


def test_a_changed_tag_keeps_what_both_members_have_and_drops_the_rest() -> None:
    assert read(file=JSONL).data == Jsonl(path="mine.py", field="body", cache_dir="c")
    assert read("--data.dataset", "text", file=JSONL).data == Text(path="mine.py", cache_dir="c")
    assert read("--data.dataset", "python_stdlib", file=JSONL).data == PythonStdlib(cache_dir="c")
    back = "[data]\ndataset = 'python_stdlib'\n"
    again = "[data]\ndataset = 'jsonl'\npath = 'mine.py'"
    assert read(one=JSONL, two=back, three=again).data == Jsonl(path="mine.py", cache_dir="c")
    adam = "[optimizer]\nlr = 0.125\nbeta1 = 0.5"
    job = read(*ALL, "--optimizer.name", "Descent", file=adam)
    assert (job.optimizer.lr, job.optimizer.name) == (0.125, "Descent")
    assert problems(*ALL, "--optimizer.name", "Descent", file="[optimizer]\nbeta1 = 'x'")[0].startswith(
        'optimizer.beta1 = "x" is not a number'
    )
    # An option that nobody set has the default of the new member.
    assert read(*ALL, "--optimizer.name", "Descent").optimizer.lr == 0.25
    assert read(*ALL, one=DESCENT, two="[optimizer]\nlr = 1.0").optimizer.lr == 1.0
    back = "[optimizer]\nname = 'AdamW'"
    assert read(*ALL, one=DESCENT, two=back).optimizer == AdamW(lr=2.0)


def test_a_key_of_the_same_name_and_another_type_is_dropped_with_the_tag() -> None:
    Path("mine.py").write_text(cases.ALL.replace('path: str = "nowhere"', "path: int = 3"))
    assert getattr(read(*ALL, "--data.dataset", "counting", file=JSONL).data, "path", None) == 3


def test_a_failing_plugin_hides_only_problems_of_sections_that_plugins_extend() -> None:
    Path("mine.py").write_text("1 / 0")
    lines = problems("--training.steps", "x", "--job.device", "tpu", *FLAGS.split(), file=CHOSEN)
    assert [line.split(" ")[:3] for line in lines] == [
        ["job.plugins", "=", '"mine"'],
        ["job.device", "=", '"tpu"'],
        ["training.steps", "=", '"x"'],
    ]


def test_a_list_of_plugins_with_a_wrong_type_is_refused() -> None:
    assert problems(file="[job]\nplugins = 'mine'")[0].startswith('job.plugins = "mine" is not a list')
    assert problems(file="[job]\nplugins = ['mine', 3]")[0].startswith("job.plugins = ")


def test_a_plugin_beside_the_file_is_found_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run.toml").write_text(CHOSEN)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_job(["--config", "../run.toml"]).config.optimizer.name == "Descent"


def test_a_missing_plugin_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--job.plugins", "nowhere"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith('job.plugins = "nowhere" cannot be imported (ModuleNotFoundError: No module named ')


def test_the_family_of_a_plugin_has_flavors_with_suffixes() -> None:
    job = read(*ALL, "--model.name", "olmo", "--model.flavor", "tiny_varlen")
    assert job.attention.kind == "varlen" and type(job.decoder).__name__ == "Olmo"


def test_the_listings_show_what_plugins_add(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "--plugins", "mine"]) == 0
    assert re.search(r"^olmo +tiny +[\d,]+ ", capsys.readouterr().out, re.MULTILINE)
    assert cli.main(["attention", "--plugins", "mine"]) == 0
    assert re.search(r"^plain +cpu, cuda ", capsys.readouterr().out, re.MULTILINE)
    assert cli.main(["models", "--plugins", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith('plugins = "nowhere" cannot be imported')
