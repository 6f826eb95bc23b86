"""A start in a folder that holds a step to go on from, steps of another run, or a run that goes on."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import parallel_cases
import programs
import pytest
import resume_cases as cases
import torch
from resume_cases import lines, main, outcome, steps_in
from tokenizers import Tokenizer as Encoder
from tokenizers import models, pre_tokenizers

from torchtitan_lite import run_folder
from torchtitan_lite.checkpoint import CheckpointConfig
from torchtitan_lite.checkpoint.restore import verify
from torchtitan_lite.config.job import load_job
from torchtitan_lite.launch import world
from torchtitan_lite.launch.world import World
from torchtitan_lite.run_folder import RunFolder
from torchtitan_lite.training.outputs import lock

FLAG = "--checkpoint.allow-changes"
Go = Callable[..., int]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of documents, and a tokenizer for them."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("one", "other"):
        parallel_cases.write_documents(folder / f"{name}.jsonl")
    with (folder / "other.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    encoder = Encoder(models.WordLevel({"<|endoftext|>": 0, "[UNK]": 1, "a": 2}, unk_token="[UNK]"))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    encoder.save(str(folder / "tokenizer.json"))
    return folder


def words(texts: Path, **changes: object) -> list[str]:
    """The options of a run of six steps that saves every second."""
    values: dict[str, object] = {
        "training__steps": 6,
        "training__local_batch_size": 8,
        "lr_scheduler__total_steps": 6,
        "checkpoint__interval": 2,
    }
    off = ["--validation.no-enable", "--validation.freq", "500"]
    return [*cases.run_of(texts / "one.jsonl", texts / "cache", **{**values, **changes}), *off]


@pytest.fixture(scope="module")
def first(texts: Path) -> Path:
    """The folder of a run that has done four of its six steps."""
    folder = texts / "run"
    assert main(*words(texts, job__dump_folder=folder, training__steps=4)) == 0
    return folder


@pytest.fixture
def folder(first: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to go on in."""
    return shutil.copytree(first, tmp_path / "run")


@pytest.fixture
def go(texts: Path, tmp_path: Path) -> Go:
    """`go("--more", "words", key=value)` starts the run in `folder`: its status."""

    def go(*more: object, **changes: object) -> int:
        return main(*words(texts, **{"job__dump_folder": tmp_path / "run", **changes}), *more)

    return go


