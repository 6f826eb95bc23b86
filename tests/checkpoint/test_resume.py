"""A run in three parts equals the run in one, to the bit: weights, optimizer, batches and reports."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import parallel_cases
import pytest
import resume_cases as cases

STOPPED, DONE, CRASHED = 75, 0, None


@dataclass(frozen=True, kw_only=True)
class Case:
    """The mesh of a run, and its arithmetic."""

    mesh: Mapping[str, object]
    size: int = 1
    local: int = 4
    dtype: str = "float32"
    flags: tuple[str, ...] = ()
    again: bool = False
    """Whether a fourth start goes on from the step that the second start went on from."""

    def words(self, folder: Path) -> list[str]:
        values = {
            "job__dump_folder": folder,
            "training__mixed_precision_param": self.dtype,
            "training__local_batch_size": self.local,
        }
        return [*cases.options(**values, **self.mesh), *self.flags]


FSDP = {"parallelism__data_parallel_shard_degree": 2}
TENSOR = {"parallelism__tensor_parallel_degree": 2}
CONTEXT = {"parallelism__context_parallel_degree": 2}
ONE_LAYER = {"model__overrides": {**cases.MODEL, "n_layers": 1}}
ASYNC = ("--checkpoint.async-mode", "async")
CASES = {
    # Without a known peak each start measures one, on random numbers.
    "one rank": Case(mesh={}, flags=("--metrics.peak-flops", "0"), again=True),
    "one rank, in the background": Case(mesh={}, dtype="bfloat16", flags=ASYNC, again=True),
    "fsdp 2": Case(mesh=FSDP, size=2, local=2, dtype="bfloat16", flags=ASYNC),
    "tp 2": Case(mesh=TENSOR | ONE_LAYER, size=2, local=8, again=True),
    "cp 2": Case(mesh=CONTEXT | ONE_LAYER, size=2, local=8, flags=("--model.attention", "varlen")),
}
SLOW = {
    f"{name}, {dtype}": Case(mesh=mesh, size=size, local=2, dtype=dtype)
    for name, mesh, size in (
        ("one rank", {}, 1),
        ("fsdp 2", FSDP, 2),
        ("replicate 2", {"parallelism__data_parallel_replicate_degree": 2}, 2),
        ("tp 2", TENSOR, 2),
        ("cp 2", CONTEXT, 2),
    )
    for dtype in ("float32", "bfloat16")
}
COMPILED = pytest.param(
    Case(mesh={}, flags=("--compile.enable",)), id="compiled", marks=(pytest.mark.slow, pytest.mark.compiler)
)
ON_A_GPU = [
    pytest.param(
        Case(
            mesh={},
            dtype="bfloat16",
            flags=("--job.device", "cuda", "--debug.deterministic", "--checkpoint.async-mode", mode),
        ),
        id=f"on a gpu, {mode}",
        marks=pytest.mark.gpu,
    )
    for mode in ("disabled", "async", "async_with_pinned_mem")
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    parallel_cases.write_documents(folder / "short.jsonl")
    return folder / "short.jsonl"


def begun(start: cases.Start) -> tuple[int, int, int | None]:
    return start.began, start.ended, start.status


def up_to(start: cases.Start, step: int) -> list:
    return [batch for batch in start.batches if batch[1] <= step]


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name) for name, case in CASES.items()),
        *(pytest.param(case, id=name, marks=pytest.mark.slow) for name, case in SLOW.items()),
        COMPILED,
        *ON_A_GPU,
    ],
)
def test_three_parts_are_the_whole_to_the_bit(case: Case, ranks, texts: Path, tmp_path: Path, caplog) -> None:
    base = cases.run_of(texts, texts.parent / "cache")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    words = [*base, *case.words(parts)]
    runs = [
        ([*base, *case.words(whole)], {}),
        (words, {"stop_at": 5}),
        (words, {"crash_at": 11}),  # after the save at 9, and a tenth step that is lost
        (words, {}),
    ]
    # Once more from the same step, of which the other parts have gone on already.
    runs += [([*words, "--checkpoint.load-step", "5"], {})] if case.again else []
    done = [cases.starts(runs)] if case.size == 1 else ranks(case.size).run(cases.starts, runs, timeout=250)
    for straight, first, second, third, *again in done:
        assert begun(straight) == (0, 12, DONE)
        assert [begun(part) for part in (first, second, third)] == [
            (0, 5, STOPPED),
            (5, 10, CRASHED),
            (9, 12, DONE),
        ]
        assert first.at_end == second.at_start != third.at_start
        assert (third.at_end, third.lr) == (straight.at_end, straight.lr)
        assert first.batches + up_to(second, 9) + third.batches == straight.batches
        # No checkpoint holds the states of generators.
        assert not any(part.has_drawn for part in (straight, first, second, third))
        for other in again:
            assert begun(other) == (5, 12, DONE)
            assert (other.at_start, other.at_end) == (first.at_end, straight.at_end)
            assert first.batches + other.batches == straight.batches
    check_files(whole, parts)
    if done[0][4:]:
        assert {path.name for path in (parts / "earlier" / "checkpoint").iterdir()} == {"step-9", "step-12"}
        assert "DAMAGED" not in caplog.text


def check_files(whole: Path, parts: Path) -> None:
    """Assert that the reports in the folders of two runs are equal."""
    found = cases.lines(parts)
    assert found == cases.lines(whole)
    assert [line["step"] for line in found if "loss" in line] == [*range(1, 13)]
    assert [line["step"] for line in found if "validation_loss" in line] == [0, 3, 6, 9, 12]
    assert cases.sample_ids(parts) == cases.sample_ids(whole)
    stated = [
        json.loads((folder / "checkpoint" / "step-12" / "state.json").read_text())
        for folder in (whole, parts)
    ]
    for state in stated:
        del state["config"]  # the runs' folders differ
    assert stated[0] == stated[1]
    assert cases.outcome(parts) == cases.outcome(whole)


def test_a_validation_that_a_stop_came_before_is_made_up_for(texts: Path, tmp_path: Path) -> None:
    words = cases.run_of(texts, texts.parent / "cache", training__steps=6, lr_scheduler__total_steps=6)
    folder = ["--job.dump-folder", str(tmp_path)]
    first = cases.start([*words, *folder], stop_at=3)
    assert begun(first) == (0, 3, STOPPED)
    assert [line["step"] for line in cases.lines(tmp_path) if "validation_loss" in line] == [0]
    assert begun(cases.start([*words, *folder], crash_at=5)) == (3, 4, CRASHED)  # validated, but not saved
    assert begun(cases.start([*words, *folder])) == (3, 6, DONE)
    found = [(line["step"], "loss" in line) for line in cases.lines(tmp_path)]
    trained, validated = True, False
    assert found == [
        (0, validated),
        *((step, trained) for step in (1, 2, 3)),
        (3, validated),
        *((step, trained) for step in (4, 5, 6)),
        (6, validated),
    ]


def test_a_request_before_the_first_step_is_one(ranks, texts: Path, tmp_path: Path) -> None:
    values = {"job__dump_folder": tmp_path, "training__local_batch_size": 4, "validation__enable": "false"}
    words = cases.run_of(texts, texts.parent / "cache", **values, validation__freq=500, validation__steps=-1)
    runs = [(words, {"stop_at": 0}), (words, {"stop_at": 1})]
    for first, second in ranks(2).run(cases.starts, runs, timeout=60):
        assert [begun(first), begun(second)] == [(0, 0, STOPPED), (0, 1, STOPPED)]
        assert second.at_start == first.at_end
    assert cases.steps_in(tmp_path) == ["latest", "step-0", "step-1"]
