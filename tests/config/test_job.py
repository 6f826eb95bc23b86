"""The configuration of a run: its sections, flavors, and checks between sections."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from torchtitan_lite.attention import Flex, Sdpa, Varlen
from torchtitan_lite.config.job import JobConfig, ModelSection, load_job
from torchtitan_lite.config.load import ConfigError

SECTIONS = (
    "job model training optimizer lr_scheduler metrics activation_checkpoint compile checkpoint parallelism "
    "validation profiling comm debug data tokenizers hooks"
)
FLASH = Flex(kernel_options={"BACKEND": "FLASH"})


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def model(*argv: str, **files: str) -> ModelSection:
    """The model section of `files`, in order, and `argv`: a dry run for a GPU, which needs none."""
    named = []
    for name, text in files.items():
        Path(name).write_text(text)
        named += ["--config", name]
    return load_job([*named, *argv, "--job.device", "cuda", "--dry-run"]).config.model


def test_the_names_of_the_sections() -> None:
    assert {section.name for section in fields(JobConfig)} == set(SECTIONS.split())


@pytest.mark.parametrize(
    ("suffix", "attention"), [("", Sdpa()), ("_flex", Flex()), ("_flex_flash", FLASH), ("_varlen", Varlen())]
)
def test_a_suffix_of_the_flavor_chooses_the_attention(suffix: str, attention: object) -> None:
    section = model("--model.flavor", f"0.6B{suffix}")
    assert (section.flavor, section.attention) == (f"0.6B{suffix}", attention)
    assert model(file=f"[model]\nflavor = '0.6B{suffix}'") == section


def test_a_model_without_attention_uses_that_of_its_flavor() -> None:
    job = JobConfig(model=ModelSection(flavor="debugmodel_flex"))
    assert job.model.attention is None
    assert job.attention == job.decoder.attention == Flex()
    assert JobConfig().attention == load_job([]).config.model.attention == Sdpa()


def test_attention_options_change_the_attention_of_the_suffix() -> None:
    expected = Flex(block_size=(64, 32))
    assert (
        model("--model.flavor", "debugmodel_flex", "--model.attention.block-size", "64", "32").attention
        == expected
    )
    assert (
        model("--model.attention.block-size", "64", "32", "--model.flavor", "debugmodel_flex").attention
        == expected
    )
    file = "[model]\nflavor = 'debugmodel_flex'\nattention.block_size = [64, 32]"
    assert model(file=file).attention == expected
    both = model(
        "--model.flavor", "debugmodel_flex_flash", "--model.attention.kernel-options", '{"num_warps": 4}'
    )
    assert both.attention == Flex(kernel_options={"BACKEND": "FLASH", "num_warps": 4})


def test_a_later_suffix_replaces_the_whole_attention() -> None:
    file = "[model]\nflavor = 'debugmodel_flex_flash'"
    assert model("--model.flavor", "debugmodel_flex", file=file).attention == Flex()
    assert model("--model.flavor", "debugmodel_varlen", file=file).attention == Varlen()
    small = "[model]\nattention = {kind = 'flex', block_size = 64}"
    assert model("--model.flavor", "debugmodel_flex_flash", file=small).attention == FLASH


def test_a_flavor_without_suffix_leaves_the_attention_alone() -> None:
    assert model("--model.flavor", "0.6B", file="[model.attention]\nkind = 'flex'").attention == Flex()


def test_an_explicit_kind_wins_over_the_suffix_and_the_suffix_is_removed() -> None:
    for argv in (
        ["--model.flavor", "debugmodel_flex_flash", "--model.attention", "varlen"],
        ["--model.attention", "varlen", "--model.flavor", "debugmodel_flex_flash"],
    ):
        assert model(*argv) == ModelSection(flavor="debugmodel", attention=Varlen())
    later = model("--model.attention", "sdpa", file="[model]\nflavor = 'debugmodel_flex'")
    assert later == ModelSection(flavor="debugmodel", attention=Sdpa())


def test_a_dry_run_for_cuda_needs_no_gpu_and_a_run_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_job(["--job.device", "cuda", "--dry-run"]).config.device == "cuda"
    with pytest.raises(ConfigError) as caught:
        load_job(["--job.device", "cuda"])
    expected = 'job.device = "cuda" is not available, as torch finds no GPU: use "cpu" or "auto"'
    assert str(caught.value) == expected
    assert load_job([]).config.device == "cpu"


def test_the_flash_kernel_is_refused_if_the_device_resolves_to_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("auto", "cpu"):
        with pytest.raises(ConfigError) as caught:
            load_job(["--model.flavor", "debugmodel_flex_flash", "--job.device", device, "--dry-run"])
        (problem,) = caught.value.problems
        assert problem.key == "model.attention.kernel_options"
    load_job(["--model.flavor", "debugmodel_flex_flash", "--job.device", "cuda", "--dry-run"])


def test_the_attention_of_an_unknown_model_is_checked() -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(["--model.name", "gpt", "--model.attention", "varlen", "--model.attention.kernel", "fa3"])
    keys = [problem.key for problem in caught.value.problems]
    assert "model.name" in keys
    assert any(key.startswith("model.attention.kernel") for key in keys)


def test_the_decoder_is_that_of_the_flavor_with_its_overrides() -> None:
    job = load_job(["--model.overrides", '{"n_layers": 2}', "--model.attention", "varlen"]).config
    assert (job.decoder.n_layers, job.decoder.attention) == (2, Varlen())
    assert JobConfig().decoder.n_layers == 6


def test_every_file_in_configs_resolves() -> None:
    folder = Path(__file__).parents[2] / "configs"
    files = sorted(folder.rglob("*.toml"))
    assert folder / "debugmodel.toml" in files
    for file in files:
        load_job(["--config", str(file), "--dry-run"])


def test_checking_a_configuration_writes_nothing(tmp_path: Path) -> None:
    load_job(["--job.dump-folder", "new/run", "--data.cache-dir", "new/cache"])
    assert not list(tmp_path.iterdir())


def test_null_and_an_empty_table_undo_the_overrides_of_a_file() -> None:
    file = "[model]\noverrides = {sliding_window = 16, n_layers = 2, rope_scaling = {factor = 2}}"
    section = model("--model.overrides", '{"sliding_window": null, "rope_scaling": null}', file=file)
    assert section.overrides == {"n_layers": 2, "rope_scaling": {"factor": 1.0}}
    assert model("--model.overrides", "{}", file=file).overrides == {}


def test_an_empty_table_removes_the_kernel_options_of_the_flavor() -> None:
    argv = ["--model.flavor", "debugmodel_flex_flash", "--model.attention.kernel-options", "{}"]
    assert model(*argv) == ModelSection(flavor="debugmodel", attention=Flex())
    assert model(*argv[2:], file="[model]\nflavor = 'debugmodel_flex_flash'").attention == Flex()


def test_checks_between_sections_run_although_overrides_are_wrong() -> None:
    overrides = '{"n_layers": 2.5, "n_heads": 3}'
    with pytest.raises(ConfigError) as caught:
        model("--model.overrides", overrides, "--training.seq-len", "100000")
    keys = [problem.key.rpartition(".")[2] for problem in caught.value.problems]
    assert keys == ["n_layers", "n_kv_heads", "seq_len"]
    with pytest.raises(ConfigError) as caught:
        model("--model.overrides", '{"max_seq_len": "x"}', "--training.seq-len", "100000")
    assert [problem.key for problem in caught.value.problems] == ["model.overrides.max_seq_len"]


def test_a_misspelt_suffix_is_the_only_problem_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        model("--model.attention.block-size", "64", file="[model]\nflavor = 'debugmodel_flx'")
    assert [problem.key for problem in caught.value.problems] == ["model.flavor"]


def test_a_flag_with_the_default_value_undoes_the_file(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text('{"body": "a text"}\n')
    (tmp_path / "run.toml").write_text('[data]\ndataset = "jsonl"\npath = "lines.jsonl"\nfield = "body"\n')
    job = load_job(["--config", "run.toml", "--data.field", "text"]).config
    assert getattr(job.data, "field") == "text"  # noqa: B009
    with pytest.raises(ConfigError, match=r"data\.path = "):
        load_job(["--config", "run.toml", "--data.path", ""])


def test_a_run_cannot_write_to_the_folder_of_its_text(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "link").symlink_to("texts")
    text = ["--data.dataset", "text", "--data.path", "texts"]
    for folder in ("texts", "texts/", "./link", str(tmp_path / "texts")):
        with pytest.raises(ConfigError) as caught:
            load_job([*text, "--job.dump-folder", folder])
        rule = "is data.path too, and the run's own files must not become text"
        expected = (
            f'job.dump_folder = "{folder}" {rule}: name another folder, such as {folder.rstrip("/")}/run'
        )
        assert str(caught.value) == expected
    for folder in ("texts/run", "other", ""):
        load_job([*text, "--job.dump-folder", folder])
    load_job([*text[:-1], "texts/a.txt", "--job.dump-folder", "texts"])
