"""Ranges of values: in errors, in the help and in the JSON schema."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import plugin_cases
import pytest
import remedies
from pydantic import Field

from torchtitan_lite import registry
from torchtitan_lite.config.job import JobConfig, load_job
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.config.schema import at, leaves, plain_types
from torchtitan_lite.config.validation import adapter

# Each number of the configuration, with values just outside of its range.
OUT_OF_RANGE = {
    "training.local_batch_size": [0],
    "training.global_batch_size": [0, -8],
    "training.seq_len": [0],
    "training.steps": [0, -5],
    "training.max_norm": [-1.0],
    "data.validation_fraction": [-0.1, 1.0],
    "data.max_lost_fraction": [-0.1, 1.5],
    "optimizer.lr": [0.0],
    "optimizer.beta1": [1.0, -0.1],
    "optimizer.beta2": [1.0, -0.1],
    "optimizer.eps": [0.0],
    "optimizer.weight_decay": [-1.0],
    "lr_scheduler.warmup_steps": [-1],
    "lr_scheduler.total_steps": [0],
    "lr_scheduler.decay_ratio": [-0.1, 1.5],
    "lr_scheduler.min_lr_factor": [-0.1, 1.5],
    "metrics.log_freq": [0],
    "metrics.peak_flops": [-1.0],
    "metrics.sample_tokens": [-1, 65537],
    "validation.freq": [0],
    "validation.steps": [0, -2],
    "checkpoint.interval": [0],
    "checkpoint.keep_latest_k": [-1],
    "checkpoint.load_step": [-2],
    "parallelism.data_parallel_replicate_degree": [0],
    "parallelism.data_parallel_shard_degree": [0, -2],
    "parallelism.tensor_parallel_degree": [0],
    "parallelism.context_parallel_degree": [0],
    "comm.init_timeout_seconds": [0],
    "comm.train_timeout_seconds": [0],
    "profiling.profile_freq": [0],
    "debug.seed": [-1],
}
ALSO = {"data.max_lost_fraction": ["--data.dataset", "text", "--data.path", __file__]}
"""The options without which a key does not belong to the configuration."""
FOLDERS = ("metrics.save_tb_folder", "profiling.save_traces_folder", "checkpoint.folder")


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with plugin_cases.forgotten():
        yield


def problems(*argv: str) -> list[tuple[str, object, str]]:
    with pytest.raises(ConfigError) as caught:
        load_job(argv)
    return [(problem.key, problem.value, problem.rule) for problem in caught.value.problems]


def test_every_number_of_a_run_has_a_range() -> None:
    types = {key: plain_types(at(JobConfig, key.split("."))) for key in leaves(JobConfig)}
    numbers = {key for key, options in types.items() if {int, float} & set(options)}
    assert numbers - {"model.attention.block_size"} == OUT_OF_RANGE.keys()


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in OUT_OF_RANGE.items() for value in values]
)
def test_a_value_out_of_range_is_one_problem(key: str, value: float) -> None:
    ((found, shown, rule),) = problems(f"--{key}", str(value), *ALSO.get(key, []))
    assert (found, shown) == (key, value)
    assert rule.startswith("must be ")


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("training.global_batch_size", 0, "use -1, or a multiple of "),
        ("training.steps", 0, "use 1 or more"),
        ("optimizer.beta1", 1.0, "use 0.9 or so"),
        ("parallelism.data_parallel_shard_degree", 0, "use -1 for all ranks that are left"),
        ("lr_scheduler.total_steps", 0, "leave it out for training.steps"),
        ("data.validation_fraction", 1.0, "use 0.05, or 0 to hold out nothing"),
    ],
)
def test_the_remedy_for_a_value_out_of_range(key: str, value: float, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job([f"--{key}", str(value)])
    assert caught.value.problems[0].remedy.startswith(remedy)


@pytest.mark.parametrize("key", leaves(JobConfig))
def test_what_the_remedy_proposes_is_accepted(key: str) -> None:
    if {int, float, bool} & set(plain_types(at(JobConfig, key.split(".")))):
        needed = {"model.attention.kind": ["flex"]} if "attention." in key else {}
        for value in (*OUT_OF_RANGE.get(key, ()), "x", -7.0, 3.5, 1e300):
            remedies.check_values({**needed, key: [str(value)]})


def test_a_whole_number_is_proposed_only_within_the_range() -> None:
    with pytest.raises(ConfigError, match=r"steps = -7\.0 is not an integer: use 1 or more"):
        load_job(["--training.steps", "-7.0"])


@pytest.mark.parametrize("mine", ["../x", "tb", "profile_traces", "checkpoint"])
def test_a_folder_is_proposed_only_if_no_other_has_its_name(mine: str) -> None:
    for theirs in itertools.product(["lock", "tb", "profile_traces", "checkpoint"], repeat=2):
        for names in ((mine, *theirs), (*theirs, mine)):
            remedies.check({key: [name] for key, name in zip(FOLDERS, names, strict=True)})


@pytest.mark.parametrize("key", FOLDERS)
@pytest.mark.parametrize(
    "folder", ["", ".", "..", "../tb", "tb/../../tb", "/elsewhere/tb", "run.json", "earlier/tb", "lock"]
)
def test_a_folder_outside_of_the_folder_of_the_run_is_one_problem(key: str, folder: str) -> None:
    ((found, shown, _),) = problems(f"--{key}={folder}")
    assert (found, shown) == (key, folder)


def property_of(name: str, key: str) -> dict[str, Any]:
    """The schema of a key of the class `name`."""
    return adapter(JobConfig).json_schema()["$defs"][name]["properties"][key]


def test_the_schema_has_the_ranges_and_all_members_of_a_choice() -> None:
    assert property_of("TrainingConfig", "steps")["minimum"] == 1
    beta1 = property_of("AdamW", "beta1")
    assert (beta1["minimum"], beta1["exclusiveMaximum"]) == (0, 1)
    shard = property_of("ParallelismConfig", "data_parallel_shard_degree")["anyOf"]
    assert [option.get("const", option.get("minimum")) for option in shard] == [-1, 1]
    schema = adapter(JobConfig).json_schema()
    data = schema["properties"]["data"]
    assert data["discriminator"]["mapping"].keys() == {"python_stdlib", "text", "jsonl"}
    assert not any(section["additionalProperties"] for section in [schema, *schema["$defs"].values()])


def test_the_help_shows_the_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_job(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Optimizer steps of the whole run. At least 1. (default: 1000)" in text
    assert "The decay ends at this share of the peak rate. In [0, 1]. (default: 0.0)" in text


def test_a_member_of_a_plugin_has_ranges_by_annotations() -> None:
    @registry.hooks.register
    @dataclass(frozen=True, kw_only=True)
    class Clock:
        name: Literal["clock"] = "clock"
        every: Annotated[int, Field(ge=2, examples=[10])] = 10

        def build(self, run: object) -> None: ...

    assert Clock
    with pytest.raises(ConfigError) as caught:
        load_job(["--hooks.clock.every", "1"])
    assert str(caught.value) == "hooks.clock.every = 1 must be at least 2: use 10 or so"
    assert property_of("Clock", "every")["minimum"] == 2
