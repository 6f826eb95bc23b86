"""Wrong input to the entry point of training: one line per problem, exit status 2, no traceback."""

import os
from pathlib import Path

import programs
import pytest
import remedies

from torchtitan_lite.attention import BACKENDS
from torchtitan_lite.train import main

KINDS = ", ".join(f'"{backend.kind}"' for backend in BACKENDS)

# Wrong flags and the line that reports them; "..." stands for any words.
FLAGS = {
    "--trainng.steps 5": 'trainng = {"steps": 5} is not a known section: did you mean "training"?',
    "--steps 5": 'steps = 5 is not a known key: did you mean "training.steps" or "validation.steps"?',
    "--training.stps 5": 'training.stps = 5 is not a known key: did you mean "steps"?',
    "--training.lr 1e-3": 'training.lr = 0.001 is not a known key: did you mean "optimizer.lr"?',
    "--training.steps abc": 'training.steps = "abc" is not an integer: write a whole number such as 64',
    "--training.steps 1.5": "training.steps = 1.5 is not an integer: write a whole number such as 64",
    "--training.steps 1e3": "training.steps = 1000.0 is not an integer: write 1000",
    "--training.steps null": "training.steps = null is not an integer: write a whole number such as 64",
    "--training.steps=": 'training.steps = "" is not an integer: write a whole number such as 64',
    "--training.steps": "training.steps has no value: write --training.steps=VALUE",
    "--training.steps -1": "training.steps = -1 must be at least 1: ...",
    "--training.steps 9223372036854775808": (
        "training.steps = 9223372036854775808 does not fit in 64 bits: write a smaller number"
    ),
    "--training 5": (
        "training = 5 is a section, and a flag sets one key: write --training.local_batch_size VALUE"
    ),
    "--training.steps 5 6": (
        'argument = "6" belongs to no flag: write --section.key VALUE, and text with spaces in quotes'
    ),
    "train": (
        'argument = "train" belongs to no flag: write --section.key VALUE, and text with spaces in quotes'
    ),
    "--": 'argument = "--" belongs to no flag: write --section.key VALUE, and text with spaces in quotes',
    "--config": "--config has no value: write --config FILE.toml",
    "--config nowhere.toml": '--config = "nowhere.toml" cannot be read (No such file or directory): name ...',
    "--config /": (
        '--config = "/" cannot be read (Is a directory): name a TOML file that exists and is readable'
    ),
    "--dry-run maybe": '--dry-run = "maybe" is not true or false: write --dry-run alone',
    "--optimizer.lr nan": 'optimizer.lr = "nan" is not a number: write a number such as 0.1',
    "--optimizer.lr NaN": "optimizer.lr = nan is not a finite number: write a finite number",
    "--optimizer.lr 1e999": "optimizer.lr = inf is not a finite number: write a finite number",
    "--optimizer.lr 0": "optimizer.lr = 0 must be greater than 0: use 0.0008 or so",
    "--optimizer.lr .5e": 'optimizer.lr = ".5e" is not a number: write a number such as 0.1',
    "--optimizer.name SGD": 'optimizer.name = "SGD" is not a known name: use "AdamW"',
    "--lr-scheduler.decay-ratio x": (
        'lr_scheduler.decay_ratio = "x" is not a number: write a number such as 0.1, or leave it out'
    ),
    "--lr-scheduler.decay-ratio 1.5": "lr_scheduler.decay_ratio = 1.5 must be in [0, 1]: use 0.1 or so",
    "--lr-scheduler.decay-type cosin": (
        'lr_scheduler.decay_type = "cosin" is not one of "linear", "cosine", "sqrt": did you mean "cosine"?'
    ),
    "--lr-scheduler.warmup-steps 30 --training.steps 20": (
        "lr_scheduler.warmup_steps = 30 is longer ... 20 ..."
    ),
    "--training.mixed-precision-param float16": (
        'training.mixed_precision_param = "float16" is not one of "float32", "bfloat16": did you mean '
        '"bfloat16"?'
    ),
    "--training.global-batch-size 12": (
        "training.global_batch_size = 12 is not a multiple of ...: use 8 or 16"
    ),
    "--training.seq-len 4096": (
        "training.seq_len = 4096 is more than the 2048 tokens that the model is meant for: "
        "use at most 2048, or raise model.overrides.max_seq_len"
    ),
    "--validation.enable maybe": 'validation.enable = "maybe" is not true or false: write true or false',
    "--validation.no-enable 1": (
        '--validation.no-enable = "1" takes no value: write --validation.no-enable alone'
    ),
    "--validation.enable --data.validation-fraction 0": (
        "validation.enable = true needs held-out text, and data.validation_fraction is 0: "
        "set data.validation_fraction = 0.05"
    ),
    "--model.name qwen": 'model.name = "qwen" is not a model family: did you mean "qwen3"?',
    "--model.flavor debugmodl": (
        'model.flavor = "debugmodl" is not a flavor of qwen3: did you mean "debugmodel"?'
    ),
    "--model.flavor debugmodel_flash": (
        'model.flavor = "debugmodel_flash" ...: did you mean "debugmodel_flex_flash"?'
    ),
    "--model.attention": "model.attention.kind has no value: write --model.attention=VALUE",
    "--model.attention flx": 'model.attention.kind = "flx" is not a known kind: did you mean "flex"?',
    "--model.attention.kind ring": (
        f'model.attention.kind = "ring" is not a known kind: choose one of {KINDS}'
    ),
    "--model.attention.block-size 64": (
        'model.attention.block_size = 64 belongs to kind "flex", and model.attention.kind is "sdpa": '
        'leave it out, or set model.attention.kind = "flex"'
    ),
    "--model.attention flex --model.attention.kernel fa3": (
        'model.attention.kernel = "fa3" belongs to kind "varlen", and model.attention.kind is "flex": '
        'leave it out, or set model.attention.kind = "varlen"'
    ),
    "--model.attention flex --model.attention.blok-size 3": (
        'model.attention.blok_size = 3 is not a known key: did you mean "block_size"?'
    ),
    "--model.attention flex --model.attention.block-size 64 128 256": (
        "model.attention.block_size = [64, 128, 256] is not an integer or a list of 2 integers: "
        "write a whole number such as 128, or a list such as [128, 128]"
    ),
    "--model.attention flex --model.attention.kernel-options FLASH": (
        'model.attention.kernel_options = "FLASH" is not a table: '
        """write a table, or on the command line JSON such as '{"key": 1}'"""
    ),
    "--model.flavor debugmodel_flex_flash --job.device cpu": (
        'model.attention.kernel_options = {"BACKEND": "FLASH"} is for CUDA kernels, and the device is cpu: '
        'set model.flavor = "debugmodel_flex"'
    ),
    "--model.attention varlen --model.attention.kernel fa3 --job.device cpu": (
        'model.attention.kernel = "fa3" ...: ...'
    ),
    "--model.attention varlen --training.mixed-precision-param float32 --job.device cuda --dry-run": (
        'training.mixed_precision_param = "float32" ...: use bfloat16, ...'
    ),
    "--model.flavor debugmodel_flx --model.attention.block-size 64": (
        'model.flavor = "debugmodel_flx" is not a flavor of qwen3: did you mean "debugmodel_flex"?'
    ),
    "--lr-scheduler.total-steps 5 --training.steps 20": (
        "lr_scheduler.total_steps = 5 is less than training.steps = 20, ...: use 20 or more, or leave it out"
    ),
    "--optimizer.lr +1e999": 'optimizer.lr = "+1e999" is not a number: write a number such as 0.1',
    '--model.overrides {"n_layers":[null]}': (
        "model.overrides.n_layers = null cannot be written in a TOML file: leave the key out"
    ),
    '--model.overrides {"n_kv_heads":3}': (
        "model.overrides.n_kv_heads = 3 does not divide n_heads = 8: use 1, 2, 4 or 8"
    ),
    '--model.overrides {"vocab_size":100}': (
        'data.tokenizer = "bytes" has 257 tokens, and the model\'s vocab_size is 100: '
        "set model.overrides.vocab_size to 257 or more"
    ),
    "--model.overrides.n-layer 2": (
        'model.overrides.n_layer = 2 is not a known key: did you mean "n_layers"?'
    ),
    "--model.overrides.rope_scaling.facter 2": (
        'model.overrides.rope_scaling.facter = 2 is not a known key: did you mean "factor"?'
    ),
    "--model.overrides.n_layers": (
        "model.overrides.n_layers = true is not an integer: write a whole number such as 64"
    ),
    "--data.dataset c4": (
        'data.dataset = "c4" is not a known dataset: choose one of "python_stdlib", "text", "jsonl"'
    ),
    "--data.dataset text --data.path nowhere": 'data.path = "nowhere" does not exist: ...',
    "--data.dataset text": 'data.path = "" is needed by dataset "text": ...',
    "--data.path texts": (
        'data.path = "texts" belongs to dataset "text" or "jsonl", and data.dataset is "python_stdlib": '
        'leave it out, or set data.dataset = "text"'
    ),
    "--data.tokenizer nowhere.json": 'data.tokenizer = "nowhere.json" does not exist: use "bytes", or ...',
    "--job.device tpu": 'job.device = "tpu" is not one of "auto", "cpu", "cuda": did you mean "cpu"?',
    "--job.dump-folder /dev/null": 'job.dump_folder = "/dev/null" is a file: name a folder',
    "--job.dump-folder /dev/null/run": (
        'job.dump_folder = "/dev/null/run" cannot be made below /dev/null, which is a file: name a folder'
    ),
    "--model.attention flex --model.attention.block-size 64 --compile.enable --job.device cuda --dry-run": (
        "model.attention.block_size = 64 finds no kernel within compiled blocks: "
        "use 128, or set compile.enable = false"
    ),
    "--checkpoint.interval 0": "checkpoint.interval = 0 must be at least 1: use 500 or so",
    "--checkpoint.load-step 5": (
        "checkpoint.load_step = 5 needs checkpoints, which are off: set checkpoint.enable"
    ),
    "--model.flavor debugmodel_flex_flash --job.device cuda --debug.deterministic --dry-run": (
        'debug.deterministic = true is not for flex (flash) attention: set model.flavor = "debugmodel_flex"'
    ),
    "--checkpoint.folder tb": (
        'checkpoint.folder = "tb" is the name of something else in the run\'s folder: use "checkpoint"'
    ),
    "--activation-checkpoint.mode ful": (
        'activation_checkpoint.mode = "ful" is not one of "none", "selective", "full": did you mean "full"?'
    ),
    "--activation-checkpoint.mode selective --activation-checkpoint.selective-ac-option layer": (
        'activation_checkpoint.selective_ac_option = "layer" is neither "op" nor a number of blocks: ...'
    ),
    "--debug.seed -1": "debug.seed = -1 ...: ...",
}

