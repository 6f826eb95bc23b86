"""The printed plan says what is done to the model."""

import re
from dataclasses import replace
from types import SimpleNamespace

import parallel_cases as cases
import pytest
from programs import words_of

from torchtitan_lite.config.job import load_job
from torchtitan_lite.parallel.mesh import ParallelismConfig

MESHES = {
    "fsdp": {},
    "hsdp": {"data-parallel-replicate-degree": 2},
    "tp and fsdp": {"tensor-parallel-degree": 2},
    "cp and tp": {"tensor-parallel-degree": 2, "context-parallel-degree": 2},
}


def flags(**degrees: object) -> list[str]:
    return words_of({f"parallelism.{key}": value for key, value in degrees.items()})


@pytest.mark.parametrize("family", ["qwen3", "llama3"])
@pytest.mark.parametrize("mesh", MESHES)
def test_the_parameters_per_rank_are_those_of_the_rank_that_has_most(ranks, small_run, mesh, family) -> None:
    argv = [*small_run, "--model.name", family, *flags(**MESHES[mesh])]
    said = load_job(argv, world_size=4).config.plan(4)
    found = re.search(r"([\d,]+) in all, ([\d,]+) per rank", "\n".join(said))
    assert found is not None
    total, most = (int(number.replace(",", "")) for number in found.groups())
    held = ranks(4).run(cases.n_parameters, argv)
    assert most == max(held)
    assert total == load_job(argv, world_size=4).config.decoder.n_params


def test_the_plan_says_what_each_part_gets(small_run) -> None:
    argv = [
        *small_run,
        *flags(**{"data-parallel-replicate-degree": 2, "tensor-parallel-degree": 2}),
        *flags(**{"context-parallel-degree": 2, "fsdp-reshard-after-forward": "never"}),
        *("--model.attention", "flex", "--compile.enable", "--compile.backend", "aot_eager"),
        *("--activation-checkpoint.mode", "selective", "--activation-checkpoint.selective-ac-option", "2"),
    ]
    found = load_job(argv, world_size=16).config.plan(16)
    assert found[0].startswith("model: qwen3 debugmodel, dim = 32, ")
    assert found[1:] == [
        "mesh: 16 ranks = dp_replicate 2 x dp_shard 2 x cp 2 x tp 2",
        "parameters: 35,008 in all, 4,400 per rank (12.6%)",
        "memory: 0.1 MiB per rank = weights 0.0 + gradients 0.0 + optimizer 0.0",
        "projections: wq wk wv w1 w3 by columns, wo w2 by rows, norms by tokens (tp 2)",
        "attention: flex (cpu); keys and values gathered, headtail balance (cp 2)",
        (
            "blocks: recompute full in one block out of 2; compiled by aot_eager; FSDP over 4, 2 copies; "
            "gathered weights kept after forward"
        ),
        (
            "embedding and head: by vocabulary (tp 2); one FSDP group with the last norm, kept until the "
            "backward"
        ),
        "loss: in chunks; each rank its share of the vocabulary (tp 2)",
        "tokens: 1,024 per step, 5,120 in 5 steps",
    ]


def test_one_rank_has_a_short_plan_and_says_it_at_the_start(small_run) -> None:
    trainer = cases.new_trainer([*small_run, "--model.attention", "varlen"])
    began, model, *plan = trainer.describe()
    assert re.fullmatch(r"started: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}", began)
    assert model.startswith("model: qwen3 debugmodel, dim = 32, ffn_dim = 64, ")
    n_tokens = trainer.corpus.shards.train.n_tokens
    assert plan == [
        "mesh: 1 rank = dp_replicate 1 x dp_shard 1 x cp 1 x tp 1",
        "parameters: 35,008 in all, 35,008 per rank (100.0%)",
        "memory: 0.5 MiB per rank = weights 0.1 + gradients 0.1 + optimizer 0.3",
        "attention: varlen (documents)",
        "blocks: recompute none",
        "loss: in chunks",
        "tokens: 256 per step, 1,280 in 5 steps",
        "device: cpu, 1 thread; computes in float32",
        f"data: {n_tokens:,} tokens to train on; the run makes {20 / (n_tokens // 64):.2f} epochs",
    ]


@pytest.mark.parametrize("mesh", MESHES)
def test_the_expected_memory_is_that_of_the_tensors_after_a_step(ranks, small_run, mesh) -> None:
    # Wide layers: 0.1 MiB would be too coarse for the small run.
    wide = ["--model.overrides", '{"n_layers": 2, "dim": 256, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 512}']
    argv = [*small_run, *wide, *flags(**MESHES[mesh])]
    said = "\n".join(load_job(argv, world_size=4).config.plan(4))
    found = re.search(
        r"memory: ([\d.]+) MiB per rank = weights ([\d.]+) .* ([\d.]+) .* ([\d.]+)$", said, re.MULTILINE
    )
    assert found is not None
    total, *parts = (float(number) for number in found.groups())
    held = ranks(4).run(cases.held_mib, argv)
    assert parts == pytest.approx([max(sizes) for sizes in zip(*held, strict=True)], abs=0.06)
    assert total == pytest.approx(sum(parts), abs=0.2)


def test_the_memory_of_a_large_model_is_in_gib() -> None:
    job = load_job(["--model.flavor", "8B", "--training.seq-len", "128", "--job.device", "cpu"]).config
    (line,) = (line for line in job.plan(1) if line.startswith("memory"))
    weights = job.decoder.n_params * 4 / 2**30
    assert line.startswith(f"memory: {4 * weights:.1f} GiB per rank = weights {weights:.1f} + ")


def test_the_memory_of_an_optimizer_that_does_not_say_what_it_keeps_is_not_known(small_run) -> None:
    job = load_job(small_run).config
    unknown = replace(job, optimizer=SimpleNamespace())
    (line,) = (line for line in unknown.plan(1) if line.startswith("memory"))
    expected = "0.3 MiB per rank = weights 0.1 + gradients 0.1; the optimizer's state comes on top"
    assert line == f"memory: {expected}"


@pytest.mark.parametrize(("balancer", "even"), [("headtail", True), ("none", False)])
def test_the_first_rank_says_how_evenly_attention_was_shared(ranks, small_run, balancer, even) -> None:
    degrees = {"context-parallel-degree": 2, "context-parallel-load-balancer": balancer}
    argv = [*small_run, *flags(**degrees)]
    (first,), others = ranks(2).run(cases.said_of_work, argv)
    found = re.fullmatch(r"attention work per rank in the first step: max/mean (\d\.\d{3})", first)
    assert found is not None and others == []
    assert 1.0 <= float(found[1]) < 1.2 if even else 1.2 < float(found[1]) < 2.0


def test_the_axes_of_a_rank_follow_from_its_number() -> None:
    config = ParallelismConfig(tensor_parallel_degree=2, context_parallel_degree=2)
    degrees = config.degrees(16)
    assert degrees.sizes == (1, 4, 2, 2)
    assert [degrees.data_rank(rank) for rank in range(16)] == [rank // 4 for rank in range(16)]
