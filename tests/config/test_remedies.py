"""Every remedy that names a value leads to a configuration that is accepted."""

import json
import re
from pathlib import Path
from typing import ClassVar, get_args

import pytest
import torch
from remedies import Flags, changed, changes_of, check, check_values, flags_of, problems_of

from torchtitan_lite.attention import Flex, Sdpa, Varlen, capabilities, varlen
from torchtitan_lite.config import torchtitan
from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.config.schema import at
from torchtitan_lite.inference.commands import EvalConfig
from torchtitan_lite.models.refusals import (
    KEYS_OF_A_COMMAND,
    KEYS_OF_A_RUN,
    Conditions,
    attention_problems,
)
from torchtitan_lite.models.registry import resolve

FLASH = '{"BACKEND": "FLASH"}'
FLAVOR, KIND, BLOCK = "model.flavor", "model.attention.kind", "model.attention.block_size"
OPTIONS, KERNEL = "model.attention.kernel_options", "model.attention.kernel"
ATTENTIONS: list[Flags] = [
    *({FLAVOR: [f"debugmodel{suffix}"]} for suffix in ("", "_flex", "_flex_flash", "_varlen")),
    {FLAVOR: ["debugmodel_flex_flash"], BLOCK: ["64"]},
    {FLAVOR: ["debugmodel_flex_flash"], BLOCK: ["[256, 128]"]},
    {FLAVOR: ["debugmodel_flex_flash"], OPTIONS: ['{"num_stages": 2}']},
    {FLAVOR: ["debugmodel_flex"], OPTIONS: [FLASH]},
    {FLAVOR: ["debugmodel_varlen"], KERNEL: ["fa3"]},
    {FLAVOR: ["debugmodel_varlen"], KIND: ["flex"], BLOCK: ["64"]},
    *({KIND: ["varlen"], KERNEL: [kernel]} for kernel in ("auto", *varlen.KERNELS)),
    *({KIND: ["flex"], BLOCK: [size]} for size in ("16", "64", "100", "[128, 8]")),
    *(
        {KIND: ["flex"], OPTIONS: [options]}
        for options in (FLASH, '{"num_stages": 2}', '{"BACKEND": "FLAHS"}', '{"NOPE": 1, "BLOCK_M": "x"}')
    ),
    {KIND: ["flex"], OPTIONS: [FLASH], BLOCK: ["16"]},
]
"""The attentions of runs, by their flags."""
CONDITIONS = [
    ("float32", False, 32),
    ("bfloat16", True, 32),
    ("float32", True, 72),
    ("bfloat16", False, 136),
    ("float32", False, 272),
]
"""The dtype, whether the run is deterministic, and the head dim."""
GPUS = {
    "none": (None, False),
    "7.5": ((7, 5), False),
    "10.0 with all packages": ((10, 0), True),
    "9.0": ((9, 0), False),
}


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_a_remedy_with_a_refused_value_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = flags_of("--model.attention varlen --job.device cuda --dry-run")
    flags["training.mixed_precision_param"] = ["float32"]
    assert check(flags) == 2
    monkeypatch.setattr("torchtitan_lite.models.refusals._Trial._values", lambda *_: ["use float64"])
    with pytest.raises(AssertionError, match="use float64"):
        check(flags)


def test_the_dtypes_of_the_keys_are_those_that_remedies_may_name() -> None:
    run, command = (
        set(get_args(at(cls, key.split("."))))
        for cls, key in (
            (JobConfig, KEYS_OF_A_RUN.conditions["dtype"]),
            (EvalConfig, KEYS_OF_A_COMMAND.conditions["dtype"]),
        )
    )
    assert set(KEYS_OF_A_RUN.dtypes) == run and set(KEYS_OF_A_COMMAND.dtypes) == command - {"auto"}


