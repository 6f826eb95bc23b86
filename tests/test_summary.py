"""The last lines of a run: the losses, a sample, and commands that work as they are printed."""

import json
import logging
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import programs
import pytest
from resume_cases import main, start

from torchtitan_lite import run_folder, summary
from torchtitan_lite.config.job import load_job
from torchtitan_lite.launch import command
from torchtitan_lite.launch.log import COLUMNS

SAVES = ("--checkpoint.enable", "--metrics.sample-tokens", 40)
VALIDATES = ("--validation.enable", "--data.validation-fraction", 0.2)


def commands(out: str) -> dict[str, list[str]]:
    """The words of each printed command, by the line above it."""
    lines = out.splitlines()
    found = {}
    for name, line in pairwise(lines):
        if (name.endswith(":") and " -m " in line) or "/cli.py " in line:
            found[name.removesuffix(":")] = shlex.split(line)
    return found


def test_a_run_that_saves_ends_with_the_losses_a_sample_and_the_next_commands(
    small_run, tmp_path: Path, capsys
) -> None:
    assert main(*small_run, *SAVES, *VALIDATES, "--metrics.enable-tensorboard") == 0
    out = capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    loss = [record["loss"] for record in records if "loss" in record][-1]
    first, *_, last = (record["validation_loss"] for record in records if "validation_loss" in record)
    assert re.search(
        r"^5 steps in \d:\d\d:\d\d; the run is at step 5, after 1,280 tokens$", out, re.MULTILINE
    )
    assert f"Training loss: {loss:.4f} nats per token at step 5\n" in out
    assert f"Validation loss: {last:.4f} nats per token at step 5 ({first:.4f} at step 0)\n" in out
    assert "A text that the model of step 5 writes:\n  | " in out
    assert f"\nFiles: {tmp_path / 'run'}\n" in out
    assert list(commands(out)) == [
        "Write text",
        "Measure the loss",
        "Export to Hugging Face's format",
        "TensorBoard",
    ]
    long = [line for line in out.splitlines() if len(line) > COLUMNS and str(tmp_path) not in line]
    assert long == []
    assert (tmp_path / "run" / "log.txt").read_text().endswith(out)


def test_the_printed_commands_work_in_any_folder(small_run, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "a run's folder"
    assert main(*small_run, *SAVES, *VALIDATES, "--job.dump-folder", folder) == 0
    out = capsys.readouterr().out
    sample = [line.removeprefix("  | ") for line in out.splitlines() if line.startswith("  | ")]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, words in commands(out).items():
        done = programs.run(words[1:], cwd=elsewhere)
        assert done.returncode == 0, done.stderr
        if name == "Write text":
            written = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in done.stdout)
            assert written.startswith("".join(sample)[:20])
        if name == "Measure the loss":
            assert done.stdout.startswith("loss ")
    assert (tmp_path / "a run's folder-hf" / "model.safetensors").exists()


