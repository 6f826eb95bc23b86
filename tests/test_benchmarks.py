"""The benchmarks run, and print the figures that other programs read."""

import importlib
import json
import os
import re
import subprocess
import sys
import tarfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import programs
import pytest
import torch

from torchtitan_lite.attention import Sdpa
from torchtitan_lite.models.qwen3 import PRESETS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ("--layers", "1", "--seq", "64", "--batch", "2", "--warmup", "1", "--steps", "3", "--device", "cpu")
KEYS = {
    "peer", "preset", "seq", "batch", "dtype", "device", "compile", "tokens_per_s", "tokens_per_s_median",
    "step_ms_median", "step_ms_min", "step_ms_max", "steps", "params", "model_tflops", "first_step_s",
    "loss_first", "loss_last", "threads", "torch", "python", "peak_rss_gib",
}  # fmt: skip


def benchmark(script: str, *words: str) -> str:
    done = programs.run([BENCHMARKS / script, *words])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def scripts(monkeypatch) -> Iterator[Callable[[str], Any]]:
    """`scripts("gpu")` imports benchmarks/gpu.py."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
            del sys.modules[name]


def json_of(script: str, *words: str) -> Any:
    """The JSON on the last line that a benchmark prints."""
    return json.loads(benchmark(script, *words, "--json").strip().splitlines()[-1])


@pytest.mark.parametrize(
    "words",
    [(), ("--loop", "plain"), ("--dtype", "bf16", "--attention", "varlen", "--documents", "3", "40")],
    ids=["trainer", "plain", "packed"],
)
def test_the_report_of_a_step_has_all_keys(words):
    report = json_of("step.py", *TINY, *words)
    assert report.keys() >= KEYS | {"mfu_causal", "mfu_full", "phases"}
    assert report["steps"] == 3 and report["tokens_per_s_median"] > 0
    assert report["mfu_full"] > report["mfu_causal"] > 0
    assert sum(report["phases"].values()) == pytest.approx(1, abs=1e-3)
    measured = {phase for phase, share in report["phases"].items() if share > 0}
    assert measured == {"rest"} if "plain" in words else measured >= {"forward", "loss", "backward", "clip"}


@pytest.mark.slow
def test_every_rank_draws_its_share_of_the_initial_weights():
    words = ("--model", "qwen3", "debugmodel", "--layers", "1", "--ranks", "1", "2")
    one, two = json_of("initialise.py", *words)["rows"]
    assert two["numbers_per_rank"] == one["numbers_per_rank"] / 2
    assert one["processor_s"] > 0 and one["shared"] == 1


def test_the_bytes_of_clipping_and_of_the_optimizer_are_counted():
    printed = benchmark("phases.py", *TINY, "--dtype", "bf16").splitlines()
    rows = [row for row in printed if row.endswith(" P")]
    moved = {row.split()[0]: row.rpartition("=")[2].strip() for row in rows}
    # Adam reads weight, gradient and two means, and writes all except the gradient.
    assert (moved["clip"], moved["optimizer"]) == ("3.00 P", "7.00 P")
    assert moved.keys() >= {"forward", "loss", "backward"}


def test_the_trainers_step_and_the_plain_step_have_the_same_losses():
    ours, plain = (json_of("step.py", *TINY, "--loop", loop) for loop in ("trainer", "plain"))
    assert ours["loss_first"] == plain["loss_first"]
    assert ours["loss_last"] == pytest.approx(plain["loss_last"], abs=2e-4)


@pytest.mark.slow
def test_compared_programs_take_turns(tmp_path):
    other = tmp_path / "other.py"
    log = tmp_path / "log"
    other.write_text(
        f"open({str(log)!r}, 'a').write('other ')\n"
        "print('chatter')\n"
        'print(\'{"peer": "other", "tokens_per_s_median": 10.0, "step_ms_median": 1.0, '
        '"peak_rss_gib": 2.0, "first_step_s": 3.0}\')\n'
    )
    rows = json_of("step.py", *TINY, "--rounds", "2", "--compare", f"{sys.executable} {other}")
    assert [row["peer"] for row in rows] == ["torchtitan_lite", "other"]
    assert [len(row["rounds"]) for row in rows] == [2, 2] and log.read_text() == "other other "
    ours = rows[0]["tokens_per_s_median"]
    assert rows[1]["times_as_fast"] == pytest.approx(ours / 10, rel=1e-3)
    assert rows[1]["memory_ratio"] == pytest.approx(rows[0]["peak_gib"] / 2, abs=2e-3)


def test_a_compared_program_that_fails_is_left_out_and_its_error_printed():
    others = [f"{sys.executable} -c {code}" for code in ("1/0", "print(1)")]
    words = [*TINY, "--rounds", "1", "--json", "--compare", others[0], "--compare", others[1]]
    done = programs.run([BENCHMARKS / "step.py", *words])
    assert "ZeroDivisionError" in done.stderr and "printed no line of JSON" in done.stderr
    assert [row["peer"] for row in json.loads(done.stdout)] == ["torchtitan_lite"]


def test_an_abbreviated_option_is_refused():
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
    assert json_of(script, *SMALL[script])[ROWS[script]][-1].keys() >= COLUMNS[script]
    assert len(benchmark(script, *SMALL[script]).splitlines()) > 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_traffic_and_memory_are_reported_for_every_axis():
    (alone,) = json_of("scaling.py", "--ranks", "1", "--axes", "fsdp")["ranks"]
    fsdp, tp, cp = json_of("scaling.py", "--ranks", "2", "--axes", "fsdp", "tp", "cp")["ranks"]
    assert len({row["loss"] for row in (alone, fsdp, tp, cp)}) == 1
    assert alone["bytes_into_collectives"] < min(row["bytes_into_collectives"] for row in (fsdp, tp, cp))
    for sharded in (fsdp, tp):
        assert sharded["parameters"] == pytest.approx(alone["parameters"] / 2, rel=0.05)
        assert sharded["optimizer_state"] == pytest.approx(alone["optimizer_state"] / 2, rel=0.05)
    assert cp["kept_for_backward"] < 0.75 * alone["kept_for_backward"]


@pytest.mark.slow
@pytest.mark.compiler
def test_starts_are_timed():
    assert min(json_of("startup.py", "--rounds", "1").values()) >= 0


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.timeout(900)
@pytest.mark.parametrize("words", [("check", "--items", "environment", "curve", "cache-one"), ("speed",)])
def test_the_items_for_a_gpu_also_run_on_a_cpu(words, tmp_path):
    done = subprocess.run(
        [str(BENCHMARKS / "gpu.sh"), *words],
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "DEVICE": "cpu",
            "PYTHON": sys.executable,
            "OUT": str(tmp_path / "out"),
            "CACHE": str(tmp_path / "cache"),
            "WHEELS": str(tmp_path / "none"),
            "SECONDS_IN_ALL": "800",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(result) for result in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert done.stdout.splitlines()[-1] == f"{words[0]}: {len(results)} of {len(results)} passed"
    figures = {result["item"]: result["figures"] for result in results}
    if words[0] == "speed":
        named = ("ceilings", "ours-1", "packed-varlen", "packed-flex", "eager", "large", "loss")
        assert figures.keys() >= set(named)
        assert figures["ours-2"]["tokens_per_s_median"] > 0 and figures["ceilings"]["tflops"] > 0
    else:
        assert 0 < figures["curve"]["most_apart"] < 0.05


PROGRAMS = {
    "passes": "print({'no': 'JSON'}); print('{\"x\": 1}')",
    "fails": "print(1); 1/0",
    "hangs": "import signal; signal.pause()",
}


def test_an_item_passes_fails_times_out_or_is_skipped(scripts, tmp_path):
    gpu, table = scripts("gpu"), scripts("gpu_table")
    items = [
        table.Item(name, "lane", 0.3 if name == "hangs" else 60, (sys.executable, "-c", code))
        for name, code in PROGRAMS.items()
    ]
    run = gpu.Run(out=tmp_path, seconds=100, environment=dict(os.environ))
    results = run.all(items, 1)
    assert [result["status"] for result in results] == ["passed", "failed", "timeout"]
    assert results[0]["figures"] == {"x": 1} and "ZeroDivisionError" in results[1]["figures"]["why"]
    skipped = gpu.Run(out=tmp_path / "late", seconds=0, environment={}).all(items[:1], 1)
    assert gpu.last_line("check", [*results, *skipped]) == (
        "check: 1 of 4 passed; failed: fails; timeout: hangs; skipped: passes"
    )
    written = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(result) for result in written] == results
    with tarfile.open(tmp_path / "logs.tgz") as logs:
        assert {f"logs/{name}.log" for name in PROGRAMS} < set(logs.getnames())


CHILD = """
import os, signal, sys
os.write(os.open(sys.argv[1], os.O_WRONLY), b"x")
print("up", flush=True)
signal.pause()
"""
PARENT = """
import subprocess, sys
started = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdout=subprocess.PIPE)
started.stdout.readline()
"""


def test_the_child_processes_of_an_item_end_with_it(scripts, tmp_path):
    gpu, table = scripts("gpu"), scripts("gpu_table")
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    words = (sys.executable, "-c", PARENT, CHILD, str(tmp_path / "fifo"))
    run = gpu.Run(out=tmp_path, seconds=100, environment=dict(os.environ))
    assert run.all([table.Item("starts", "lane", 60, words)], 1)[0]["status"] == "passed"
    os.set_blocking(reader, True)
    assert os.read(reader, 2) == b"x" and os.read(reader, 1) == b""  # the end: no process has the pipe open
    os.close(reader)


def test_an_item_whose_tests_are_all_skipped_fails(scripts, tmp_path):
    gpu, table = scripts("gpu"), scripts("gpu_table")
    for words, status in (("2 passed, 1 skipped in 3.2s", "passed"), ("3 skipped in 0.1s", "failed")):
        command = (sys.executable, "-c", f"print('==== {words} ====')")
        run = gpu.Run(out=tmp_path, seconds=100, environment=dict(os.environ))
        (result,) = run.all([table.Item("tests", "lane", 60, command, is_tests=True)], 1)
        assert (result["status"], result["figures"]["tests"]) == (status, words.partition(" in ")[0])


def test_items_have_unique_names_and_other_programs_take_turns_with_ours(scripts, tmp_path):
    table = scripts("gpu_table")
    (tmp_path / "hf_trainer.py").touch()
    parts = {"python": "python", "here": BENCHMARKS, "peers": tmp_path, "commands": ("other --fast",)}
    for device, small in (("cuda", False), ("cuda", True), ("cpu", True)):
        sizes = table.Sizes(device=device, small=small, **parts)
        for what in ("check", "speed"):
            names = [item.name for item in table.items_of(what, sizes)]
            assert len(set(names)) == len(names)
    first, second = (names.index(f"ours-{number}") for number in (1, 2))
    assert names[first : first + 3] == ["ours-1", "transformers-1", "other-1-1"]
    assert names[second : second + 3] == ["ours-2", "transformers-2", "other-1-2"]


def test_the_wheels_for_a_gpu_have_the_pinned_versions():
    def pins(file: Path) -> dict[str, str]:
        lines = (text.partition("#")[0].strip() for text in file.read_text().splitlines())
        names = (text.split("==") for text in lines if text)
        return {name.replace("_", "-").lower(): number for name, number in names}

    wheels, tested = pins(BENCHMARKS / "gpu-wheels.txt"), pins(BENCHMARKS.parent / "constraints.txt")
    of_torchtitan = {"docstring-parser", "torchdata", "torchtitan", "typeguard", "tyro"}
    assert wheels.keys() - tested.keys() == of_torchtitan
    assert {name: tested.get(name, number) for name, number in wheels.items()} == wheels


# Events as torch's profiler names them on a GPU: (name, start, end) in nanoseconds.
TRACE = (
    ("cudaLaunchKernel", 1, 2), ("the steps that count", 10, 100), ("the steps that count", 12, 130),
    ("cudaLaunchKernel", 20, 21), ("cuLaunchKernelEx", 22, 23), ("cudaLaunchKernelExC", 24, 25),
    ("void at::native::kernel", 26, 27), ("cudaMemcpyAsync", 30, 31), ("cudaMemcpyAsync", 32, 33),
    ("Memcpy HtoD (Pageable -> Device)", 40, 41), ("Memcpy HtoD (Pinned -> Device)", 42, 43),
    ("Memcpy DtoD (Device -> Device)", 44, 45), ("cudaStreamSynchronize", 50, 60), ("cudaEventQuery", 61, 62),
    ("cudaMemsetAsync", 70, 71), ("Memcpy DtoH (Device -> Pinned)", 105, 106),
    ("cudaDeviceSynchronize", 110, 120),
)  # fmt: skip


def test_only_events_within_the_steps_are_counted(scripts):
    counted = scripts("counters").counts_of(TRACE)
    assert vars(counted) == {"launches": 3, "waits": 1, "to_device": 2, "pageable": 1, "to_host": 1}


def test_a_missed_goal_is_marked(scripts):
    counts = scripts("counts")
    row = {"cell": "a", "launches": 112.0, "waits": 2.0, "pageable": 1.0, "breaks": 0, "recompiles": 3}
    judged = counts.judged(row, 100.0)
    assert judged["of_plain"] == 1.12 and judged["missed"] == ["launches", "waits", "pageable", "recompiles"]
    reached = {"launches": 110.0, "waits": 1.0, "pageable": 0, "recompiles": 0}
    assert counts.judged({**row, **reached}, 100.0)["missed"] == []
    assert counts.judged({"cell": "a", "error": "died"}, 100.0)["missed"] == ["error"]


@pytest.mark.parametrize(
    ("how", "n_graphs"),
    [("eager", 0), pytest.param("compiled", 1, marks=[pytest.mark.slow, pytest.mark.compiler])],
)
def test_graphs_are_counted_on_a_cpu(how: str, n_graphs: int):
    words = ("--device", "cpu", "--cells", f"sdpa/packed/{how}/none/alone", "--steps", "4", "--seq", "64")
    row = json_of("counts.py", *words, "--layers", "2")
    assert (row["graphs"], row["breaks"], row["recompiles"], row["missed"]) == (n_graphs, 0, 0, [])


def test_a_graph_break_is_counted(scripts):
    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    torch._dynamo.reset()
    before = scripts("counters").graphs()
    torch.compile(broken, backend="eager")(torch.ones(2))
    after = scripts("counters").graphs()
    assert (after["graphs"] - before["graphs"], after["breaks"] - before["breaks"]) == (1, 1)


def test_a_wait_is_reported_with_the_innermost_line_of_the_repository(scripts, monkeypatch):
    counters = scripts("counters")
    own = traceback.FrameSummary(str(counters.ROOT / "benchmarks/step.py"), 7, "f")
    library = traceback.FrameSummary(str(counters.ROOT / ".venv/lib/site-packages/torch/x.py"), 9, "g")
    monkeypatch.setattr(traceback, "extract_stack", lambda: [own, library])
    assert counters.innermost_line().startswith("benchmarks/step.py:7")
    monkeypatch.setattr(traceback, "extract_stack", lambda: [library])
    assert counters.innermost_line() == "outside of the repository"


def test_the_plain_model_has_the_loss_of_our_model(scripts, monkeypatch):
    plain = scripts("plain_model")
    config = replace(PRESETS["debugmodel"], n_layers=2, vocab_size=64, sliding_window=5)
    decoder = config.build()

    def attend(q_THK, k_TGK, v_TGK, cu, *_: object, window_size):
        positions_BS = torch.cat([torch.arange(n) for n in cu.diff().tolist()])[None]
        mask = Sdpa().mask(positions_BS, sliding_window=window_size[0] + 1)
        return Sdpa().build()(q_THK[None], k_TGK[None], v_TGK[None], mask)[0]

    monkeypatch.setattr(plain, "varlen", lambda _: (attend, {}))
    model = plain.Model(config, torch.float32, "none")
    names = {"embedding": "embedding", "norm": "norm", "attention_norm": "norms.0", "ffn_norm": "norms.1"}
    ours = {re.sub(r"\.(attention|ffn)\.", ".", name): p for name, p in decoder.named_parameters()}
    ours = {re.sub(r"(attention|ffn)_norm", lambda m: names[m[0]], name): p for name, p in ours.items()}
    model.load_state_dict({**ours, "head.weight": decoder.head_weight_VD})
    lengths = [9, 2, 13]
    positions_T = torch.cat([torch.arange(n) for n in lengths])
    tokens_T, labels_T = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    labels_T[::5] = -100
    cu = torch.tensor([0, 9, 11, 24], dtype=torch.int32)
    found = model(tokens_T, positions_T, labels_T, cu, torch.empty(13, 0))
    mask = Sdpa().mask(positions_T[None], sliding_window=5)
    loss_sum, count = decoder(tokens_T[None], positions_T[None], mask, labels_T[None])
    torch.testing.assert_close(found, loss_sum / count)
    assert sum(p.numel() for p in model.parameters()) == config.n_params
