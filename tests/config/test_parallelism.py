"""Degrees of the mesh: which are allowed, and the errors for the others. No process group is needed."""

import itertools
import random
import re
from dataclasses import replace

import pytest
import remedies
import torch

from torchtitan_lite.config.job import load_job
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.models.registry import resolve
from torchtitan_lite.parallel.division import Division
from torchtitan_lite.parallel.mesh import ParallelismConfig
from torchtitan_lite.train import main

TP, CP = "--parallelism.tensor-parallel-degree", "--parallelism.context-parallel-degree"
SHARD, REPLICATE = "--parallelism.data-parallel-shard-degree", "--parallelism.data-parallel-replicate-degree"
ULYSSES = "--parallelism.context-parallel-method ulysses"
SIX_HEADS = '--model.overrides {"n_heads":6,"n_kv_heads":6,"vocab_size":516}'
PLAIN = "--parallelism.context-parallel-load-balancer none"

# (Number of ranks, flags) of a dry run of the debugmodel, and the error; "..." stands for any words.
REFUSED = {
    (8, f"{TP} 8"): (
        "parallelism.tensor_parallel_degree = 8 does not divide model.n_kv_heads = 4: use 1, 2 or 4"
    ),
    (12, f"{TP} 4 --training.seq-len 516 {SIX_HEADS}"): (
        "parallelism.tensor_parallel_degree = 4 does not divide model.n_heads = 6 or model.n_kv_heads = 6: "
        "use 1, 2, 3 or 6"
    ),
    (4, f'{TP} 4 --model.overrides {{"n_heads":6,"n_kv_heads":6}}'): (
        "parallelism.tensor_parallel_degree = 4 does not divide ...: use 1 or 2"
    ),
    (6, f'{TP} 3 --model.overrides {{"n_heads":6,"n_kv_heads":6}} --training.seq-len 510'): (
        "parallelism.tensor_parallel_degree = 3 does not divide model.vocab_size = 512: "
        "use 1 or 2, or model.overrides.vocab_size = 513"
    ),
    (4, f'{TP} 4 --model.overrides {{"ffn_dim":770}}'): (
        "parallelism.tensor_parallel_degree = 4 does not divide model.ffn_dim = 770: use 1 or 2"
    ),
    (4, f'{TP} 4 {SHARD} 1 --model.overrides {{"ffn_dim":770}}'): (
        # With the other degrees as they are, no degree suits four ranks.
        "parallelism.tensor_parallel_degree = 4 does not divide model.ffn_dim = 770: "
        "use 1, and set parallelism.data_parallel_shard_degree = -1"
    ),
    (8, f"{TP} 8 --training.seq-len 510"): (
        "parallelism.tensor_parallel_degree = 8 does not divide model.n_kv_heads = 4: use 1 or 2"
    ),
    (8, f"{CP} 8 {ULYSSES}"): (
        "parallelism.context_parallel_degree = 8 does not divide model.n_kv_heads = 4: "
        'use 1, 2 or 4, or parallelism.context_parallel_method = "allgather"'
    ),
    (8, f"{CP} 4 {TP} 2 {ULYSSES}"): (
        "parallelism.context_parallel_degree = 4 does not divide model.n_kv_heads = 4 / "
        "parallelism.tensor_parallel_degree = 2: "
        'use 1 or 2, or parallelism.context_parallel_method = "allgather"'
    ),
    (3, f"{CP} 3 {ULYSSES} --training.seq-len 510"): (
        "parallelism.context_parallel_degree = 3 does not divide model.n_kv_heads = 4: "
        'use 1, or parallelism.context_parallel_method = "allgather"'
    ),
    (3, f"{CP} 3 {ULYSSES} --training.seq-len 513"): (
        "parallelism.context_parallel_degree = 3 does not divide model.n_kv_heads = 4: use 1"
    ),
    (4, f"{CP} 4 --training.seq-len 132"): (
        "training.seq_len = 132 is not a multiple of 8, as parallelism.context_parallel_degree = 4 "
        '(headtail) asks: use 128 or 136, or parallelism.context_parallel_load_balancer = "none"'
    ),
    (4, f"{CP} 4 {PLAIN} --training.seq-len 130"): (
        "training.seq_len = 130 is not a multiple of 4, as parallelism.context_parallel_degree = 4 asks: "
        "use 128 or 132"
    ),
    (4, f"{CP} 4 {ULYSSES} --training.seq-len 130"): (
        "training.seq_len = 130 is not a multiple of 4, as parallelism.context_parallel_degree = 4 asks: "
        "use 128 or 132"
    ),
    (4, f"{TP} 4 --training.seq-len 130"): (
        "training.seq_len = 130 is not a multiple of 4, as parallelism.tensor_parallel_degree = 4 asks: "
        "use 128 or 132"
    ),
    (8, f"{CP} 2 {TP} 4 --training.seq-len 132"): (
        "training.seq_len = 132 is not a multiple of 8, as parallelism.context_parallel_degree = 2 "
        "(headtail) and parallelism.tensor_parallel_degree = 4 ask: use 128 or 136"
    ),
    (
        6,
        f"{CP} 2 {TP} 3 --training.seq-len 18 {SIX_HEADS}",
    ): (
        "training.seq_len = 18 is not a multiple of 12, as ...: "
        'use 12 or 24, or parallelism.context_parallel_load_balancer = "none"'
    ),
    (4, f"{CP} 4 --training.seq-len 2047"): "training.seq_len = 2047 ...: use 2040 or 2048",
    (4, f"{CP} 4 --training.seq-len 7"): "training.seq_len = 7 ...: use 8",
    (16, f'{CP} 16 --training.seq-len 20 --model.overrides {{"max_seq_len":30}}'): (
        "training.seq_len = 20 is not a multiple of 32, ...: use smaller degrees"
    ),
    (6, f"{TP} 4"): (
        "--world-size = 6 is no multiple of tensor 4: use 4 ranks (torchrun --nproc_per_node 4) or a "
        "multiple, or change the degrees in [parallelism]"
    ),
    (8, f"{TP} 2 {CP} 2 {SHARD} 4"): (
        "--world-size = 8 is not context 2 x tensor 2 x shard 4 = 16, the product of the degrees in "
        "[parallelism]: use 16 ranks (torchrun --nproc_per_node 16), or set "
        "parallelism.data_parallel_shard_degree to -1"
    ),
    (1, f"{REPLICATE} 2"): "--world-size = 1 is no multiple of replicate 2: ...",
    (4, f"{TP} 0"): "parallelism.tensor_parallel_degree = 0 must be at least 1: use 1 for none",
    (4, f"{CP} -1"): "parallelism.context_parallel_degree = -1 must be at least 1: use 1 for none",
    (4, f"{REPLICATE} 0"): "parallelism.data_parallel_replicate_degree = 0 must be at least 1: ...",
    (4, f"{SHARD} 0"): "parallelism.data_parallel_shard_degree = 0 must be -1 or at least 1: ...",
    (4, "--parallelism.context-parallel-method ring"): (
        'parallelism.context_parallel_method = "ring" is not one of "allgather", "ulysses": choose ...'
    ),
    (4, "--comm.init-timeout-seconds 0"): "comm.init_timeout_seconds = 0 must be at least 1: ...",
    (4, "--comm.train-timeout-seconds -5"): "comm.train_timeout_seconds = -5 must be at least 1: ...",
    (8, "--training.global-batch-size 72"): (
        "training.global_batch_size = 72 is not a multiple of training.local_batch_size = 8 "
        "times 8 data ranks of [parallelism]: use 64 or 128"
    ),
    (16, f"{TP} 2 {CP} 2 {REPLICATE} 2 --training.global-batch-size 40"): (
        "training.global_batch_size = 40 is not a multiple of training.local_batch_size = 8 "
        "times 4 data ranks of [parallelism]: use 32 or 64"
    ),
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def refusal(world_size: int, flags: str = "") -> list[str]:
    """The errors of a dry run for `world_size` ranks."""
    try:
        load_job(["--dry-run", "--world-size", str(world_size), *flags.split()])
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize("case", REFUSED, ids=[f"{n} {f}" for n, f in REFUSED])
def test_what_the_line_proposes_is_accepted(case: tuple[int, str]) -> None:
    world, flags = case
    remedies.check(remedies.flags_of(f"--dry-run --world-size {world} {flags}"))


def test_what_is_proposed_for_any_mesh_is_accepted() -> None:
    choice, n_tried = random.Random(0).choice, 0
    for _ in range(200):
        options = {
            "--world-size": choice([1, 2, 3, 4, 6, 8]),
            TP: choice([1, 1, 2, 3, 4]),
            CP: choice([1, 1, 2, 3]),
            SHARD: choice([-1, -1, 1, 2]),
            "--training.seq-len": choice([510, 512, 4095, 4096]),
            "--parallelism.context-parallel-method": choice(["allgather", "ulysses"]),
            "--model.overrides": choice(
                ['{"vocab_size":256}', '{"vocab_size":300,"n_kv_heads":2}', '{"n_kv_heads":8}']
            ),
        }
        flags = " ".join(f"{key} {value}" for key, value in options.items())
        n_tried += remedies.check(remedies.flags_of(f"--dry-run {flags}"))
    assert n_tried > 200


@pytest.mark.parametrize(("case", "expected"), REFUSED.items(), ids=[f"{n} {f}" for n, f in REFUSED])
def test_a_mesh_that_does_not_divide_evenly_is_one_problem(case: tuple[int, str], expected: str) -> None:
    (line,) = refusal(*case)
    assert re.fullmatch(".+".join(map(re.escape, expected.split("..."))), line), line


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--world-size 4", "--world-size = 4 is for --dry-run: start that many ranks with torchrun"),
        ("--world-size 4 --dry-run false", "--world-size = 4 is for --dry-run: start ..."),
        ("--dry-run --world-size", "--world-size has no value: write --world-size 8 or the like"),
        ("--dry-run --world-size 0", "--world-size = 0 is not a number of ranks: write --world-size 8 ..."),
        ("--dry-run --world-size 2.0", "--world-size = 2.0 is not a number of ranks: ..."),
        ("--dry-run --world-size true", "--world-size = true is not a number of ranks: ..."),
        (f"--dry-run --world-size x {TP} 2", '--world-size = "x" is not a number of ranks: ...'),
        (f"--dry-run --world-size {10**10}", f"--world-size = {10**10} is not a number of ranks: ..."),
        ("--dry-run --worldsize 2", "worldsize = 2 is not a known key: ..."),
        (
            f"{TP} 2",
            (
                "WORLD_SIZE = 1 is no multiple of tensor 2: use 2 ranks (torchrun --nproc_per_node 2) or a "
                "multiple, or change the degrees in [parallelism]"
            ),
        ),
    ],
)
def test_a_wrong_number_of_ranks_is_one_problem(flags: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(flags.split())
    assert re.fullmatch(".+".join(map(re.escape, line.split("..."))), str(caught.value)), str(caught.value)


def test_the_ranks_of_the_launcher_are_checked_unless_a_dry_run_names_another_number() -> None:
    assert load_job([TP, "4", SHARD, "2"], world_size=8).world_size == 8
    assert load_job(["--dry-run", TP, "4", SHARD, "2"], world_size=8).world_size == 8
    assert load_job(["--dry-run", "--world-size", "4", TP, "4"], world_size=3).world_size == 4
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE = 3 is no multiple of tensor 4: "):
        load_job([TP, "4"], world_size=3)


def test_every_rule_is_checked_at_once() -> None:
    flags = f"{TP} 8 {CP} 3 {ULYSSES} {SHARD} 3 --training.seq-len 100 --training.global-batch-size 12"
    lines = refusal(7, f"{flags} --comm.init-timeout-seconds 0")
    assert [line.split(" ")[0] for line in lines] == [
        "comm.init_timeout_seconds",
        "training.global_batch_size",
        "--world-size",
        "parallelism.tensor_parallel_degree",
        "parallelism.context_parallel_degree",
        "training.seq_len",
    ]


@pytest.mark.parametrize(
    "flags",
    [
        f"{TP} x --training.global-batch-size 4 --training.local-batch-size 1",
        f"{CP} x {TP} 4 {SHARD} 1",
        f'{TP} 8 --model.overrides {{"n_kv_heads":"4"}}',
        f"--training.seq-len x {CP} 3 --world-size 3",
        f"--training.seq-len 0 {CP} 8",
    ],
)
def test_a_check_that_used_a_refused_value_reports_nothing(flags: str) -> None:
    (line,) = refusal(8, flags)
    assert line.split(" ")[2] in ('"x"', '"4"', "0")


def test_a_refused_value_that_a_check_did_not_use_hides_nothing() -> None:
    overrides = '{"max_seq_len":"x"}'
    lines = refusal(8, f"{TP} 8 --model.overrides {overrides}")
    assert [line.split(" ")[0] for line in lines] == [
        "model.overrides.max_seq_len",
        "parallelism.tensor_parallel_degree",
    ]
    lines = refusal(4, f"{TP} 4 --parallelism.fsdp-reshard-after-forward x --training.seq-len 130")
    assert [line.split(" ")[0] for line in lines] == [
        "parallelism.fsdp_reshard_after_forward",
        "training.seq_len",
    ]


DECODER = resolve("qwen3", "debugmodel")
SIZES = {"n_heads": 8, "n_kv_heads": 4, "ffn_dim": 768, "vocab_size": 512}
"""The sizes of DECODER that tensor parallel must divide."""


def is_allowed(
    world: int, replicate: int, shard: int, cp: int, tp: int, method: str, balancer: str, seq_len: int
) -> bool:
    """True if the mesh obeys the rules of docs/configuration.md."""
    if shard == -1 and world % (replicate * cp * tp):
        return False
    if shard != -1 and replicate * shard * cp * tp != world:
        return False
    if any(size % tp for size in SIZES.values()) or seq_len % cp or seq_len // cp % tp:
        return False
    if cp > 1 and method == "allgather" and balancer == "headtail" and seq_len // cp % 2:
        return False
    return method == "allgather" or SIZES["n_kv_heads"] // tp % cp == 0


def problems_of(world_size: int, seq_len: int, parallelism: ParallelismConfig) -> list[str]:
    """The problems of a mesh for the debugmodel."""
    assert DECODER.splits == SIZES
    division = Division(parallelism, DECODER, seq_len=seq_len, world_size=world_size)
    return [str(p) for p in (*parallelism.problems("parallelism", world_size), *division.problems())]


def test_the_checks_allow_exactly_the_meshes_that_obey_the_rules() -> None:
    cases = itertools.product(
        (1, 6, 8, 16),
        (1, 2),
        (-1, 1, 2, 3),
        (1, 2, 3, 4),
        (1, 2, 3, 4),
        ("allgather", "ulysses"),
        ("headtail", "none"),
        (512, 510, 36),
    )
    n_allowed, n_suggested = 0, 0
    for case in cases:
        world, replicate, shard, cp, tp, method, balancer, seq_len = case
        parallelism = ParallelismConfig(
            data_parallel_replicate_degree=replicate,
            data_parallel_shard_degree=shard,
            context_parallel_degree=cp,
            tensor_parallel_degree=tp,
            context_parallel_method=method,
            context_parallel_load_balancer=balancer,
        )
        lines = problems_of(world, seq_len, parallelism)
        assert is_allowed(*case) == (not lines), (case, lines)
        n_allowed += not lines
        suggested = re.findall(
            r"^parallelism\.(\w+) = .*: use ([\d, or]+)(?:, or [a-z].*)?$", "\n".join(lines), re.MULTILINE
        )
        for name, degrees in suggested if len(lines) == 1 and shard == -1 else ():
            for degree in re.findall(r"\d+", degrees):
                better = replace(parallelism, **{name: int(degree)})
                assert not problems_of(world, seq_len, better), (case, lines, name, degree)
                n_suggested += 1
    assert 100 < n_allowed < 1000 and n_suggested > 50


@pytest.mark.parametrize("model", ["qwen3", "llama3"])
@pytest.mark.parametrize(
    ("world", "degrees"),
    [
        (world, degrees)
        for world in (8, 4096)
        for degrees in ((1, 1, 1), (1, 1, 8), (1, 8, 1), (2, 2, 2), (8, 1, 1), (4, 1, 2), (8, 8, 8))
        if world % (degrees[0] * degrees[1] * degrees[2]) == 0
    ],
)
def test_a_dry_run_of_any_mesh_needs_no_ranks(
    model: str, world: int, degrees: tuple[int, int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    replicate, cp, tp = degrees
    argv = (
        f"--dry-run --world-size {world} --job.device cuda --model.name {model} --model.flavor 8B_varlen "
        f"--training.seq-len 4096 {REPLICATE} {replicate} {CP} {cp} {TP} {tp} --training.enable-cpu-offload"
    ).split()
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and f"tensor_parallel_degree = {tp}\n" in printed.out
    assert not torch.distributed.is_initialized()
    job = load_job(argv)
    assert job.config.parallelism.degrees(job.world_size).world == world


def test_offloading_to_the_cpu_is_allowed_on_every_device() -> None:
    for device in ("cpu", "cuda"):
        assert refusal(2, f"--training.enable-cpu-offload --job.device {device}") == []