def files_in(folder: Path, but: tuple[str, ...] = ("exit.json", "lock")) -> dict[str, bytes]:
    """Return the bytes of all files, except the files that each start writes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in but
    }


def trained(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder)]


OTHER_RUNS = {
    "seed": ({"debug__seed": 1}, ["debug.seed = 1 was 0"]),
    "length": ({"training__seq_len": 32}, ["training.seq_len = 32 was 64"]),
    "batch": ({"training__global_batch_size": 16}, ["training.global_batch_size = 16 was 8"]),
    "no shape": (
        {"model__overrides": {**cases.MODEL, "rope_theta": 5000.0}},
        ["model.overrides.rope_theta = 5000.0 was 1000000.0"],
    ),
    "shapes": ({"model__overrides": {**cases.MODEL, "dim": 64}}, ["model.overrides.dim = 64 was 32"]),
    "two at once": (
        {"debug__seed": 3, "model__overrides": {**cases.MODEL, "n_layers": 3}},
        ["model.overrides.n_layers = 3 was 2", "debug.seed = 3 was 0"],
    ),
}


def check_refused(capsys, folder: Path, before: dict[str, bytes], expected: list[str]) -> None:
    """Assert that a line tells each old and new value and the remedy, and that nothing was changed."""
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(expected)
    for line in expected:
        (found,) = (other for other in said if other.startswith(line))
        was = line.rpartition(" was ")[2]
        assert found == f"{line} when step 4 was saved: use {was}, or use {FLAG}"
    assert files_in(folder) == before
    assert outcome(folder) == {"status": 2, "outcome": "refused", "step": 0, "message": "\n".join(said)}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_another_run_is_refused_with_what_is_and_was(name: str, go: Go, folder: Path, capsys) -> None:
    changes, expected = OTHER_RUNS[name]
    before = files_in(folder)
    assert go(**changes) == 2
    check_refused(capsys, folder, before, expected)


def test_another_text_is_refused_with_where_it_is_from(go: Go, folder: Path, texts: Path, capsys) -> None:
    before = files_in(folder)
    assert go(data__path=texts / "other.jsonl") == 2
    err = capsys.readouterr().err
    assert f'data.path = "{texts / "other.jsonl"}" was "{texts / "one.jsonl"}" when step 4' in err
    assert err.count(FLAG) == len(err.splitlines()) == 1
    assert files_in(folder) == before


def test_another_tokenizer_is_refused_with_its_name(go: Go, folder: Path, texts: Path, capsys) -> None:
    before = files_in(folder)
    assert go(data__tokenizer=texts / "tokenizer.json") == 2
    err = capsys.readouterr().err
    assert f'data.tokenizer = "{texts / "tokenizer.json"}" was "bytes" when step 4 was saved' in err
    assert files_in(folder) == before


def test_what_changes_no_shape_can_be_allowed(go: Go, folder: Path, capsys) -> None:
    assert go(FLAG, model__overrides={**cases.MODEL, "rope_theta": 5000.0}) == 0
    out = " ".join(capsys.readouterr().out.split())  # the line is folded
    assert "allowed: model.overrides.rope_theta = 5000.0 was 1000000.0 when step 4 was saved" in out
    assert trained(folder) == [1, 2, 3, 4, 5, 6]
    assert set(cases.sample_ids(folder)[5]) == set(range(32, 40))


def test_where_the_order_is_another_the_data_begin_anew(go: Go, folder: Path, capsys) -> None:
    assert go(FLAG, debug__seed=1) == 0
    assert "allowed: debug.seed = 1 was 0" in capsys.readouterr().out
    assert set(cases.sample_ids(folder)[5]) == set(range(8))


def test_shapes_cannot_be_allowed(go: Go, folder: Path, capsys) -> None:
    before = files_in(folder)
    assert go(FLAG, model__overrides={**cases.MODEL, "ffn_dim": 96}) == 2
    assert "does not fit: model." in capsys.readouterr().err
    assert files_in(folder) == before


def test_another_optimizer_or_schedule_is_noted(go: Go, folder: Path, capsys) -> None:
    assert go(optimizer__lr=1e-4, lr_scheduler__total_steps=8) == 0
    out = capsys.readouterr().out
    assert "changed since then: optimizer.lr = 0.0001, was 0.0008" in out
    assert "changed since then: lr_scheduler.total_steps = 8, was 6" in out
    assert 0 < lines(folder)[-1]["lr"] <= 1e-4
    assert trained(folder) == [1, 2, 3, 4, 5, 6]


def test_a_schedule_that_follows_the_steps_is_noted_by_its_key(go: Go, folder: Path, capsys) -> None:
    assert go("--lr-scheduler.total-steps", "none", training__steps=5) == 0
    out = capsys.readouterr().out
    noted = [line for line in out.splitlines() if "total_steps" in line]
    assert noted == ["changed since then: lr_scheduler.total_steps = 5, was 6"]


def test_the_attention_may_be_another(go: Go, folder: Path, first: Path, capsys, tmp_path: Path) -> None:
    shutil.copytree(first, tmp_path / "same")
    assert go("--model.attention", "varlen") == go(job__dump_folder=tmp_path / "same") == 0
    assert 'changed since then: model.attention.kind = "varlen", was "sdpa"' in capsys.readouterr().out
    for line, other in zip(lines(folder), lines(tmp_path / "same"), strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def test_an_earlier_step_may_be_asked_for_and_nothing_is_lost(go: Go, folder: Path, caplog) -> None:
    before = files_in(folder / "checkpoint" / "step-4")
    assert go("--checkpoint.load-step", 2, training__steps=3) == 0
    assert steps_in(folder) == ["latest", "step-2", "step-3"]
    assert files_in(folder / "earlier" / "checkpoint" / "step-4") == before
    assert trained(folder) == [1, 2, 3]
    assert "DAMAGED" not in caplog.text
    assert verify(folder / "checkpoint" / "step-3", World()).state.consumed_samples == 24


def test_a_run_at_its_last_step_is_done(go: Go, folder: Path, capsys) -> None:
    written = ("exit.json", "lock", "log.txt")
    before = files_in(folder, but=written)
    assert go(training__steps=4, optimizer__lr=1e-4) == 0
    assert "\nnothing to do: step 4 is the last one\n" in capsys.readouterr().out
    assert files_in(folder, but=written) == before
    assert outcome(folder) == {"status": 0, "outcome": "done", "step": 4, "message": ""}


@pytest.mark.parametrize("total_steps", [3, 6])
def test_a_run_past_its_last_step_is_left_alone(total_steps: int, go: Go, folder: Path, capsys) -> None:
    before = files_in(folder)
    capsys.readouterr()
    assert go("--debug.seed", 1, training__steps=3, lr_scheduler__total_steps=total_steps) == 0
    line = "step 4 is past training.steps = 3: nothing to do"
    assert capsys.readouterr().out == f"{line}\nFiles: {folder}\n"
    assert files_in(folder) == before
    assert outcome(folder) == {"status": 0, "outcome": "done", "step": 4, "message": line}


def test_a_step_past_the_last_one_may_hold_the_model_alone(go: Go, folder: Path, capsys) -> None:
    assert go("--checkpoint.last-save-model-only") == 0
    before = files_in(folder)
    capsys.readouterr()
    assert go("--checkpoint.last-save-model-only", training__steps=3) == 0
    assert "step 6 is past training.steps = 3: nothing to do\n" in capsys.readouterr().out
    assert files_in(folder) == before


def test_without_checkpoints_a_folder_with_steps_is_refused(go: Go, folder: Path, capsys) -> None:
    before = files_in(folder)
    assert go("--checkpoint.no-enable", training__steps=1) == 2
    assert capsys.readouterr().err == (
        f"checkpoint.enable = false leaves the steps of an earlier run in {folder / 'checkpoint'} unused "
        "(the newest: 4): set checkpoint.enable = true to go on from there, or name another job.dump_folder\n"
    )
    assert files_in(folder) == before


def test_another_folder_for_the_steps_of_an_earlier_run_is_refused(go: Go, folder: Path, capsys) -> None:
    before = files_in(folder)
    assert go("--checkpoint.folder", "other") == 2
    assert capsys.readouterr().err == (
        'checkpoint.folder = "other" is not where the steps of an earlier run are, which is '
        f"{folder / 'checkpoint'}: use 'checkpoint' to go on from there, or name another job.dump_folder\n"
    )
    assert files_in(folder) == before


def test_what_takes_long_on_the_first_rank_is_no_hang(monkeypatch) -> None:
    alive: list[int] = []
    monkeypatch.setattr(world, "_PERIOD", 0.01)
    monkeypatch.setattr(World, "alive", lambda ranks: alive.append(1))
    folder = RunFolder(load_job([]).config, World())

    def slow() -> str:
        deadline = time.monotonic() + 30
        while len(alive) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        return "done"

    assert folder._on_first(slow) == "done" and len(alive) >= 3


def test_a_second_ctrl_c_while_a_step_is_loaded_ends_with_130(texts: Path, folder: Path) -> None:
    code = (
        "import os, signal, sys, threading, time\n"
        "from torchtitan_lite import train\n"
        "from torchtitan_lite.checkpoint import restore\n"
        "from torchtitan_lite.launch.process import end_process\n"
        "read = restore.read_tensors\n"
        "def slowly(*words):\n"
        "    for after in (0.2, 0.7):\n"
        "        threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "    until = time.monotonic() + 60\n"
        "    while time.monotonic() < until:\n"
        "        read(*words)\n"
        "restore.read_tensors = slowly\n"
        "end_process(train.main(sys.argv[1:]))\n"
    )
    end = programs.run(["-c", code, *words(texts, job__dump_folder=folder)])
    assert (end.returncode, end.stderr.splitlines()[-1]) == (130, "asked again: ending at once"), end.stderr


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_has_the_name_of_a_step_to_come_is_moved_out_of_the_way(
    kind: str, go: Go, folder: Path, tmp_path: Path, caplog
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    for step in (2, 6):
        place = folder / "checkpoint" / f"step-{step}"
        shutil.rmtree(place, ignore_errors=True)
        place.touch() if kind == "file" else place.symlink_to(tmp_path / "elsewhere")
    assert go("--checkpoint.keep-latest-k", 1) == 0
    assert "moved " in caplog.text
    assert steps_in(folder) == ["latest", "step-2", "step-6"]
    verify(folder / "checkpoint" / "step-6", World())
    aside = folder / "earlier" / "checkpoint" / "step-6"
    assert aside.is_symlink() if kind == "link" else aside.is_file()
    assert (tmp_path / "elsewhere" / "mine").exists()


def test_a_latest_that_is_a_folder_is_a_warning(go: Go, folder: Path, caplog) -> None:
    (folder / "checkpoint" / "latest").unlink()
    (folder / "checkpoint" / "latest").mkdir()
    assert go() == 0
    assert "latest in" in caplog.text and "cannot be written" in caplog.text
    assert trained(folder) == [1, 2, 3, 4, 5, 6]


def test_a_linked_folder_of_steps_is_refused(go: Go, folder: Path, tmp_path: Path, capsys) -> None:
    (folder / "checkpoint").rename(tmp_path / "elsewhere")
    (folder / "checkpoint").symlink_to(tmp_path / "elsewhere")
    before = files_in(tmp_path / "elsewhere")
    assert go() == 2
    assert "is a link in the run's folder" in capsys.readouterr().err
    assert files_in(tmp_path / "elsewhere") == before


def test_of_a_last_step_with_the_model_alone_no_run_goes_on_but_another_starts(
    go: Go, folder: Path, tmp_path: Path, capsys
) -> None:
    alone = ("--checkpoint.last-save-model-only",)
    assert go(*alone) == 0
    saved = verify(folder / "checkpoint" / "step-6", World())
    assert saved.state.model_only and all(name.startswith("model.") for name in saved.index)

    before = files_in(folder)
    capsys.readouterr()
    assert go(*alone, training__steps=8, lr_scheduler__total_steps=8) == 2
    err = capsys.readouterr().err
    assert err == (
        "checkpoint.load_step = -1 leads to step 6, which holds the model alone and was to be the last: name "
        "an earlier step, or start another run with checkpoint.initial_load_path\n"
    )
    assert files_in(folder) == before
    assert go(*alone) == 0  # as it was, it is done
    assert "nothing to do: step 6 is the last one, and holds the model alone" in capsys.readouterr().out
    assert outcome(folder) == {"status": 0, "outcome": "done", "step": 6, "message": ""}
    assert go(*alone, debug__seed=1) == 2
    assert "debug.seed = 1 was 0 when step 6 was saved" in capsys.readouterr().err

    weights = ("--checkpoint.initial-load-path", folder / "checkpoint" / "step-6")
    starts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases.Trainer, "run", lambda trainer: starts.append(trainer))
        assert go(*weights, job__dump_folder=tmp_path / "new") == 0
    (trainer,) = starts
    state = trainer.state
    assert (state.step, state.batches.consumed_samples, state.n_tokens_seen) == (0, 0, 0)
    assert not state.optimizer.state
    assert f"starts with the weights of {folder / 'checkpoint' / 'step-6'}" in state.notes
    drawn = cases.Trainer(trainer.job).state.parameters
    differs = [name for name, weight in state.parameters.items() if not torch.equal(weight, drawn[name])]
    assert len(differs) > 5


def test_weights_of_another_dtype_are_refused_and_not_cast(
    go: Go, folder: Path, tmp_path: Path, capsys
) -> None:
    assert go("--checkpoint.last-save-model-only", "--checkpoint.export-dtype", "bfloat16") == 0
    index = verify(folder / "checkpoint" / "step-6", World()).index
    assert {stored.dtype for stored in index.values()} == {torch.bfloat16}
    capsys.readouterr()
    words = ("--checkpoint.initial-load-path", folder / "checkpoint")  # the newest in it
    assert go(*words, job__dump_folder=tmp_path / "new") == 2
    assert "is torch.float32 here and torch.bfloat16 in the checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "new" / "config.toml").exists()


def test_initial_weights_work_without_checkpoints_of_its_own(
    go: Go, first: Path, tmp_path: Path, capsys
) -> None:
    words = ("--checkpoint.no-enable", "--checkpoint.initial-load-path", first / "checkpoint")
    assert go(*words, training__steps=1) == 0
    assert f"starts with the weights of {first / 'checkpoint' / 'step-4'}" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize("path", ["/nowhere", "~nobody-there/x", "x" * 5000])
def test_initial_weights_that_are_not_there_are_refused(go: Go, path: str, capsys) -> None:
    assert go("--checkpoint.initial-load-path", path) == 2
    assert capsys.readouterr().err.startswith(f'checkpoint.initial_load_path = "{path[:5]}')


def test_of_a_run_that_saved_no_step_it_is_said_how_one_does(go: Go, tmp_path: Path, capsys) -> None:
    (tmp_path / "other").mkdir()
    assert go("--checkpoint.initial-load-path", tmp_path / "other") == 2
    expected = "holds no good step: no step was saved there, as checkpoint.enable was off: name the folder"
    assert expected in capsys.readouterr().err


def test_a_run_that_resumes_does_not_look_for_initial_weights(go: Go, folder: Path, capsys) -> None:
    assert go("--checkpoint.initial-load-path", "/nowhere", training__steps=5) == 0
    assert "goes on from step 4" in capsys.readouterr().out


def test_a_folder_that_a_run_has_is_refused_to_another(go: Go, folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(run_folder, "_SECONDS_TO_DIE", 0.2)
    (folder / "exit.json").unlink()
    with lock(folder):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert go(debug__seed=1) == 2
        line = capsys.readouterr().err
        assert line.startswith(
            f'job.dump_folder = "{folder}" is the folder of a run that goes on (process {os.getpid()} on '
        )
        # A start that fails before it has the folder leaves nothing there either.
        assert go("--training.stepz", 1) == 2
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert go() == 0


def test_steps_that_cannot_be_written_are_found_before_the_first(go: Go, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "checkpoint").touch()  # which not even root can make a folder in
    assert go() == 2
    err = capsys.readouterr().err
    assert err.startswith(f'job.dump_folder = "{folder}" cannot hold what all ranks write and read (')
    assert f"{folder}/checkpoint/" in err
    assert outcome(folder)["outcome"] == "refused"
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"load_step": 5}, "load_step"),
        ({"last_save_model_only": True}, "last_save_model_only"),
        ({"enable": True, "export_dtype": "bfloat16"}, "export_dtype"),
        ({"enable": True, "last_save_model_only": True, "keep_latest_k": 1}, "keep_latest_k"),
    ],
)
def test_options_of_a_feature_that_is_off_are_problems(values: dict, key: str) -> None:
    (problem,) = CheckpointConfig(**values).problems("checkpoint")
    assert (problem.key, problem.value) == (f"checkpoint.{key}", values[key])
    assert problem.remedy


@pytest.mark.parametrize(
    "name", ["config.toml", "run.json", "metrics.jsonl", "earlier", "lock", "sample_ids", "tb"]
)
def test_the_folder_of_steps_is_nothing_else_that_is_there(name: str, go: Go, tmp_path: Path, capsys) -> None:
    assert go("--checkpoint.folder", name) == 2
    assert capsys.readouterr().err.startswith(f'checkpoint.folder = "{name}" ')


def test_the_defaults_are_no_problem() -> None:
    assert CheckpointConfig().problems("checkpoint") == []
    assert CheckpointConfig(enable=True, load_step=0, keep_latest_k=0).problems("checkpoint") == []


def test_a_run_below_its_text_goes_on_with_the_same_text(texts: Path, tmp_path: Path, caplog) -> None:
    (tmp_path / "texts").mkdir()
    shutil.copy(texts / "one.jsonl", tmp_path / "texts")
    run, other = (tmp_path / "texts" / "runs" / name for name in ("mine", "other"))
    for folder, steps in ((run, 2), (other, 4), (run, 4)):
        changes = {"data__path": tmp_path / "texts", "job__dump_folder": folder, "training__steps": steps}
        assert main(*words(texts, **changes)) == 0
    assert trained(run) == [1, 2, 3, 4]
    said = [line.partition(": left out ")[2] for line in caplog.messages if "run folder" in line]
    assert said == ["1 run folder: runs/mine", *["2 run folders: runs/mine, runs/other"] * 2]


def test_a_start_in_the_folder_of_the_text_writes_nothing_there(texts: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "texts").mkdir()
    shutil.copy(texts / "one.jsonl", tmp_path / "texts")
    changes = {"data__path": tmp_path / "texts", "job__dump_folder": tmp_path / "texts"}
    assert main(*words(texts, **changes)) == 2
    assert "is data.path too" in capsys.readouterr().err
    assert os.listdir(tmp_path / "texts") == ["one.jsonl"]
