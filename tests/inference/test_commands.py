"""The commands that use a trained model, as a user types them."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hub_cases as cases
import plugin_cases
import programs
import pytest
import resume_cases
import torch
from resume_cases import main as train

from torchtitan_lite import registry
from torchtitan_lite.cli import main
from torchtitan_lite.data import Jsonl, PythonStdlib, Samples, Text, prepare
from torchtitan_lite.data.tokenizer import ByteTokenizer
from torchtitan_lite.inference import commands, progress
from torchtitan_lite.inference.evaluate import evaluate
from torchtitan_lite.models.registry import families, resolve
from torchtitan_lite.training import outputs

ROOT = Path(__file__).parents[2]


def words(texts: Path, folder: Path, steps: int, cache: str | Path = "cache", **changes: object) -> list[str]:
    """The command line of a short run in `folder`."""
    values = {"training__steps": steps, "training__local_batch_size": 8, "lr_scheduler__total_steps": steps}
    values |= {"lr_scheduler__warmup_steps": 0, "job__dump_folder": folder, **changes}
    return resume_cases.run_of(texts / "short.jsonl", texts / cache, **values)


@pytest.fixture(scope="module")
def run(texts: Path) -> Path:
    """A run of three steps."""
    assert train(*words(texts, texts / "run", 3, validation__steps=-1, checkpoint__interval=2)) == 0
    return texts / "run"


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`say("eval", folder, "--data", file)`: the status, and the text on standard output and error."""

    def say(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, out, err

    return say


def test_generate_continues_a_prompt(run: Path, say) -> None:
    status, out, err = say("generate", run, "--prompt", "ab c", "--max-new-tokens", 30)
    assert (status, err) == (0, "") and out.startswith("ab c") and len(out) > 10
    assert (
        say("generate", run / "checkpoint" / "step-3", "--prompt", "ab c", "--max-new-tokens", 30)[1] == out
    )
    assert say("generate", run / "checkpoint", "--prompt", "ab c", "--max-new-tokens", 30)[1] == out
    other = say("generate", run / "checkpoint" / "step-2", "--prompt", "ab c", "--max-new-tokens", 30)
    assert other[0] == 0 and other[1].startswith("ab c")


@pytest.mark.parametrize("attention", ["sdpa", "flex", "varlen"])
def test_several_texts_are_printed_one_after_the_other(attention: str, run: Path, say) -> None:
    more = ("--max-new-tokens", 12, "--temperature", 1, "--top-k", 40, "--seed", 3, "--attention", attention)
    status, out, _ = say("generate", run, "--prompt", "ab c", "x", *more)
    first, second = out.removeprefix('=== 1 of 2: "ab c"\n').split('\n=== 2 of 2: "x"\n')
    assert status == 0 and first.startswith("ab c") and second.startswith("x") and second.endswith("\n")


def test_a_prompt_is_always_taken_as_text(run: Path, say) -> None:
    for prompt in ("5", "-5", "null", "true", "[a]", "{}"):
        status, out, err = say("generate", run, "--prompt", prompt, "--max-new-tokens", 2)
        assert (status, err) == (0, "") and out.startswith(prompt)


def test_texts_are_shown_while_they_grow_and_in_order(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []

    def tell(*_: object, on_tokens: Callable[[list[int | None]], None], **options: object) -> None:
        said.append(capsys.readouterr().out)
        for first, second in ((ord("c"), ord("y")), (0xE2, None), (0x82, None), (0xAC, None), (None, None)):
            on_tokens([first, second])
            said.append(capsys.readouterr().out)

    monkeypatch.setattr(commands, "generate", tell)
    assert main(["generate", str(run), "--prompt", "ab", "x"]) == 0
    one, two = '=== 1 of 2: "ab"\n', '\n=== 2 of 2: "x"\n'
    assert said == [f"{one}ab", "c", "", "", "\N{EURO SIGN}", f"{two}xy\n"]


def test_a_line_of_json_has_the_prompt_and_the_text(run: Path, say) -> None:
    more = ("--max-new-tokens", 12, "--temperature", 1, "--seed", 3)
    prompts = ("ab\nc", "=== 1 of 2")
    status, out, _ = say("generate", run, "--prompt", *prompts, *more, "--format", "json")
    found = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and [one["prompt"] for one in found] == list(prompts)
    as_text = say("generate", run, "--prompt", *prompts, *more)[1]
    first, second = (one["text"] for one in found)
    assert as_text == f'=== 1 of 2: "ab\\nc"\n{first}\n=== 2 of 2: "=== 1 of 2"\n{second}\n'


def test_an_empty_prompt_begins_a_new_text(run: Path, say) -> None:
    status, out, err = say("generate", run, "--max-new-tokens", 5)
    assert (status, err) == (0, "") and out.endswith("\n")


def test_the_loss_of_the_held_out_text_is_the_logged_one(run: Path, say) -> None:
    status, out, _ = say("eval", run)
    logged = [line["validation_loss"] for line in resume_cases.lines(run) if "validation_loss" in line][-1]
    assert status == 0 and out.startswith(f"loss {logged:.4f} nats per token, perplexity ")


def test_any_text_can_be_evaluated(run: Path, texts: Path, say, tmp_path: Path) -> None:
    text = "".join(json.loads(line)["text"] for line in (texts / "short.jsonl").read_text().splitlines()[:20])
    (tmp_path / "text.txt").write_text(text)
    cache = ("--batch-size", 2)
    status, out, _ = say("eval", run, "--data", tmp_path / "text.txt", *cache)
    assert status == 0 and f"{len(text.encode()):,} bytes" in out and "bits per byte" in out
    assert say("eval", run, "--data", texts / "short.jsonl")[0] == 0
    assert say("eval", run, "--data", tmp_path / "none")[::2] == (
        2,
        f'data = "{tmp_path / "none"}" does not exist: name a text file or a folder of them\n',
    )


def test_a_folder_can_be_evaluated_that_holds_more_than_its_text(
    run: Path, say, tmp_path: Path, caplog
) -> None:
    (tmp_path / "a.txt").write_text("ab cd " * 30)
    outputs.lock(outputs.make_folder(str(tmp_path / "runs" / "one"), "", "")).close()
    (tmp_path / "runs" / "one" / "metrics.jsonl").write_text('{"step": 1}\n')
    status, out, _ = say("eval", run, "--data", tmp_path)
    assert status == 0 and "180 bytes" in out
    assert caplog.messages[0] == f"{tmp_path}: left out 1 run folder: runs/one"
    (tmp_path / "b.txt").write_bytes(b"ab cd \xff" * 30)
    status, _, err = say("eval", run, "--data", tmp_path)
    assert status == 2 and err.startswith("max_lost_fraction = 0.1 is less than the 53.8 % of the text in ")
    assert "180 bytes" in say("eval", run, "--data", tmp_path, "--max-lost-fraction", 1)[1]
    (tmp_path / "B.JSONL").write_text('{"text": "abc"}\n')
    assert "3 bytes" in say("eval", run, "--data", tmp_path)[1]
    assert "3 bytes" in say("eval", run, "--data", tmp_path / "B.JSONL")[1]


def test_every_token_counts_in_an_evaluation(run: Path, say, tmp_path: Path) -> None:
    def loss(text: str, *more: object) -> str:
        (tmp_path / "text.txt").write_text(text)
        status, out, err = say("eval", run, "--data", tmp_path / "text.txt", *more)
        assert (status, err) == (0, "")
        return out.partition(" nats")[0]

    text = "ab cd " * 30  # two samples and a shorter one
    assert loss(text) != loss(text[:-3] + "ZZZ")
    assert loss(text, "--seq-len", 60) != loss(text)
    assert loss(text[:10], "--cache-dir", tmp_path / "cache").startswith("loss ")  # less than a sample
    assert (tmp_path / "cache").is_dir()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("generate --max-new-tokens 2048 --prompt a", "prompt + max_new_tokens = 1 + 2048"),
        (f"generate --max-new-tokens 1 --prompt b {'a' * 3000}", "prompt + max_new_tokens = 3000 + 1"),
        ("eval --seq-len 2049", "seq_len = 2049"),
        ("generate --max-new-tokens 2047 --prompt a", ""),
        ("eval --seq-len 2048", ""),
    ],
)
def test_more_tokens_than_the_model_is_meant_for_are_used_with_a_warning(
    words: str, what: str, run: Path, say, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "generate", lambda *_, **options: None)
    command, *options = words.split()
    data = ["--data", str(run / "config.toml")] if command == "eval" else []
    assert say(command, run, *options, *data)[0] == 0
    said = [record.message for record in caplog.records]
    rest = "more than the 2048 tokens that the model is meant for (max_seq_len), so it may predict badly"
    assert said == ([f"{what}: {rest}"] if what else [])