def test_the_loss_is_measured_in_any_folder_if_the_path_of_the_text_is_relative(
    small_run, tmp_path: Path, text_folder: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text_folder.parent)
    assert main(*small_run, *SAVES, *VALIDATES, "--data.path", text_folder.name) == 0
    lines = capsys.readouterr().out.splitlines()
    line = lines[lines.index("Measure the loss:") + 1]
    done = subprocess.run(["sh", "-c", line], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("loss "), done.stderr


@pytest.mark.slow
def test_the_printed_commands_work_in_a_shell(run, small_run, tmp_path: Path) -> None:
    done = run("-m", "torchtitan_lite.train", *small_run, *SAVES, fresh=True)
    for words in commands(done.stdout).values():
        subprocess.run(shlex.join(words), shell=True, check=True, cwd=tmp_path)


def test_without_held_out_text_the_loss_is_measured_on_the_text_of_the_run(
    small_run, tmp_path: Path, capsys
) -> None:
    assert main(*small_run, *SAVES, "--data.validation-fraction", 0) == 0
    words = commands(capsys.readouterr().out)["Measure the loss"]
    assert words[-2:] == ["--data", small_run[small_run.index("--data.path") + 1]]
    done = programs.run(words[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_without_a_saved_step_there_is_no_sample_and_no_command(small_run, capsys) -> None:
    assert main(*small_run, "--metrics.sample-tokens", 40) == 0
    out, err = capsys.readouterr()
    assert commands(out) == {}
    assert "writes:" not in out and err == ""
    assert "Training loss: " in out and "Validation loss" not in out


def test_a_folder_with_the_longest_name_gives_commands_too(small_run, tmp_path: Path, capsys) -> None:
    name = "x" * 255
    assert main(*small_run, *SAVES, "--job.dump-folder", tmp_path / name) == 0
    words = commands(capsys.readouterr().out)["Export to Hugging Face's format"]
    assert words[-1] == str(tmp_path / f"{name[:120]}-hf")


def test_a_run_that_is_done_shows_its_sample_again(small_run, capsys) -> None:
    assert main(*small_run, *SAVES) == 0
    first = capsys.readouterr().out
    assert main(*small_run, *SAVES) == 0
    second = capsys.readouterr().out
    sample = [line for line in first.splitlines() if line.startswith("  | ")]
    assert sample and [line for line in second.splitlines() if line.startswith("  | ")] == sample
    assert "Training loss" not in second
    assert commands(first).keys() == commands(second).keys()


def test_a_sample_that_fails_does_not_fail_the_run(
    small_run, tmp_path: Path, capsys, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise RuntimeError("out of memory\nmuch more")

    monkeypatch.setattr(run_folder, "write_sample", fail)
    assert main(*small_run, *SAVES) == 0
    assert "writes:" not in capsys.readouterr().out
    (warning,) = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert warning == "the model wrote no sample, and the run is done all the same: out of memory"
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["status"] == 0


def test_a_sample_is_shown_in_lines_that_fit_and_without_control_characters(capsys) -> None:
    summary.say_sample(f"\n\tdef f():\x1b[2J\n\n{'x' * 100}\n\n", 7)
    assert capsys.readouterr().out.splitlines() == [
        "A text that the model of step 7 writes:",
        "  |     def f():\N{REPLACEMENT CHARACTER}[2J",
        "  |",
        f"  | {'x' * 74}",
        f"  | {'x' * 26}",
    ]


def test_a_sample_in_chinese_fits_too(capsys) -> None:
    summary.say_sample("a" + "\N{CJK UNIFIED IDEOGRAPH-6A21}" * 37, 7)
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first == "  | a" + "\N{CJK UNIFIED IDEOGRAPH-6A21}" * 36  # 4 + 1 + 72 = 77 columns
    assert second == "  | \N{CJK UNIFIED IDEOGRAPH-6A21}"


STOPPED = "asked to stop by SIGTERM: saved step 7"


@pytest.mark.parametrize(
    ("words", "more"),
    [
        ((), " --job.dump-folder '/a run'"),
        (("--job.dump-folder", "/a run"), ""),
        (("--checkpoint.load-step", "4"), " --job.dump-folder '/a run' --checkpoint.load-step -1"),
    ],
)
def test_a_stopped_run_prints_the_command_or_what_to_add_to_it(
    words: tuple[str, ...], more: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load_job(["--checkpoint.enable", *words]).config
    monkeypatch.setattr(command, "again", lambda argv: ["python", "train.py", *argv])
    summary.say_resume(job, Path("/a run"), words, STOPPED)
    line, found = capsys.readouterr().out.splitlines()
    assert line == f"{STOPPED}; go on with:"
    assert found == shlex.join(["python", "train.py", *words]) + more
    monkeypatch.setattr(command, "again", lambda argv: None)
    summary.say_resume(job, Path("/a run"), words, STOPPED)
    added = f" and:\n{more.strip()}" if more else ""
    assert capsys.readouterr().out == f"{STOPPED}; go on with the same command{added}\n"


def test_the_export_gets_a_name_that_is_free(tmp_path: Path) -> None:
    assert summary._free(tmp_path / "run-hf") == tmp_path / "run-hf"
    for name in ("run-hf", "run-hf-2"):
        (tmp_path / name).mkdir()
    assert summary._free(tmp_path / "run-hf") == tmp_path / "run-hf-3"


def test_a_failure_is_in_the_log_of_the_run(small_run, tmp_path: Path, capsys) -> None:
    words = ("--optimizer.lr", "1e30", "--lr-scheduler.warmup-steps", 0)
    assert main(*small_run, *words) == 1
    said = capsys.readouterr().err
    assert re.match("error: the (loss|gradient norm) of step 2 is nan", said)
    assert (tmp_path / "run" / "log.txt").read_text().endswith(said)


def test_of_two_ranks_the_first_writes_the_sample(ranks, small_run, tmp_path: Path) -> None:
    argv = [str(word) for word in (*small_run, *SAVES)]
    ended = ranks(2).run(start, argv)
    assert [end.status for end in ended] == [0, 0]
    said = (tmp_path / "run" / "log.txt").read_text()
    assert said.count("A text that the model of step 5 writes:\n  | ") == 1