@pytest.fixture
def a_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that this machine has one of GPUS, with or without the packages for it."""
    gpu, has_packages = GPUS[request.param]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: gpu)
    monkeypatch.setattr(capabilities, "_importable", lambda module: has_packages)
    monkeypatch.setattr(varlen, "version", lambda package: "4.0.0b18")
    monkeypatch.setattr("torch.nn.attention._fa4._aten_to_fa4_window_size", None, raising=False)


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize(
    ("a_gpu", "device"), [("none", "cpu"), *((gpu, "cuda") for gpu in GPUS)], indirect=["a_gpu"]
)
def test_the_remedies_for_every_attention(device: str) -> None:
    n_tried = 0
    for attention in ATTENTIONS:
        for dtype, deterministic, head_dim in CONDITIONS:
            conditions = {
                "job.device": [device],
                "dry_run": [],
                "training.mixed_precision_param": [dtype],
                "debug.deterministic": [json.dumps(deterministic)],
                "model.overrides": [json.dumps({"head_dim": head_dim, "sliding_window": 8})],
            }
            n_tried += check({**attention, **conditions})
    assert n_tried > 20


@pytest.mark.usefixtures("a_gpu")
@pytest.mark.parametrize("a_gpu", ["none", "10.0 with all packages"], indirect=True)
def test_the_remedies_for_a_compiled_attention() -> None:
    for attention in ATTENTIONS:
        check({**attention, "job.device": ["cuda"], "compile.enable": ["true"], "dry_run": []})


def test_a_device_hides_what_would_not_help_and_a_flavor_is_named_for_a_flavor() -> None:
    conditions = "--job.device cpu --training.mixed-precision-param float32 --debug.deterministic --dry-run"
    (problem,) = problems_of(flags_of(f"--model.flavor debugmodel_flex_flash {conditions}"))
    assert problem.remedy == 'set model.flavor = "debugmodel_flex"'
    (problem,) = problems_of(flags_of(f"--model.attention varlen --model.attention.kernel fa3 {conditions}"))
    assert problem.remedy == 'use "auto" or "documents"'


@pytest.mark.parametrize("more", ["", " --checkpoint.enable", " --checkpoint.keep_latest_k 1"])
def test_the_remedies_for_the_dtype_of_an_export(more: str) -> None:
    assert check(flags_of(f"--checkpoint.export-dtype bfloat16{more}")) == 2


def test_the_remedies_of_the_commands_that_use_a_model() -> None:
    attentions = [Sdpa(), Flex(kernel_options={"BACKEND": "FLASH"}), Varlen(kernel="fa3"), Varlen()]
    for attention, device in ((one, device) for one in attentions for device in ("cpu", "cuda")):
        for dtype, _, head_dim in CONDITIONS:
            decoder = resolve("qwen3", "debugmodel", overrides={"head_dim": head_dim})
            conditions = Conditions(decoder=decoder, device=device, dtype=getattr(torch, dtype))
            for problem in attention_problems(attention, conditions, KEYS_OF_A_COMMAND):
                for change in changes_of(problem):
                    assert all(at(EvalConfig, key.split(".")) is not None for key in change), problem
                if problem.key == "dtype":
                    assert problem.remedy.startswith("use bfloat16, or set attention.")


class Modest(Sdpa):
    """An attention of a plugin that can do little."""

    supports: ClassVar = (
        capabilities.Capabilities(
            name="modest",
            devices=("cpu",),
            dtypes=("float64", "float32"),
            head_dim_multiple=3,
            sliding_window=False,
            deterministic=False,
        ),
    )


def test_a_remedy_names_no_dtype_that_the_key_refuses() -> None:
    decoder = resolve("qwen3", "debugmodel", overrides={"head_dim": 36, "sliding_window": 8})
    conditions = Conditions(decoder=decoder, device="cpu", dtype=torch.bfloat16)
    first, second = attention_problems(Modest(), conditions, KEYS_OF_A_RUN)
    assert first.remedy == 'use float32, or set model.attention.kind = "sdpa"'
    assert second.remedy == 'set model.attention.kind = "sdpa"'


def test_every_key_of_torchtitan_has_its_own_remedy() -> None:
    """A key that stays needs no remedy, and a key that a remedy names must be one of ours."""
    for key, remedy in torchtitan.REMEDIES.items():
        name = key if "." in key else f"{key}.some_key"
        assert at(JobConfig, name.split(".")) is None, f"{key} is a key of ours"
        flags = {name: ["1"]}
        (problem,) = problems_of(flags)
        assert (problem.key, problem.remedy) == (key, remedy)
        named = re.findall(r"(?<![\w/])([a-z_]+\.[a-z_]+)(?![\w.]*\.(?:md|py))", remedy)
        others = {"metrics.jsonl", "config.toml"}
        unknown = [one for one in named if one not in others and at(JobConfig, one.split(".")) is None]
        assert not unknown, f"{key}: {remedy}"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--training.batch-size 4", ["training.local_batch_size", "4"]),
        ("--training.checkpoint_interval 7", ["checkpoint.interval", "7"]),
        ("--training.sequence_parallel_degree 1", ["parallelism.tensor_parallel_degree", "1"]),
        ("--profiling.run_profiler true", ["profiling.enable_profiling", "true"]),
        ("--training.data_parallel_type fsdp", []),
        ("--training.enable_fsdp_float8_all_gather true", []),
        ("--training.compile true --job.device cpu", ["compile.enable", "true"]),
        ("--checkpoint.enable_checkpoint true", ["checkpoint.enable", "true"]),
        ("--validation.enabled true", ["validation.enable", "true"]),
        ("--lr_scheduler.lr_min 0.1", ["lr_scheduler.min_lr_factor", "0.1"]),
        ("--optimizer.fused true", ["optimizer.implementation", "fused"]),
        (
            "--parallelism.context_parallel_rotate_method alltoall",
            ["parallelism.context_parallel_method", "allgather"],
        ),
        ("--training.dataset c4", ["data.dataset", "python_stdlib"]),
        ("--parallelism.pipeline_parallel_degree 1", []),
        ("--metrics.enable_wandb false", []),
        ("--metrics.no-enable-wandb", []),
        ("--activation_checkpoint.mode memory_budget", []),
        ("--parallelism.context_parallel_load_balancer ptrr", []),
        ("--optimizer.name Adam", []),
        ("--model.flavor debugmodel_flex_attn", []),
    ],
)
def test_the_remedies_for_files_of_torchtitan(flags: str, words: list[str]) -> None:
    (problem,) = problems_of(flags_of(flags))
    if words:
        change = next(iter(changes_of(problem)))
        after = changed(flags_of(flags), change)
        assert after.pop(words[0])[0] == words[1]
    assert check_values(flags_of(flags)) or "did you mean" in problem.remedy
