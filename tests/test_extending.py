"""The five plugins of docs/extending.md train together, with the same numbers on one rank and on four."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import plugin_cases as cases
import pytest
import torch
from attention_cases import EXACT, POSITIONS, QUERIES, compare

from torchtitan_lite.cli import main as command
from torchtitan_lite.config.job import load_job
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.models.rope import rotation
from torchtitan_lite.train import main

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"^```\w+\n# (\w+\.\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
PLUGINS = ("post_norm", "sums", "lion", "plain_attention", "spikes")
STEPS = range(1, 7)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files of the page. Their registrations are undone after the test."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    with cases.forgotten():
        yield tmp_path


def options(folder: Path, *words: str) -> list[str]:
    cache = str(folder / "cache")
    return ["--config", str(folder / "run.toml"), "--job.device", "cpu", "--data.cache-dir", cache, *words]


def test_the_page_has_a_file_for_every_plugin_and_its_run() -> None:
    assert set(FILES) == {"run.toml", *(f"{name}.py" for name in PLUGINS)}


def test_one_rank_and_fsdp_2_x_tp_2_have_the_same_numbers(ranks, folder: Path) -> None:
    runs = {}
    for name, n_ranks, words in (
        ("one", 1, ["--training.local-batch-size", "8"]),
        ("four", 4, ["--training.local-batch-size", "4", "--parallelism.tensor-parallel-degree", "2"]),
    ):
        own = folder / name
        own.mkdir()
        lines = ranks(n_ranks).run(cases.run_to_the_end, options(folder, *words), own)
        assert all(of_rank == lines[0] for of_rank in lines)
        runs[name] = lines[0], (own / "spikes.txt").read_text()
    (one, said_by_one), (four, said_by_four) = runs["one"], runs["four"]
    assert [line["step"] for line in one] == list(STEPS) == [line["step"] for line in four]
    for key in ("loss", "grad_norm", "lr", "n_tokens_seen"):
        found, wanted = ([line[key] for line in lines] for lines in (four, one))
        assert found == pytest.approx(wanted, rel=1e-9), key
    assert said_by_one == said_by_four == "done: 0 spikes\n"


def test_a_step_is_used_only_with_the_plugin_of_its_architecture(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--job.dump-folder", str(folder / "run"), "--training.steps", "2", "--checkpoint.enable")
    with cases.forgotten():
        assert main(options(folder, *words)) == 0
    assert "model: post_norm tiny\n" in capsys.readouterr().out
    generate = ["generate", str(folder / "run"), "--max-new-tokens", "3", "--device", "cpu"]
    with cases.forgotten():
        assert command(generate) == 2
        assert "name the plugin that has it with --plugins" in capsys.readouterr().err
        assert command([*generate, "--plugins", "post_norm"]) == 0


def test_a_model_without_a_config_json_is_not_exported(folder: Path, capsys) -> None:
    words = ("--job.dump-folder", str(folder / "run"), "--training.steps", "1", "--checkpoint.enable")
    assert main(options(folder, *words)) == 0
    export = ["export-hf", str(folder / "run"), "--out", str(folder / "hf"), "--plugins", "post_norm"]
    assert command(export) == 2
    assert "is an architecture that has no config.json" in capsys.readouterr().err


def test_a_run_does_not_resume_with_another_optimizer(run, folder: Path, capsys) -> None:
    words = ("--job.dump-folder", str(folder / "run"), "--checkpoint.enable")
    done = run("-m", "torchtitan_lite.train", *options(folder, *words, "--training.steps", "1"))
    assert done.returncode == 0, done.stderr
    assert main(options(folder, *words, "--training.steps", "2", "--optimizer.name", "AdamW")) == 2
    assert 'optimizer.name = "AdamW" was "Lion" when step 1 was saved' in capsys.readouterr().err


def test_a_parameter_without_a_row_is_refused_before_a_run_begins(folder: Path) -> None:
    row = 'Parameter(pattern="blocks.*.post_ffn_norm.weight", init="ones", group="vector"),'
    source = (folder / "post_norm.py").read_text()
    assert row in source
    (folder / "post_norm.py").write_text(source.replace(row, ""))
    with pytest.raises(ConfigError) as refused:
        load_job(options(folder))
    assert str(refused.value) == (
        "parameter blocks.*.post_ffn_norm.weight of PostNormConfig has no row in its table of parameters: "
        "add a Parameter with a pattern that matches to PostNormConfig.parameters"
    )


def test_a_weight_that_tensor_parallel_cannot_split_is_refused_before_ranks_start(folder: Path) -> None:
    source = (folder / "post_norm.py").read_text()
    bare = "self.gain = nn.Parameter(torch.ones(1))\n        self.post_ffn_norm ="
    row = 'Parameter(pattern="blocks.*.gain", init="ones", group="vector"),\n            *PARAMETERS'
    source = source.replace("self.post_ffn_norm =", bare, 1).replace("*PARAMETERS", row, 1)
    (folder / "post_norm.py").write_text(f"import torch\n{source}")
    assert load_job(options(folder, "--dry-run")).config.decoder.n_params > 0
    words = ("--dry-run", "--world-size", "2", "--parallelism.tensor-parallel-degree", "2")
    with pytest.raises(ConfigError, match=r"module blocks\.0 has a parameter and no weight_for"):
        load_job(options(folder, *words))


@pytest.mark.parametrize("listing", ["models", "attention"])
def test_a_plugin_that_takes_a_name_of_ours_is_refused_in_a_listing(
    folder: Path, listing: str, capsys
) -> None:
    text = (folder / "plain_attention.py").read_text().replace('"plain"', '"sdpa"')
    (folder / "taken.py").write_text(text)
    assert command([listing, "--plugins", "taken"]) == 2
    said = 'plugins = "taken" registers the attention backend "sdpa", which exists: choose another name\n'
    assert capsys.readouterr().err == said


def test_wrong_options_of_plugins_have_the_same_errors_as_our_own(folder: Path) -> None:
    wrong = {
        "--hooks.spikes.factr": ('did you mean "factor"?', "2"),
        "--optimizer.name": ('did you mean "Lion"?', "Lyon"),
        "--data.largest": ("must be at least 1", "0"),
        "--model.attention.queries-at-a-time": ("must be at least 1", "0"),
        "--model.flavor": ('did you mean "tiny"?', "tinny"),
    }
    for flag, (said, value) in wrong.items():
        with pytest.raises(ConfigError, match=re.escape(said)):
            load_job(options(folder, flag, value))


@pytest.fixture
def plain(folder: Path) -> ModuleType:
    sys.path.insert(0, str(folder))
    return importlib.import_module("plain_attention")


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_attention_of_the_page_equals_the_reference(plain: ModuleType, positions, queries) -> None:
    for window in (None, 7):
        backend = plain.Plain(queries_at_a_time=20)
        compare(backend, POSITIONS[positions], QUERIES[queries], window, 6, 2, 0.37, EXACT)


def test_the_norms_of_the_post_norm_block_come_after_attention_and_feed_forward(folder: Path) -> None:
    config = load_job(options(folder)).config.decoder
    block = config.build().layers[0]
    positions_BS = torch.arange(4)[None]
    inputs = torch.randn(1, 4, config.dim), rotation(positions_BS, config.head_dim, 1e4, None)
    mask = config.attention.mask(positions_BS)
    last_layers = block.attention.wo, block.ffn.w2
    for last in last_layers:
        last.weight.data.mul_(1000)  # so that the norm's eps does not matter
    before_BSD = block(*inputs, mask)
    for last in last_layers:
        last.weight.data.mul_(8)  # a norm right after the layer removes the factor
    torch.testing.assert_close(block(*inputs, mask), before_BSD, rtol=1e-3, atol=1e-3)
