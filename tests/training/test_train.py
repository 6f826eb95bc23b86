"""The training program in real processes, as a user starts it."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import programs
import pytest
import tomli
from programs import Program, environment

from torchtitan_lite import train
from torchtitan_lite.config.job import load_job

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "torchtitan_lite" / "train.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1")
STARTS = {
    "module": ("-m", "torchtitan_lite.train"),
    "path": (SCRIPT,),
    "torchrun path": (*TORCHRUN, SCRIPT),
    "torchrun module": (*TORCHRUN, "-m", "torchtitan_lite.train"),
    "command": ("-m", "torchtitan_lite.cli", "train"),
}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


@pytest.mark.parametrize("start", STARTS)
def test_every_way_to_start_reads_the_same_command_line(start: str, run, small_run) -> None:
    done = run(*STARTS[start], *small_run, "--dry-run", fresh=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == load_job(small_run).config.to_toml(1)


def test_a_run_writes_its_files_and_prints_where_they_are(run, small_run, tmp_path: Path) -> None:
    words = ("--metrics.enable-tensorboard", "--metrics.save-tb-folder", "logs/tb")
    done = run(SCRIPT, *small_run, *words, fresh=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.toml",
        "exit.json",
        "lock",
        "log.txt",
        "metrics.jsonl",
        "run.json",
        "logs",
    }
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4, 5]
    assert json.loads((folder / "exit.json").read_text())["status"] == 0
    assert f"Files: {folder}" in done.stdout
    assert f"--logdir {folder / 'logs' / 'tb'}" in done.stdout.splitlines()[-1]


def test_started_by_path_the_package_is_importable_and_its_modules_are_not_top_level(run) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        f"runpy.run_path({str(SCRIPT)!r})\n"
        "print(*sys.path, sep='\\n')"
    )
    path = run("-c", code, fresh=True).stdout.splitlines()
    assert path[0] == str(ROOT)
    assert str(SCRIPT.parent) not in path


def test_started_by_path_the_package_need_not_be_installed(run, small_run, tmp_path: Path) -> None:
    done = run("-I", SCRIPT, *small_run, "--dry-run", fresh=True)
    assert done.returncode == 0, done.stderr


def test_the_printed_tensorboard_command_reads_the_run(run, small_run, tmp_path: Path) -> None:
    *_, name, command = run(SCRIPT, *small_run, "--metrics.enable-tensorboard").stdout.splitlines()
    assert name == "TensorBoard:"
    shown = subprocess.run(f"{command} --inspect", shell=True, capture_output=True, text=True, check=True)
    assert "loss" in shown.stdout


def test_without_a_dump_folder_the_run_makes_a_folder_in_outputs(run, small_run, tmp_path: Path) -> None:
    assert run(SCRIPT, *small_run[2:]).returncode == 0
    (folder,) = (tmp_path / "outputs").iterdir()
    assert re.match(r"qwen3-debugmodel-n_layers\d-", folder.name), folder.name
    assert len(losses(folder)) == 5


def test_a_dry_run_prints_the_config_and_writes_nothing(run, small_run, tmp_path: Path) -> None:
    code = (
        "import sys; from torchtitan_lite import train\n"
        "status = train.main(sys.argv[1:])\n"
        "assert 'torchtitan_lite.training.trainer' not in sys.modules\n"
        "sys.exit(status)"
    )
    done = run("-c", code, *small_run, "--dry-run", fresh=True)
    assert done.returncode == 0, done.stderr
    assert tomli.loads(done.stdout)["training"]["seq_len"] == 64
    assert list(tmp_path.iterdir()) == []
    assert done.stderr == ""


def test_the_saved_config_is_resolved_and_repeats_the_run(run, small_run, tmp_path: Path) -> None:
    resolved = run(SCRIPT, *small_run, "--dry-run").stdout
    run(SCRIPT, *small_run)
    saved = tomli.loads((tmp_path / "run" / "config.toml").read_text())
    wanted = tomli.loads(resolved)
    assert wanted["job"].pop("dump_folder") == str(tmp_path / "run")
    assert saved == wanted
    again = run(SCRIPT, "--config", tmp_path / "run" / "config.toml", "--job.dump-folder", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "run"), rel=1e-6)


def test_a_run_from_the_config_of_a_folder_that_has_moved_leaves_the_old_place_alone(
    run, small_run, tmp_path: Path
) -> None:
    assert run(SCRIPT, *small_run, "--data.cache-dir", tmp_path / "run" / "cache").returncode == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    saved = (tmp_path / "moved" / "config.toml").read_text()
    assert str(tmp_path / "run") not in saved and "# job.dump_folder is left out" in saved
    words = ("--config", "moved/config.toml", "--data.cache-dir", tmp_path / "moved" / "cache")
    done = run(SCRIPT, *words)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run").exists()
    assert len([*(tmp_path / "outputs").glob("qwen3-debugmodel-*")]) == 1


def test_wrong_input_gives_status_2_and_a_line_for_each_error_without_a_traceback(
    run, small_run, tmp_path: Path
) -> None:
    done = run(SCRIPT, *small_run, "--training.steps", -1, "--training.stepz", 3, "--model.flavor", "8C")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) >= 1
    assert "Traceback" not in done.stderr
    assert 'did you mean "steps"' in done.stderr
    assert not (tmp_path / "run" / "config.toml").exists()
    outcome = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (outcome["status"], outcome["outcome"]) == (2, "refused")
    assert outcome["message"] == done.stderr.strip()


def test_wrong_input_writes_nothing_only_in_a_dry_run(run, small_run, tmp_path: Path) -> None:
    assert run(SCRIPT, *small_run, "--training.steps", -1, "--dry-run").returncode == 2
    assert list(tmp_path.iterdir()) == []
    assert run(SCRIPT, *small_run, "--training.steps", -1, "--dry-run", "false").returncode == 2
    assert (tmp_path / "run" / "exit.json").exists()


@pytest.mark.parametrize("flag", ["--help", "--dry-run"])
def test_a_closed_output_gives_no_traceback(flag: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        done = programs.run([SCRIPT, flag], stdout=pipe)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_refusal_is_written_to_the_folder_however_the_folder_is_given(run, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[job]\ndump_folder = "c"\n')
    ways = {"a": ["--job.dump-folder=a"], "b": ["--job.dump_folder", "b"], "c": ["--config", "run.toml"]}
    for folder, words in ways.items():
        assert run(SCRIPT, *words, "--training.steps", 0).returncode == 2
        assert json.loads((tmp_path / folder / "exit.json").read_text())["status"] == 2


@pytest.mark.parametrize("words", [[], ["--job.dump-folder="], ["--job.dump-folder"]])
def test_a_refusal_without_a_folder_writes_nothing(words: list[str], run, tmp_path: Path) -> None:
    assert run(SCRIPT, *words, "--training.stps", 3).returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_keeps_the_outcome_of_the_run_before(run, small_run, tmp_path: Path) -> None:
    assert run(SCRIPT, *small_run).returncode == 0
    assert run(SCRIPT, *small_run, "--training.stps", 3).returncode == 2
    now, before = (tmp_path / "run" / name for name in ("exit.json", "earlier/exit.json"))
    assert [json.loads(file.read_text())["outcome"] for file in (now, before)] == ["refused", "done"]
    assert len(losses(tmp_path / "run")) == 5


def test_a_folder_that_cannot_be_made_is_reported_in_one_line(run, small_run) -> None:
    done = run(SCRIPT, *small_run, "--job.dump-folder", "/proc/here")
    assert done.returncode == 2
    assert done.stderr.startswith('job.dump_folder = "/proc/here" cannot be written (')
    assert "Traceback" not in done.stderr


def test_unusable_data_that_is_found_after_the_start_is_refused_the_same_way(
    run, small_run, tmp_path: Path
) -> None:
    little = ("--training.seq-len", 2048, "--validation.enable", "--data.validation-fraction", 0.01)
    done = run(SCRIPT, *small_run, *little)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("training.seq_len = 2048 ")
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["outcome"] == "refused"


def test_a_dry_run_begins_with_the_plan_and_can_be_read_back(run, small_run, tmp_path: Path) -> None:
    mesh = ("--parallelism.tensor-parallel-degree", 2, "--activation-checkpoint.mode", "full")
    done = run(SCRIPT, *small_run, *mesh, "--dry-run", "--world-size", 8)
    model, mesh_of_8, *_ = done.stdout.splitlines()
    assert model.startswith("# model: qwen3 debugmodel, ")
    assert mesh_of_8 == "# mesh: 8 ranks = dp_replicate 1 x dp_shard 4 x cp 1 x tp 2"
    (tmp_path / "again.toml").write_text(done.stdout, encoding="utf-8")
    again = run(SCRIPT, "--config", "again.toml", "--dry-run", "--world-size", 8)
    assert (again.returncode, again.stdout) == (0, done.stdout)


def test_cpu_offload_works_without_a_launcher(run, small_run) -> None:
    plain = run(SCRIPT, *small_run)
    offloaded = run(SCRIPT, *small_run, "--training.enable-cpu-offload")
    assert (plain.returncode, offloaded.returncode) == (0, 0), offloaded.stderr
    said = " ".join(offloaded.stdout.split())
    assert "FSDP over 1; gathered weights dropped after forward; shards in host memory" in said
    losses = [
        re.findall(r"^\d\d:\d\d:\d\d +\d+ +([\d.]+)", done.stdout, re.MULTILINE)
        for done in (plain, offloaded)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 5


@pytest.mark.parametrize("size", ["", "two", "-1", "0", "1.5"])
def test_a_wrong_world_size_is_reported_in_one_line(size: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    assert train.main(["--dry-run"]) == 2
    assert capsys.readouterr().err.startswith(f'WORLD_SIZE = "{size}" must be a number from 1 to ')


def test_a_diverging_run_stops_and_names_the_step_and_the_samples(run, small_run, tmp_path: Path) -> None:
    done = run(SCRIPT, *small_run, "--optimizer.lr", "1e30", "--lr-scheduler.warmup-steps", 0)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "of step 2 is nan" in done.stderr and "4, 5, 6, 7" in done.stderr
    outcome = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (outcome["status"], outcome["outcome"], outcome["step"]) == (1, "non-finite", 1)
    assert len(losses(tmp_path / "run")) == 1


def test_a_crash_prints_its_traceback_and_writes_its_outcome(run, small_run, tmp_path: Path) -> None:
    code = (
        "import sys; from torchtitan_lite import train\n"
        "from torchtitan_lite.training.step import Stepper\n"
        "Stepper.train_step = lambda *_: 1 / 0\n"
        "sys.exit(train.main(sys.argv[1:]))"
    )
    done = run("-c", code, *small_run)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr
    outcome = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert (outcome["status"], outcome["outcome"]) == (1, "failed")


@pytest.mark.parametrize(
    ("number", "status", "named"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_run_ended_by_a_signal_writes_that_without_a_traceback(
    number: int, status: int, named: str, small_run, tmp_path: Path
) -> None:
    words = [SCRIPT, *small_run, "--training.steps", "1000000"]
    process = Program(words, cwd=tmp_path, env=environment(PYTHONUNBUFFERED="1"))
    assert process.stdout is not None
    assert any(line.split()[1:2] == ["3"] for line in process.stdout)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in error
    left = json.loads((tmp_path / "run" / "exit.json").read_text())
    ended = (status, named, f"ended by signal {int(number)}")
    assert (left["status"], left["outcome"], left["message"]) == ended
    assert len(losses(tmp_path / "run")) >= 3


def test_two_deterministic_runs_have_the_same_losses_bit_for_bit(run, small_run, tmp_path: Path) -> None:
    flags = ("--debug.deterministic", "--validation.enable", "--training.mixed-precision-param", "bfloat16")
    curves = []
    for name in ("one", "two"):
        done = run(SCRIPT, *small_run, *flags, "--job.dump-folder", tmp_path / name, OMP_NUM_THREADS="2")
        assert done.returncode == 0, done.stderr
        curves.append([line.get("loss", line.get("validation_loss")) for line in lines(tmp_path / name)])
    assert len(curves[0]) == 7
    assert curves[0] == curves[1]


def test_one_rank_under_torchrun_uses_all_threads(run, small_run) -> None:
    plain = device_of(run(SCRIPT, *small_run, OMP_NUM_THREADS=""))
    started = device_of(run(*TORCHRUN, SCRIPT, *small_run, OMP_NUM_THREADS=""))
    assert (" 1 thread;" in plain) == (len(os.sched_getaffinity(0)) == 1)
    assert started == plain


def device_of(done: subprocess.CompletedProcess[str]) -> str:
    """The line about the device."""
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("device: "))
    return line