# Wrong files and the line that reports them.
FILES = {
    "[trainng]\nsteps = 5": 'trainng = {"steps": 5} is not a known section: did you mean "training"?',
    "steps = 5": 'steps = 5 is not a known key: did you mean "training.steps" or "validation.steps"?',
    "training = 5": "training = 5 is not a table: write training.local_batch_size = ...",
    "[[training]]\nsteps = 5": (
        'training = [{"steps": 5}] is not a table: write training.local_batch_size = ...'
    ),
    "[training]\nsteps = 20.0": "training.steps = 20.0 is not an integer: write 20",
    "[training]\nsteps = 2026-01-01": (
        'training.steps = "2026-01-01" is a date or a time, which no key takes: put it in quotes'
    ),
    "[training]\nsteps = true": "training.steps = true is not an integer: write a whole number such as 64",
    "[training]\nseq-len = 5": 'training.seq-len = 5 is not a known key: did you mean "seq_len"?',
    "[optimizer]\nlr = nan": "optimizer.lr = nan is not a finite number: write a finite number",
    "[optimizer]\nlr = '1e-3'": 'optimizer.lr = "1e-3" is not a number: write a number such as 0.1',
    "[compile]\nenable = 1": "compile.enable = 1 is not true or false: write true or false",
    "[job]\ndescription = 5": "job.description = 5 is not a string: put it in quotes",
    '[job]\ndescription = "a\\u0000b"': (
        "job.description = ... holds a character that a text file cannot: take ..."
    ),
    "[model]\nattention = 'flex'": (
        'model.attention = "flex" is not a table: write model.attention.kind = "flex"'
    ),
    "[model.attention]\nkind = 5": (f"model.attention.kind = 5 is not a known kind: choose one of {KINDS}"),
    "[model.attention]\nkind = 'sdpa'\nkernel = 'auto'": (
        'model.attention.kernel = "auto" belongs to kind "varlen", and model.attention.kind is "sdpa": '
        'leave it out, or set model.attention.kind = "varlen"'
    ),
    "[model]\noverrides = [1]": "model.overrides = [1] is not a table: ...",
    "[model.overrides]\n'n layers' = 2": 'model.overrides... = 2 ...: did you mean "n_layers"?',
    "[model.overrides]\nn_layers = 2026-01-01": (
        'model.overrides.n_layers = "2026-01-01" is a date or a time, which no key takes: put it in quotes'
    ),
    "[training]\nsteps = \n": (
        '--config = "FILE" is not TOML (Invalid value (at line 2, column 9)): correct ...'
    ),
    "[training]\nsteps = 1\nsteps = 2\n": (
        '--config = "FILE" is not TOML (... line 3...): correct the file there'
    ),
    "a = " + "[" * 1000: '--config = "FILE" is not TOML that can be read (...): ...',
    "a = " + "9" * 5000: '--config = "FILE" is not TOML that can be read (...): ...',
}


