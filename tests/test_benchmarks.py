"""The benchmarks run, and print what those who compare with them rely on."""

import json
import subprocess
import sys
from pathlib import Path

import programs
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ("--layers", "1", "--seq", "64", "--batch", "2", "--warmup", "1", "--steps", "3", "--device", "cpu")
PEERS_KEYS = {
    "peer", "preset", "seq", "batch", "dtype", "device", "compile", "tokens_per_s", "tokens_per_s_median",
    "step_ms_median", "step_ms_min", "step_ms_max", "steps", "params", "model_tflops", "first_step_s",
    "loss_first", "loss_last", "threads", "torch", "python", "peak_rss_gib",
}  # fmt: skip


def benchmark(script: str, *words: str) -> str:
    done = programs.run([BENCHMARKS / script, *words])
    assert done.returncode == 0, done.stderr
    return done.stdout


def line(script: str, *words: str):
    return json.loads(benchmark(script, *words, "--json").strip().splitlines()[-1])


@pytest.mark.parametrize(
    "words",
    [(), ("--loop", "plain"), ("--dtype", "bf16", "--attention", "varlen", "--documents", "3", "40")],
    ids=["trainer", "plain", "packed"],
)
def test_a_step_is_reported_with_the_keys_of_the_peers(words):
    report = line("step.py", *TINY, *words)
    assert report.keys() >= PEERS_KEYS | {"mfu_causal", "mfu_full", "phases"}
    assert report["steps"] == 3 and report["tokens_per_s_median"] > 0
    assert report["mfu_full"] > report["mfu_causal"] > 0
    assert sum(report["phases"].values()) == pytest.approx(1, abs=1e-3)
    measured = {phase for phase, share in report["phases"].items() if share > 0}
    assert measured == {"rest"} if "plain" in words else measured >= {"forward", "loss", "backward", "clip"}


def test_what_clipping_and_the_optimizer_move_is_counted():
    rows = [
        row for row in benchmark("phases.py", *TINY, "--dtype", "bf16").splitlines() if row.endswith(" P")
    ]
    moved = {row.split()[0]: row.rpartition("=")[2].strip() for row in rows}
    # Adam reads weight, gradient and two means, and writes all but the gradient.
    assert (moved["clip"], moved["optimizer"]) == ("3.00 P", "7.00 P")
    assert moved.keys() >= {"forward", "loss", "backward"}


def test_a_trainers_step_and_a_plain_one_are_the_same_step():
    ours, plain = (line("step.py", *TINY, "--loop", loop) for loop in ("trainer", "plain"))
    assert ours["loss_first"] == plain["loss_first"]
    assert ours["loss_last"] == pytest.approx(plain["loss_last"], abs=2e-4)


@pytest.mark.slow
def test_a_comparison_runs_the_others_in_turns(tmp_path):
    other = tmp_path / "other.py"
    log = tmp_path / "log"
    other.write_text(
        f"open({str(log)!r}, 'a').write('other ')\n"
        "print('chatter')\n"
        'print(\'{"peer": "other", "tokens_per_s_median": 10.0, "step_ms_median": 1.0, '
        '"peak_rss_gib": 2.0, "first_step_s": 3.0}\')\n'
    )
    rows = line("step.py", *TINY, "--rounds", "2", "--compare", f"{sys.executable} {other}")
    assert [row["peer"] for row in rows] == ["torchtitan_lite", "other"]
    assert [len(row["rounds"]) for row in rows] == [2, 2] and log.read_text() == "other other "
    ours = rows[0]["tokens_per_s_median"]
    assert rows[1]["times_as_fast"] == pytest.approx(ours / 10, rel=1e-3)
    assert rows[1]["memory_ratio"] == pytest.approx(rows[0]["peak_gib"] / 2, abs=2e-3)


def test_a_program_that_fails_is_shown_with_its_error_and_left_out():
    others = [f"{sys.executable} -c {code}" for code in ("1/0", "print(1)")]
    words = [*TINY, "--rounds", "1", "--json", "--compare", others[0], "--compare", others[1]]
    done = programs.run([BENCHMARKS / "step.py", *words])
    assert "ZeroDivisionError" in done.stderr and "printed no line of JSON" in done.stderr
    assert [row["peer"] for row in json.loads(done.stdout)] == ["torchtitan_lite"]


def test_an_abbreviated_option_is_none():
    done = programs.run([BENCHMARKS / "step.py", *TINY, "--compar", "true"])
    assert done.returncode == 2 and "--compar" in done.stderr


SMALL = {
    "attention.py": ("--seq", "64", "--tokens", "128", "--rounds", "1", "--heads", "4/2", "--device", "cpu"),
    "loss.py": ("--vocabularies", "512", "--rows", "64", "--dim", "16", "--rounds", "1", "--device", "cpu"),
    "scaling.py": ("--sequences", "64", "128"),
}
ROWS = {"attention.py": "rows", "loss.py": "vocabularies", "scaling.py": "sequences"}
COLUMNS = {
    "attention.py": {"way", "forward_ms", "backward_ms", "forward_tflops", "mib", "copies", "times_of_raw"},
    "loss.py": {"vocabulary", "chunked_ms", "full_ms", "chunked_bytes", "full_bytes", "times_as_fast"},
    "scaling.py": {"tokens", "step_s", "above_gib", "bytes_per_token", "growth"},
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SMALL)
def test_every_other_benchmark_prints_json_and_a_table(script):
    assert line(script, *SMALL[script])[ROWS[script]][-1].keys() >= COLUMNS[script]
    assert len(benchmark(script, *SMALL[script]).splitlines()) > 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_traffic_and_memory_are_reported_for_every_axis():
    (alone,) = line("scaling.py", "--ranks", "1", "--axes", "fsdp")["ranks"]
    fsdp, tp, cp = line("scaling.py", "--ranks", "2", "--axes", "fsdp", "tp", "cp")["ranks"]
    assert len({row["loss"] for row in (alone, fsdp, tp, cp)}) == 1
    assert alone["bytes_into_collectives"] < min(row["bytes_into_collectives"] for row in (fsdp, tp, cp))
    for sharded in (fsdp, tp):
        assert sharded["parameters"] == pytest.approx(alone["parameters"] / 2, rel=0.05)
        assert sharded["optimizer_state"] == pytest.approx(alone["optimizer_state"] / 2, rel=0.05)
    assert cp["kept_for_backward"] < 0.75 * alone["kept_for_backward"]


@pytest.mark.slow
@pytest.mark.compiler
def test_starts_are_timed():
    assert line("startup.py", "--rounds", "1")


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.timeout(900)
def test_what_is_run_on_a_gpu_runs_on_a_cpu_too(tmp_path):
    done = subprocess.run(
        [str(BENCHMARKS / "cuda.sh")],
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "DEVICE": "cpu",
            "PYTHON": sys.executable,
            "OUT": str(tmp_path / "out"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = {path.stem for path in (tmp_path / "out").glob("*.json") if path.stat().st_size}
    assert made >= {
        "step-sdpa",
        "step-varlen",
        "step-flex",
        "packed-sdpa",
        "step-eager",
        "large-1",
        "attention-sdpa",
        "attention-flex",
        "loss",
    }