def test_an_evaluation_shows_its_progress(run: Path, say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    _, out, err = say("eval", run, "--data", run / "config.toml", "--seq-len", 64, "--batch-size", 4)
    (n_tokens,) = re.findall(r"([\d,]+) tokens", out)
    n_samples, n_rest = divmod(int(n_tokens.replace(",", "")), 64)
    n_batches = -(-n_samples // 4) + (n_rest > 0)
    lines = [f"eval: {n_done} of {n_batches} batches" for n_done in range(1, n_batches)]
    assert n_batches > 3 and err.splitlines() == lines


def test_the_last_shorter_sample_is_treated_like_the_others(texts: Path) -> None:
    model = resolve("qwen3", "debugmodel", None, resume_cases.MODEL).build()
    data = Jsonl(path=str(texts / "short.jsonl"), cache_dir=str(texts / "cache"))
    split = prepare(data, ByteTokenizer()).train
    whole = evaluate(model, split, seq_len=split.n_tokens, batch_size=1)
    cut = evaluate(model, split, seq_len=split.n_tokens - 1, batch_size=1)
    assert whole.n_tokens == split.n_tokens and cut.loss == pytest.approx(whole.loss, rel=1e-5)
    seen = []
    model.register_forward_pre_hook(lambda module, given: seen.append(given))
    evaluate(model, split, seq_len=split.n_tokens - 700, batch_size=1)
    tokens_BS, positions_BS, _, labels_BS = seen[-1]
    all_of_it = Samples(split, split.n_tokens).batch([0], [0])
    assert torch.equal(tokens_BS, all_of_it.tokens_BS[:, -700:])
    assert torch.equal(labels_BS, all_of_it.labels_BS[:, -700:])
    # Positions count from the start of the document or of the sample, whichever is later.
    assert torch.equal(positions_BS, all_of_it.positions_BS[:, -700:].minimum(torch.arange(700)))


def test_a_step_with_only_the_model_is_used_in_its_precision(texts: Path, say, tmp_path: Path) -> None:
    values = {"checkpoint__last_save_model_only": "true", "checkpoint__export_dtype": "bfloat16"}
    assert train(*words(texts, tmp_path / "run", 1, **values)) == 0
    status, out, err = say("generate", tmp_path / "run", "--prompt", "ab c", "--max-new-tokens", 5)
    assert (status, err) == (0, "") and out.startswith("ab c")
    status, out, err = say("eval", tmp_path / "run", "--dtype", "bfloat16")
    assert (status, err) == (0, "") and out.startswith("loss ")


def test_a_model_with_too_few_rows_for_the_tokenizer_is_refused(say, tmp_path: Path) -> None:
    cases.theirs(cases.small(families["llama3"]["1B"]), tmp_path).save_pretrained(tmp_path / "hf")
    assert say("import-hf", tmp_path / "hf", "--out", tmp_path / "steps")[0] == 0
    status, _, err = say("generate", tmp_path / "steps", "--tokenizer", "bytes")
    assert status == 2 and err.startswith(
        'tokenizer = "bytes" has 257 tokens, and the model\'s vocab_size is 211: use the tokenizer'
    )


def test_a_model_imported_without_a_tokenizer_starts_a_run(say, texts: Path, tmp_path: Path) -> None:
    config = cases.replace(cases.small(families["qwen3"]["0.6B"]), vocab_size=264)
    cases.theirs(config, tmp_path).save_pretrained(tmp_path / "hf")
    assert say("import-hf", tmp_path / "hf", "--out", tmp_path / "steps")[0] == 0
    model = {"model__name": "hf", "model__flavor": tmp_path / "hf"}
    argv = words(texts, tmp_path / "run", 1, checkpoint__initial_load_path=tmp_path / "steps", **model)
    at = argv.index("--model.overrides")
    assert train(*argv[:at], *argv[at + 2 :]) == 0


def test_a_full_disk_is_reported_in_one_line_and_leaves_no_files(run: Path, tmp_path: Path) -> None:
    code = (
        "import resource, sys; from torchtitan_lite import cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10240, 10240))\n"
        "cli.program()"
    )
    end = programs.run(["-c", code, "export-hf", run, "--out", tmp_path / "hf"])
    assert end.returncode == 2 and len(end.stderr.splitlines()) == 1, end.stderr
    assert end.stderr.startswith(f'out = "{tmp_path}/hf" cannot be written (')
    assert list(tmp_path.iterdir()) == []


def test_an_exported_model_is_imported_with_the_same_text(run: Path, say, tmp_path: Path) -> None:
    assert say("export-hf", run, "--out", tmp_path / "hf", "--dtype", "float32")[0] == 0
    status, out, _ = say("import-hf", tmp_path / "hf", "--out", tmp_path / "steps")
    assert status == 0 and f"--checkpoint.initial-load-path {tmp_path / 'steps'}" in out
    more = ("--prompt", "ab c", "--max-new-tokens", 30)
    assert say("generate", tmp_path / "steps", *more)[1] == say("generate", run, *more)[1]


REFUSALS = {
    "generate": "RUN_OR_STEP is not named: write torchtitan-lite generate FOLDER",
    "eval --batch-size 0": "batch_size = 0 must be at least 1: use 1 or more",
    "generate RUN --top-p 0": "top_p = 0 must be in (0, 1]: use 1.0 or so",
    "generate RUN --temperature -1": "temperature = -1 must be at least 0: use 0 or more",
    "generate RUN --max-new-tokens x": 'max_new_tokens = "x" is not an integer: write a whole number',
    "generate RUN --promt x": 'promt = "x" is not a known key: did you mean "prompt"?',
    "generate NOWHERE --prompt x": 'RUN_OR_STEP = "NOWHERE" holds no good step: there is no such folder: ',
    "export-hf RUN": "out has no value: write --out FOLDER",
    "export-hf RUN --out RUN": 'out = "RUN" is there already: name another folder',
    "export-hf RUN --out X --dtype float8": 'dtype = "float8" is not one of "float32", "bfloat16", "float16"',
    "generate RUN --dry-run": "--dry-run is for training: leave it out",
    "eval RUN --world-size 2": '--world-size = "2" is for training: leave it out',
    "export-hf RUN --config X --out X": '--config = "X" is for training: leave it out',
    "import-hf ~nobody-of-this-name/x --out X": "~nobody-of-this-name/x/config.json is not there",
    "eval RUN --seq-len 1000000": "seq_len = 1000000 is more than the",
    "eval RUN --data text.txt --cache-dir /proc/x": "data = ",
    "generate RUN --prompt": "prompt has no value",
    "import-hf NOWHERE --out X": "NOWHERE/config.json is not there: name a folder with a model in it",
    "import-hf RUN --out X": "RUN/config.json is not there: name a folder with a model in it",
}


@pytest.mark.parametrize("command", REFUSALS)
def test_a_wrong_command_is_refused_in_one_line_and_writes_nothing(
    command: str, run: Path, say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(run) if word == "RUN" else word for word in command.split()]
    status, out, err = say(*words)
    found = err.replace(str(run), "RUN").replace(f"{tmp_path}/", "")
    assert (status, out) == (2, "") and len(found.splitlines()) == 1
    assert found.startswith(REFUSALS[command]), found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["eval", "export-hf", "import-hf"])
def test_a_command_for_one_process_is_refused_to_several(
    command: str, run: Path, say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, out, err = say(command, run)
    assert (status, out) == (2, "") and err.startswith(
        f'WORLD_SIZE = "2" is more than {command} needs: start it'
    )


@pytest.mark.parametrize("command", ["generate", "eval", "export-hf", "import-hf"])
def test_processes_of_mpirun_that_cannot_meet_are_refused(
    command: str, run: Path, say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    out_folder = ("--out", tmp_path / "out") if "hf" in command else ()
    status, out, err = say(command, run, *out_folder)
    assert (status, out) == (2, "") and err.startswith(
        "OMPI_COMM_WORLD_SIZE = 2 means that mpirun has started 2 "
    )
    how = "torchrun --nnodes NODES" if command == "generate" else "start it as one process\n"
    assert how in err
    assert not (tmp_path / "out").exists()


def test_a_damaged_step_is_not_used(run: Path, say, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run / "checkpoint" / "step-3", tmp_path / "step-3")
    with (tmp_path / "step-3" / "tensors-0.safetensors").open("r+b") as shard:
        shard.seek(5000)
        shard.write(b"?")
    for command in ("generate", "eval"):
        status, _, err = say(command, tmp_path / "step-3")
        assert status == 2 and "tensors-0.safetensors is not what was written" in err


def test_two_ranks_generate_the_text_of_one(run: Path, say) -> None:
    words = ["generate", str(run), "--prompt", "ab c", "--max-new-tokens", "20"]
    wanted = say(*words)[1]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    end = programs.run([*launch, "-m", "torchtitan_lite.cli", *words])
    assert (end.returncode, end.stdout) == (0, wanted), end.stderr


def test_the_tokenizer_is_found_in_the_folder_of_the_run(texts: Path, say, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    ByteTokenizer().save(tmp_path / "mine")
    assert train(*words(texts, tmp_path / "run", 1, data__tokenizer=tmp_path / "mine")) == 0
    (tmp_path / "mine").rename(tmp_path / "elsewhere")
    more = ("--prompt", "ab c", "--max-new-tokens", 3)
    status, out, err = say("generate", tmp_path / "run", *more)
    assert (status, err) == (0, "") and out.startswith("ab c")
    (tmp_path / "run" / "tokenizer").rename(tmp_path / "gone")
    status, _, err = say("generate", tmp_path / "run", *more)
    assert status == 2 and "name its file or folder with --tokenizer" in err
    assert say("generate", tmp_path / "run", *more, "--tokenizer", tmp_path / "elsewhere")[:2] == (0, out)
    status, _, err = say("generate", tmp_path / "run", *more, "--tokenizer", "bytes")
    assert status == 2 and "is not the one that" in err


@pytest.fixture
def plugged(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A run of two steps with a dataset, a tokenizer, an optimizer and an attention of a plugin."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(plugin_cases.ALL)
    more = "--job.plugins mine --data.dataset counting --data.n-documents 100 --data.tokenizer shifted"
    more += " --tokenizers.shifted.shift 3 --optimizer.name Descent --model.attention plain"
    with plugin_cases.forgotten():
        argv = words(texts, tmp_path / "run", 2, tmp_path / "cache")
        assert train(*argv, *more.split()) == 0
    with plugin_cases.forgotten():  # so that the command has to import the plugin itself
        yield tmp_path / "run"


@pytest.mark.parametrize("command", ["generate", "eval", "export-hf"])
def test_a_run_with_plugins_is_used_with_the_same_plugins(command: str, plugged: Path, say) -> None:
    more = {"generate": ["--max-new-tokens", 3], "export-hf": ["--out", "hf"]}.get(command, [])
    status, out, err = say(command, plugged, "--plugins", "mine", *more)
    assert (status, err) == (0, "") and out
    assert "mine" in sys.modules


def test_a_checkpoint_imports_no_module_by_itself(plugged: Path, say) -> None:
    status, _, err = say("generate", plugged)
    assert status == 2 and err.endswith("or its module with --plugins mine\n")
    assert "mine" not in sys.modules
    tokenizer = ["--tokenizer", "shifted"]
    assert say("generate", plugged, *tokenizer)[0] == 2
    assert say("generate", plugged, *tokenizer, "--plugins", "mine", "--attention", "plain")[0] == 0


def test_a_dataset_that_is_not_registered_is_an_error(run: Path, tmp_path: Path, say, monkeypatch) -> None:
    monkeypatch.delitem(registry.datasets.members, "jsonl")
    status, _, err = say("eval", run)
    assert status == 2 and 'the dataset "jsonl", which is not registered: name the module that has it' in err


def test_unknown_keys_in_the_data_section_of_a_run_are_ignored() -> None:
    saved = {"dataset": "python_stdlib", "path": "", "field": "text", "cache_dir": "there", "num_workers": 2}
    config = commands.EvalConfig()
    assert commands._saved_data(config, saved, "") == PythonStdlib(cache_dir="there")
    config = commands.EvalConfig(cache_dir="here")
    assert commands._saved_data(config, {"dataset": "text", "path": "x"}, "") == Text(
        path="x", cache_dir="here"
    )
    assert commands._saved_data(config, None, "") is None
