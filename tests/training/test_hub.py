"""Hugging Face models in and out: bit for bit, on any mesh, and never a partial model."""

import dataclasses
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_cases as cases
import pytest
import resume_cases
import torch
from ranks import RanksOf
from resume_cases import main
from safetensors.torch import load_file, save_file

from torchtitan_lite.checkpoint.manifest import Damaged
from torchtitan_lite.checkpoint.restore import verify
from torchtitan_lite.checkpoint.tensors import Piece
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.data.tokenizer import ByteTokenizer, load_tokenizer
from torchtitan_lite.launch.world import World
from torchtitan_lite.models.huggingface import config_json
from torchtitan_lite.models.registry import families
from torchtitan_lite.training import hub


@pytest.fixture(scope="module", params=["llama3 1B", "llama3 8B", "qwen3 0.6B", "qwen3 8B"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers, in several files."""
    place = tmp_path_factory.mktemp("model")
    cases.theirs(cases.small(cases.PRESETS[request.param]), place).save_pretrained(
        place / "hf", max_shard_size="100KB"
    )
    return place / "hf"


def logits_of(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(100)[None]).logits


def test_import_and_export_give_the_same_model_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    hub.import_(folder, tmp_path / "steps", None)
    found = verify(tmp_path / "steps" / "step-0", World())
    assert found.state.model_only
    hub.export(found, ByteTokenizer(), tmp_path / "out", "float32")
    theirs = {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(folder))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_tied_head_that_is_stored_twice_must_be_the_same(tmp_path: Path) -> None:
    cases.theirs(cases.small(cases.PRESETS["qwen3 0.6B"]), tmp_path).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    hub.import_(tmp_path, tmp_path / "steps", None)
    weights["lm_head.weight"][3, 3] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        hub.import_(tmp_path, tmp_path / "other", None)
    assert not (tmp_path / "other").exists()


def with_frequencies(folder: Path) -> list[str]:
    """Store rotary frequencies beside the weights of a model, as old versions of transformers did."""
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    weights_say(folder, **{name: torch.full((8,), 7.0) for name in names})
    return names


@pytest.mark.parametrize("preset", ["llama3 1B", "llama3 8B", "qwen3 0.6B"])
def test_rotary_frequencies_among_the_weights_are_ignored_as_by_transformers(
    preset: str, tmp_path: Path
) -> None:
    place = tmp_path / "model"
    place.mkdir()
    cases.theirs(cases.small(cases.PRESETS[preset]), place).save_pretrained(place)
    before = logits_of(place)
    names = with_frequencies(place)
    assert torch.equal(logits_of(place), before)
    hub.import_(place, tmp_path / "steps", None)
    found = verify(tmp_path / "steps" / "step-0", World())
    hub.export(found, ByteTokenizer(), tmp_path / "out", "float32")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == load_file(place / "model.safetensors").keys() - {*names}
    assert torch.equal(logits_of(tmp_path / "out"), before)
    weights_say(place, **{"model.layers.0.self_attn.rotary_emb.cos": torch.ones(8)})
    with pytest.raises(ConfigError, match=r"rotary_emb\.cos is in the files alone"):
        hub.import_(place, tmp_path / "other", None)


def test_transformers_reads_the_byte_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ByteTokenizer().save(tmp_path)
    encoder = AutoTokenizer.from_pretrained(tmp_path)
    every = "".join(map(chr, range(0x300))) + " \n\t 你好 <|endoftext> \U0001f600"
    for text in ("", "a", "  a\n", every):
        assert encoder(text)["input_ids"] == ByteTokenizer().encode(text).tolist()
        assert encoder.decode(encoder(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    assert (encoder.eos_token_id, len(encoder)) == (256, 257)
    ours = load_tokenizer(str(tmp_path))
    assert ours.encode(every).tolist() == ByteTokenizer().encode(every).tolist()
    assert (ours.eos_id, ours.vocab_size) == (256, 257)


# --- through whole runs ---


@pytest.fixture(scope="module")
def model(texts: Path) -> Path:
    """A model of transformers with a row for each byte."""
    (texts / "model").mkdir()
    config = cases.small(families["qwen3"]["0.6B"])
    config = cases.replace(config, vocab_size=264)
    cases.theirs(config, texts / "model").save_pretrained(texts / "model")
    return texts / "model"


def words(texts: Path, model: Path, **changes: Any) -> list[str]:
    """A run of three steps from that model, validated before and after, and exported."""
    values = {
        "model__name": "hf",
        "model__flavor": model,
        "training__steps": 3,
        "training__local_batch_size": 8,
        "lr_scheduler__total_steps": 3,
        "checkpoint__initial_load_path": model,
        "checkpoint__initial_load_in_hf": "true",
        "checkpoint__last_save_in_hf": "true",
        **changes,
    }
    base = resume_cases.run_of(texts / "short.jsonl", texts / "cache", **values)
    at = base.index("--model.overrides")
    return [*base[:at], *base[at + 2 :]]


def their_validation_loss(folder: Path, texts: Path, seq_len: int) -> float:
    """The mean loss of the held-out text, computed by transformers document by document."""
    from transformers import AutoModelForCausalLM

    from torchtitan_lite.data import Jsonl, Samples, in_order, prepare

    data = Jsonl(
        path=str(texts / "short.jsonl"),
        cache_dir=str(texts / "cache"),
        validation_fraction=0.2,
    )
    held_out = prepare(data, ByteTokenizer()).validation
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for batch in in_order(Samples(held_out, seq_len), 1):
        starts = (batch.positions_BS[0] == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], batch.positions_BS.shape[1]], strict=True):
            labels = batch.labels_BS[0, start:end]
            with torch.no_grad():
                logits = theirs(batch.tokens_BS[:, start:end]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
    return total / count


def test_transformers_computes_the_logged_loss_before_and_after_training(
    texts: Path, model: Path, tmp_path: Path
) -> None:
    argv = words(texts, model, job__dump_folder=tmp_path / "run", validation__steps=-1)
    assert main(*argv) == 0
    losses = [
        line["validation_loss"] for line in resume_cases.lines(tmp_path / "run") if "validation_loss" in line
    ]
    seq_len = int(argv[argv.index("--training.seq-len") + 1])
    for folder, loss in ((model, losses[0]), (tmp_path / "run" / "hf", losses[-1])):
        assert their_validation_loss(folder, texts, seq_len) == pytest.approx(loss, rel=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_file_has_the_mode_that_the_umask_gives(
    umask: int, texts: Path, model: Path, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        (tmp_path / "bytes").mkdir()
        ByteTokenizer().save(tmp_path / "bytes")
        places = {"data__cache_dir": tmp_path / "cache", "data__tokenizer": tmp_path / "bytes"}
        more = {"metrics__enable_tensorboard": "true", "profiling__enable_profiling": "true"}
        more |= {"profiling__profile_freq": 2, "job__dump_folder": tmp_path / "run"}
        assert main(*words(texts, model, **places, **more)) == 0
        hub.import_(tmp_path / "run" / "hf", tmp_path / "imported", None)
    finally:
        os.umask(before)
    found = list(tmp_path.rglob("*"))
    assert {"model.safetensors", "run.json", "exit.json", "step-2.json", "train.tokens"} <= {
        path.name for path in found
    }
    wrong = {
        str(path.relative_to(tmp_path)): oct(mode)
        for path in found
        if not path.is_symlink()
        and (mode := stat.S_IMODE(path.stat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}


def config_says(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def weights_say(folder: Path, **changes: torch.Tensor) -> None:
    weights = {**load_file(folder / "model.safetensors"), **changes}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


NORM = "model.norm.weight"
HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shape": (
        lambda folder: weights_say(folder, **{NORM: torch.ones(3)}),
        f"{NORM} is [32] here and [3] in the files",
    ),
    "a dtype": (
        lambda folder: weights_say(folder, **{NORM: torch.ones(32, dtype=torch.int32)}),
        f"{NORM} is I32, and can be read from F32, F16, BF16",
    ),
    "NaN": (lambda folder: weights_say(folder, **{NORM: torch.full((32,), torch.nan)}), "are not finite"),
    "no folder": (shutil.rmtree, "config.json is not there"),
    "another model": (
        lambda folder: config_says(folder, rms_norm_eps=1.0),
        "model.overrides.norm_eps = 1e-06 is 1.0 in",
    ),
    "another kind": (
        lambda folder: config_says(folder, attention_bias=True),
        "attention_bias = true is not what",
    ),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_start_from_a_broken_or_hostile_model_is_refused_in_one_line_and_writes_nothing(
    name: str, texts: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, expected = HARMS[name]
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    harm(broken)
    argv = words(texts, model, job__dump_folder=tmp_path / "run", checkpoint__initial_load_path=broken)
    assert main(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line and str(broken) in line
    left = [path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert sorted(map(str, left)) == ["exit.json", "lock"]


def test_a_run_starts_with_a_model_that_has_rotary_frequencies(
    texts: Path, model: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(model, tmp_path / "old"))
    with_frequencies(old)
    for name, source in (("run", old), ("other", model)):
        changes = {"job__dump_folder": tmp_path / name, "checkpoint__initial_load_path": source}
        assert main(*words(texts, model, **changes)) == 0
    one, other = (
        [line.get("loss") for line in resume_cases.lines(tmp_path / name)] for name in ("run", "other")
    )
    assert one == other


def test_every_rank_refuses_a_broken_model(ranks: RanksOf, texts: Path, model: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    cut(broken)
    argv = words(
        texts,
        model,
        job__dump_folder=tmp_path / "run",
        checkpoint__initial_load_path=broken,
        training__local_batch_size=4,
    )
    for refusal in ranks(2).run(cases.refusal_of, argv, timeout=100):
        assert "model.safetensors is no whole safetensors file (" in refusal


def test_a_model_is_refused_with_another_tokenizer(
    texts: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(model, tmp_path / "own"))
    ByteTokenizer().save(own)
    argv = words(texts, own, job__dump_folder=tmp_path / "run", checkpoint__last_save_in_hf="false")
    assert main(*argv) == 2
    assert capsys.readouterr().err == (
        f'data.tokenizer = "bytes" is not the tokenizer of {own}: use {own}, or --checkpoint.allow-changes\n'
    )
    assert main(*argv, "--checkpoint.allow-changes", "--training.steps", "1") == 0
    assert f'allowed: data.tokenizer = "bytes" is not the tokenizer of {own}' in capsys.readouterr().out
    fresh = ("--job.dump-folder", tmp_path / "other", "--training.steps", "1")
    assert main(*argv, "--data.tokenizer", own, *fresh) == 0


def test_the_export_is_always_of_the_last_step_of_the_run(texts: Path, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def go(steps: int, **changes: object) -> dict[str, bytes]:
        options = {"training__steps": steps, "lr_scheduler__total_steps": 9, **changes}
        assert main(*words(texts, model, job__dump_folder=folder, **options)) == 0
        return {path.name: path.read_bytes() for path in (folder / "hf").iterdir()}

    first = go(3)
    assert go(3) == first
    second = go(5)
    assert second.keys() == first.keys() and second["model.safetensors"] != first["model.safetensors"]
    aside = folder / "earlier" / "hf" / "model.safetensors"
    assert aside.read_bytes() == first["model.safetensors"]
    # Killed during the export: the same command removes the partial folder and exports again.
    (folder / "hf").rename(folder / "hf.tmp-00000001")
    assert go(5) == second
    assert not (folder / "hf.tmp-00000001").exists()
    # Another last step, or another precision, is exported anew.
    again = go(3, checkpoint__load_step=3)
    assert again == first
    halved = go(3, checkpoint__export_dtype="bfloat16")
    assert len(halved["model.safetensors"]) < 0.6 * len(first["model.safetensors"])
    # The same for a last step that holds only the model.
    only = {"checkpoint__last_save_model_only": "true", "checkpoint__export_dtype": "bfloat16"}
    halved = go(6, **only)
    shutil.rmtree(folder / "hf")
    assert go(6, **only) == halved


def test_the_model_that_a_run_starts_with_may_be_in_its_own_folder(
    texts: Path, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(model, folder / "hf")
    ByteTokenizer().save(folder / "hf")
    shutil.copytree(folder / "hf", folder / "tokenizer")
    argv = words(texts, folder / "hf", job__dump_folder=folder, data__tokenizer=folder / "tokenizer")
    assert main(*argv) == 0
    assert {path.name for path in folder.iterdir()} >= {"hf", "tokenizer", "checkpoint"}


def test_a_weight_that_a_precision_cannot_hold_is_refused(tmp_path: Path) -> None:
    cases.theirs(cases.small(families["llama3"]["8B"]), tmp_path).save_pretrained(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.norm.weight"][3] = -7e4
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    hub.import_(tmp_path / "hf", tmp_path / "steps", None)
    found = verify(tmp_path / "steps" / "step-0", World())
    with pytest.raises(
        ConfigError, match=r'dtype = "float16" cannot hold model\.norm\.weight, which reaches 7e\+04'
    ):
        hub.export(found, ByteTokenizer(), tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()
    hub.export(found, ByteTokenizer(), tmp_path / "out", "bfloat16")


def test_a_model_that_transformers_lacks_is_not_exported(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = resume_cases.run_of(
        texts / "short.jsonl",
        texts / "cache",
        model__name="llama3",
        model__flavor="debugmodel",
        model__overrides={**resume_cases.MODEL, "sliding_window": 7},
        training__steps=1,
        training__local_batch_size=8,
        lr_scheduler__warmup_steps=0,
        job__dump_folder=tmp_path / "run",
    )
    assert main(*argv, "--checkpoint.last-save-in-hf") == 2
    expected = "sliding_window = 7 has no model in transformers"
    assert f"model.overrides.{expected}" in capsys.readouterr().err
    assert main(*argv) == 0
    found = verify(tmp_path / "run" / "checkpoint" / "step-1", World())
    with pytest.raises(ConfigError, match=expected):
        hub.export(found, ByteTokenizer(), tmp_path / "hf", "float32")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"dim": "wide"},
        {"dim": None},
        {"dim": -8},
        {"dim": True},
        {"rope_scaling": {"x": 1}},
        {"experts": 8},
        {"architecture": 5},
    ],
    ids=str,
)
def test_a_step_with_a_wrong_record_of_its_model_is_damaged(changes: dict[str, object]) -> None:
    record = hub.record_of(families["llama3"]["8B"])
    assert hub.decoder_of({"model": record}) == families["llama3"]["8B"]
    for wrong in ({**record, **changes}, None):
        with pytest.raises(Damaged, match="its record of the model is wrong"):
            hub.decoder_of({"model": wrong})


def test_a_record_that_lacks_a_field_is_not_judged_by_the_value_of_a_preset() -> None:
    record = {**hub.record_of(families["llama3"]["8B"]), "n_heads": 2}
    del record["n_kv_heads"]
    with pytest.raises(Damaged, match="n_kv_heads is missing or unknown"):
        hub.decoder_of({"model": record})


def test_loading_holds_no_second_copy_of_the_model(tmp_path: Path) -> None:
    config = dataclasses.replace(cases.small(families["qwen3"]["8B"]), n_layers=24, dim=512, ffn_dim=1024)
    weights = {config.parameters.hub_name(name): torch.ones(shape) for name, shape in config.shapes.items()}
    total, largest = sum(x.nbytes for x in weights.values()), max(x.nbytes for x in weights.values())
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config_json(config, dtype="float32", eos_id=0)))
    del weights
    into = {name: torch.zeros(shape) for name, shape in config.shapes.items()}
    own = {name: Piece(local=x, shape=x.shape, offsets=torch.Size([0] * x.ndim)) for name, x in into.items()}
    held = cases.held_during(lambda: hub.load_weights(tmp_path, config, own, World(), "x"))
    assert all((x == 1).all() for x in into.values())
    assert largest < total / 30 and held < total / 4


MESH = {"parallelism__data_parallel_shard_degree": 2, "parallelism__tensor_parallel_degree": 2}


def test_a_mesh_and_one_rank_export_the_same_bytes(
    ranks: RanksOf, texts: Path, model: Path, tmp_path: Path
) -> None:
    exported = []
    for size, mesh in ((1, {}), (4, {**MESH, "training__local_batch_size": 4})):
        folder = tmp_path / str(size)
        run = (
            words(texts, model, job__dump_folder=folder, checkpoint__last_save_in_hf="false", **mesh),
            {"stop_at": 0},
        )
        for (start,) in ranks(size).run(resume_cases.starts, [run], timeout=100):
            assert (start.began, start.ended, start.status) == (0, 0, 75)
        found = verify(folder / "checkpoint" / "step-0", World())
        hub.export(found, ByteTokenizer(), folder / "hf", "bfloat16")
        exported.append({path.name: path.read_bytes() for path in (folder / "hf").iterdir()})
    assert exported[0] == exported[1]
