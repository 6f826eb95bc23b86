"""A run goes on on any number of ranks and any mesh: with the same samples, weights and losses."""

from pathlib import Path

import parallel_cases
import pytest
import resume_cases as cases

Part = tuple[int, dict[str, object]]
"""Number of ranks, and options."""


def on(size: int, local: int, **degrees: int) -> Part:
    names = {
        "replicate": "data_parallel_replicate_degree",
        "shard": "data_parallel_shard_degree",
        "tensor": "tensor_parallel_degree",
        "context": "context_parallel_degree",
    }
    mesh: dict[str, object] = {f"parallelism__{names[name]}": degree for name, degree in degrees.items()}
    return size, {"training__local_batch_size": local, **mesh}


CHAINS = {
    "1, 2, 4 and 1 ranks": [on(1, 8), on(2, 4, shard=2), on(4, 2, shard=4), on(1, 8)],
    "tensor, context and replicas": [
        on(2, 4, tensor=2),
        on(2, 8, context=2),
        on(4, 1, replicate=2, shard=2),
        on(4, 2, tensor=2, context=2),
    ],
}
SLOW_CHAINS = {
    "more and fewer ranks": [on(4, 2, shard=4), on(1, 2), on(2, 1, replicate=2), on(2, 4, shard=2)],
    "two axes at once": [
        on(4, 4, shard=2, tensor=2),
        on(4, 2, shard=2, context=2),
        on(2, 1, tensor=2),
        on(4, 1, replicate=2, tensor=2),
    ],
}
ENDS = (3, 6, 8, 12)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    parallel_cases.write_documents(folder / "short.jsonl")
    return folder / "short.jsonl"


@pytest.fixture(scope="module")
def alone(texts: Path) -> dict[bool, Path]:
    """The folders of the uninterrupted run on one rank, in float32 and in float64."""
    folders = {double: texts.parent / f"alone-{double}" for double in (False, True)}
    for double, folder in folders.items():
        words = cases.run_of(texts, texts.parent / "cache", job__dump_folder=folder)
        cases.start([*words, "--training.local-batch-size", "8"], double=double)
    return folders


@pytest.mark.parametrize(
    ("chain", "double"),
    [
        *((chain, True) for chain in CHAINS),
        pytest.param("1, 2, 4 and 1 ranks", False, marks=pytest.mark.slow),
        *(pytest.param(chain, True, marks=pytest.mark.slow) for chain in SLOW_CHAINS),
    ],
)
def test_a_run_goes_on_on_another_mesh(
    chain: str, double: bool, ranks, texts: Path, alone: dict[bool, Path], tmp_path: Path
) -> None:
    before, began = None, 0
    n_same: dict[int, int] = {}
    """How many ranks have the same samples, by step."""
    for (size, changes), end in zip({**CHAINS, **SLOW_CHAINS}[chain], ENDS, strict=True):
        words = cases.run_of(texts, texts.parent / "cache", job__dump_folder=tmp_path, **changes)
        arguments = [(words, {"stop_at": end} if end < ENDS[-1] else {})]
        done = (
            [cases.starts(arguments, double)]
            if size == 1
            else ranks(size).run(cases.starts, arguments, double, timeout=120)
        )
        for (part,) in done:
            assert (part.began, part.ended) == (began, end)
            # To the bit, however the ranks share the tensors.
            assert before is None or part.at_start == before
        n_split = sum("tensor" in key or "context" in key for key in changes)
        n_same |= {step: 2**n_split for step in range(began + 1, end + 1)}
        before, began = done[0][0].at_end, end
    check_samples(tmp_path, alone[double], n_same)
    check_losses(tmp_path, alone[double], 1e-9 if double else 1e-5)


def check_samples(found: Path, wanted: Path, n_same: dict[int, int]) -> None:
    """Assert that every step had the samples of the uninterrupted run, each on as many ranks as share it."""
    expected = {
        step: {sample: n * n_same[step] for sample, n in counts.items()}
        for step, counts in cases.sample_ids(wanted).items()
    }
    assert cases.sample_ids(found) == expected
    assert expected.keys() == set(range(1, 13))
    assert all(len(samples) == 8 for samples in expected.values())


def check_losses(found: Path, wanted: Path, tolerance: float) -> None:
    lines, others = cases.lines(found), cases.lines(wanted)
    assert [line.keys() for line in lines] == [line.keys() for line in others]
    for line, other in zip(lines, others, strict=True):
        assert line == pytest.approx(other, rel=tolerance), line["step"]
