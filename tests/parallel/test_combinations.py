"""Every combination of the table in docs/parallelism.md works or is refused, as the table says."""

import dataclasses
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import combination_cases as cases
import pytest
import torch
from combination_cases import Combination, Curve, Refused, Works
from ranks import Ranks

from torchtitan_lite.attention import BACKENDS, Varlen
from torchtitan_lite.config.job import load_job
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.train import main

GUIDE = cases.PAGE.read_text(encoding="utf-8")
CONSOLES = re.findall(r"```console\n\$ python -m torchtitan_lite.train (.*?)\n(.*?)```", GUIDE, re.DOTALL)
TABLE = cases.verdicts()
ON_CPU = {combination: cpu for combination, (cpu, _) in TABLE.items()}
ON_CUDA = {combination: cuda for combination, (_, cuda) in TABLE.items()}
WORKING = [combination for combination, cpu in ON_CPU.items() if isinstance(cpu, Works)]
# Without compiling on four ranks, which takes longest and adds no pair of values.
SOME = cases.pairwise(c for c in WORKING if c.size < 4 or c.compile == "off")
WITH_INDUCTOR = [
    Combination(attention=attention, method=method, tensor=tensor, compile="on", recompute=recompute)
    for attention, method, tensor, recompute in (
        ("sdpa", "allgather", "2", "selective"),
        ("flex", "ulysses", "1", "full"),
        ('varlen, kernel = "documents"', "none", "2", "none"),
    )
]


@pytest.fixture(scope="module")
def tiny(texts: Path) -> list[str]:
    """The options of all trainings on a CPU."""
    return cases.tiny_run(texts)


def alone(combination: Combination) -> Combination:
    """The same attention on one rank, eager and without recompute."""
    plain = {"method": "none", "tensor": "1", "compile": "off", "recompute": "none"}
    return dataclasses.replace(combination, **plain)


Wanted = Callable[[Combination], Curve]


@pytest.fixture(scope="module")
def wanted(tiny: list[str]) -> Wanted:
    """The curve of one rank, eager and without recompute; computed once for each attention."""
    known: dict[Combination, Curve] = {}

    def wanted(combination: Combination) -> Curve:
        plain = alone(combination)
        if plain not in known:
            known[plain] = cases.curve([*tiny, *plain.words()])
        return known[plain]

    return wanted


def far(found: Curve, wanted: Curve) -> float:
    """The largest relative difference of a loss or a gradient norm."""
    pairs = zip(found.losses + found.norms, wanted.losses + wanted.norms, strict=True)
    return max(abs(a - b) / b for a, b in pairs)


def check(
    ranks: Ranks, tiny: list[str], combinations: Sequence[Combination], wanted: Wanted, *compiler: str
) -> None:
    distances = {}
    for combination in combinations:
        curves = ranks.run(cases.curve, [*tiny, *combination.words(*compiler)], timeout=120)
        distances[combination] = [far(curve, wanted(combination)) for curve in curves]
    assert {c: found for c, found in distances.items() if not all(far <= 1e-5 for far in found)} == {}


def test_every_combination_is_in_the_table() -> None:
    assert set(cases.product()) == TABLE.keys()


def test_the_page_has_the_table() -> None:
    remedy = "the table of docs/parallelism.md is not that of ROWS: run python tests/combination_cases.py"
    assert cases.with_table(GUIDE) == GUIDE, remedy


def test_the_table_has_every_implementation_of_attention(tiny: list[str]) -> None:
    named = {
        backend.implementation(device).name
        for words in cases.ATTENTIONS.values()
        for device in ("cpu", "cuda")
        for backend in [
            load_job(["--model.attention", *words, "--job.device", "cuda", "--dry-run"]).config.attention
        ]
    }
    assert named == {can.name for backend in BACKENDS for can in backend.supports}
    assert Varlen().resolve("cpu") == "documents"


def test_the_tests_that_the_table_names_are_here() -> None:
    for verdicts, test in ((ON_CPU, test_every_combination), (ON_CUDA, test_on_gpus)):
        assert {can.test for can in verdicts.values() if isinstance(can, Works)} == {test.__name__}


def test_any_two_settings_that_work_together_meet_in_the_selection() -> None:
    assert set().union(*map(cases.pairs, SOME)) == set().union(*map(cases.pairs, WORKING))