@pytest.fixture(autouse=True)
def one_process_in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """The lines that training prints when it refuses `argv`."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def says(line: str, pattern: str) -> bool:
    """True if `line` matches `pattern`, in which "..." stands for any words."""
    parts = pattern.split("...")
    if len(parts) == 1:
        return line == pattern
    at = 0
    for part in parts:
        found = line.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return line.startswith(parts[0]) and line.endswith(parts[-1])


@pytest.mark.parametrize(("flags", "expected"), FLAGS.items(), ids=[*FLAGS])
def test_wrong_flags_are_refused_in_one_line(
    flags: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (line,) = refusal(capsys, *flags.split(" "))
    assert says(line, expected), f"{line}\nis not\n{expected}"


@pytest.mark.parametrize("flags", [flags for flags, line in FLAGS.items() if "did you mean" not in line])
def test_what_the_line_proposes_is_accepted(flags: str) -> None:
    remedies.check_values(remedies.flags_of(flags))


@pytest.mark.parametrize(("text", "expected"), FILES.items(), ids=[text[:40] for text in FILES])
def test_wrong_files_are_refused_in_one_line(
    text: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("FILE").write_text(text, encoding="utf-8")
    (line,) = refusal(capsys, "--config", "FILE")
    assert says(line, expected), f"{line}\nis not\n{expected}"


def test_a_file_that_is_not_text_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("FILE").write_bytes(b"\xff\xfe\x00")
    assert refusal(capsys, "--config", "FILE") == [
        '--config = "FILE" is not UTF-8 text (byte 0): name a TOML file'
    ]


def test_all_problems_are_reported_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.toml").write_text(
        "[training]\nsteps = 1.5\nglobal_batch_size = 12\n[trainng]\n[model]\nname = 'gpt'\n"
    )
    Path("b.toml").write_text("[model.attention]\nkind = 'flx'\n[data]\ntokenizer = 'nowhere'\n")
    argv = "--config a.toml --config b.toml --optimizer.lr x --compile.enabel stray --job.device tpu"
    lines = refusal(capsys, *argv.split())
    assert [line.split(" ")[0] for line in lines] == [
        "trainng",
        "job.device",
        "model.attention.kind",
        "training.steps",
        "optimizer.lr",
        "compile.enabel",
        "model.name",
        "training.global_batch_size",
        "data.tokenizer",
    ]


def test_a_missing_file_is_reported_beside_other_problems(capsys: pytest.CaptureFixture[str]) -> None:
    lines = refusal(capsys, "--config", "a.toml", "--config", "b.toml", "--training.steps", "x")
    assert [line.split(" ")[:3] for line in lines] == [
        ["--config", "=", '"a.toml"'],
        ["--config", "=", '"b.toml"'],
        ["training.steps", "=", '"x"'],
    ]


def test_a_check_that_used_a_refused_value_reports_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    # The default of 8 stands in for the refused size. 12 is not a multiple of 8, but nobody asked for 8.
    argv = ["--training.local-batch-size", "x", "--training.global-batch-size", "12"]
    (line,) = refusal(capsys, *argv)
    assert line.startswith("training.local_batch_size")
    # The file that cannot be read may set the local batch size.
    (line,) = refusal(capsys, "--config", "nowhere.toml", "--training.global-batch-size", "12")
    assert line.startswith("--config")


def test_a_wrong_value_is_reported_although_a_later_layer_replaces_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("a.toml").write_text("[training]\nsteps = 'x'\n[model.attention]\nkind = 'flex'\nblock_size = 1.5\n")
    lines = refusal(capsys, "--config", "a.toml", "--training.steps", "20", "--model.attention", "sdpa")
    assert [line.split(" ")[0] for line in lines] == ["model.attention.block_size", "training.steps"]


@pytest.mark.parametrize("value", ["a\nb", "a\u2028b", "a\rb", "a\x1b[2Jb", "\udcff", "é" * 9999, "\x85"])
def test_a_refusal_of_any_text_is_one_printable_line(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([value], [f"--{value}"], [f"--training.{value}", "5"], ["--training.steps", value]):
        for line in refusal(capsys, *argv):
            assert line.isprintable()
            assert len(line) < 25_000


@pytest.mark.parametrize(
    ("argv", "status", "lines"),
    [
        (["--training.stps", "5"], 2, ['training.stps = 5 is not a known key: did you mean "steps"?']),
        (["--config", "nowhere.toml", "x"], 2, ['--config = "nowhere.toml" ...', 'argument = "x" ...']),
        (
            ["--training.steps", b"\xff"],
            2,
            ["training.steps = ... holds a character that a text file cannot: ..."],
        ),
        (["--dry-run", "--training.steps", "5"], 0, []),
        (["--help"], 0, []),
    ],
)
def test_the_process_exits_with_the_status_and_without_traceback(
    argv: list[str | bytes], status: int, lines: list[str]
) -> None:
    process = programs.run(["-m", "torchtitan_lite.train", *map(os.fsdecode, argv)])
    assert process.returncode == status
    printed = process.stderr.splitlines()
    assert len(printed) == len(lines), process.stderr
    assert all(says(line, expected) for line, expected in zip(printed, lines, strict=True))
    assert bool(process.stdout) == (status == 0)