@pytest.mark.parametrize("combination", SOME, ids=lambda c: ", ".join(dataclasses.astuple(c)))
def test_the_selection(ranks, tiny, wanted: Wanted, combination: Combination) -> None:
    check(ranks(combination.size), tiny, [combination], wanted)


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("attention", sorted({combination.attention for combination in WORKING}))
def test_every_combination(ranks, tiny, wanted: Wanted, attention: str, size: int) -> None:
    combinations = [c for c in WORKING if (c.attention, c.size) == (attention, size)]
    assert combinations
    check(ranks(size), tiny, combinations, wanted)


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize("combination", WITH_INDUCTOR, ids=lambda c: f"{c.attention}, {c.method}")
def test_compiled_by_inductor(ranks, tiny, wanted: Wanted, combination: Combination) -> None:
    check(ranks(combination.size), tiny, [combination], wanted, "inductor")


def refusal(argv: Sequence[str], size: int) -> list[str]:
    """The lines of the error that refuses a configuration; none if it is accepted."""
    try:
        load_job(argv, world_size=size)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def half_or_single(attention: str) -> str:
    """A dtype that the attention supports on CUDA."""
    words = ["--model.attention", *cases.ATTENTIONS[attention], "--job.device", "cuda", "--dry-run"]
    can = load_job(words).config.attention.implementation("cuda")
    return "float32" if "float32" in can.dtypes else "bfloat16"


@pytest.mark.parametrize("attention", sorted({c.attention for c in ON_CPU if c not in WORKING}))
def test_a_combination_refused_on_a_cpu_has_its_line(tiny, attention: str) -> None:
    dtype = ["--training.mixed-precision-param", "bfloat16"]
    for combination, cpu in ON_CPU.items():
        if combination.attention == attention and isinstance(cpu, Refused):
            assert refusal([*tiny, *combination.words(), *dtype], combination.size) == [cpu.line]


@pytest.mark.parametrize("attention", cases.ATTENTIONS)
def test_a_combination_refused_on_cuda_has_its_line_without_a_gpu_too(texts: Path, attention: str) -> None:
    tiny = cases.tiny_run(texts, "cuda", half_or_single(attention))
    for combination, cuda in ON_CUDA.items():
        if combination.attention == attention:
            argv = [*tiny, *combination.words("inductor"), "--dry-run"]
            lines = [cuda.line] if isinstance(cuda, Refused) else []
            assert refusal(argv, combination.size) == lines


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("attention", cases.ATTENTIONS)
def test_on_gpus(ranks, texts: Path, attention: str, size: int) -> None:
    """With a GPU for each rank. Attention is refused only if it needs a missing package or another GPU."""
    if torch.cuda.device_count() < size:
        pytest.skip(f"{torch.cuda.device_count()} GPUs here, and {size} ranks want one each")
    words = ["--model.attention", *cases.ATTENTIONS[attention], "--job.device", "cuda"]
    if refused := refusal(words, 1):
        assert all(re.match(r"model\.attention\.(kernel|block_size)", line) for line in refused)
        pytest.skip(refused[0])
    works = [c for c, cuda in ON_CUDA.items() if isinstance(cuda, Works)]
    combinations = [c for c in works if (c.attention, c.size) == (attention, size)]
    dtype = half_or_single(attention)
    tiny = cases.tiny_run(texts, "cuda", dtype)
    runs = [[*tiny, *combination.words("inductor")] for combination in combinations]
    (one,) = ranks(1).run(cases.curves_on_gpus, [[*tiny, *alone(combinations[0]).words()]], timeout=100)
    bound = 1e-4 if dtype == "float32" else 2e-2
    for curves in ranks(size).run(cases.curves_on_gpus, runs, timeout=250):
        distances = {c: far(curve, one[0]) for c, curve in zip(combinations, curves, strict=True)}
        assert {c: distance for c, distance in distances.items() if not distance <= bound} == {}


@pytest.mark.parametrize(("argv", "lines"), CONSOLES)
def test_a_command_on_the_page_prints_what_the_page_says(
    argv: str, lines: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, plan, _ = argv.partition(" | grep '^#'")
    assert main(shlex.split(argv)) == (0 if plan else 2)
    said = capsys.readouterr()
    printed = [line for line in said.out.splitlines(keepends=True) if line.startswith("#")]
    assert ("".join(printed) if plan else said.err) == lines
