"""Differences between a run and the run that saved a step, in the words of the configuration."""

from pathlib import Path
from typing import Any

import pytest

from torchtitan_lite.checkpoint.identity import check_same
from torchtitan_lite.checkpoint.state import State
from torchtitan_lite.config.job import JobConfig
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.config.schema import at

CONFIG: dict[str, Any] = {
    "model": {"name": "qwen3", "flavor": "0.6B", "overrides": {"rope_theta": 1e6}},
    "data": {"dataset": "text", "path": "a.txt", "tokenizer": "bytes", "cache_dir": "here"},
    "training": {"local_batch_size": 8},
}
IDENTITY: dict[str, Any] = {
    "model": {"dim": 1024, "n_layers": 28, "rope_theta": 1e6, "sliding_window": None},
    "data.fingerprint": "text-1",
    "data.tokenizer_fingerprint": "one",
    "training.global_batch_size": 8,
    "debug.seed": 0,
}
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "another seed": ({"debug.seed": 1}, {}, ["debug.seed = 1 was 0"]),
    "a field": ({"model": {"dim": 64}}, {}, ["model.overrides.dim = 64 was 1024"]),
    "a field that was unset": (
        {"model": {"sliding_window": 8}},
        {"model": {"overrides": {"sliding_window": 8}}},
        ["model.overrides.sliding_window = 8 was unset"],
    ),
    "another flavor": (
        {"model": {"dim": 2048, "n_layers": 20}},
        {"model": {"flavor": "1.7B"}},
        ['model.flavor = "1.7B" was "0.6B"'],
    ),
    "another flavor and an override": (
        {"model": {"dim": 2048, "rope_theta": 5e5}},
        {"model": {"flavor": "1.7B", "overrides": {"rope_theta": 5e5}}},
        ['model.flavor = "1.7B" was "0.6B"', "model.overrides.rope_theta = 500000.0 was 1000000.0"],
    ),
    "an override beside another attention": (
        {"model": {"rope_theta": 5e5}},
        {"model": {"flavor": "0.6B_flex", "overrides": {"rope_theta": 5e5}}},
        ["model.overrides.rope_theta = 500000.0 was 1000000.0"],
    ),
    "another architecture": (
        {"model": {"architecture": "olmo"}},
        {},
        ['model.name = "qwen3" is of another architecture than when step 6 was saved'],
    ),
    "another path": (
        {"data.fingerprint": "text-2"},
        {"data": {"path": "b.txt"}},
        ['data.path = "b.txt" was "a.txt"'],
    ),
    "another text in the file": (
        {"data.fingerprint": "text-2"},
        {"data": {"cache_dir": "there"}},
        ['data.path = "a.txt" gives other tokens than when step 6 was saved: put the text back'],
    ),
    "another tokenizer": (
        {"data.fingerprint": "text-2", "data.tokenizer_fingerprint": "two"},
        {"data": {"tokenizer": "t.json"}},
        ['data.tokenizer = "t.json" was "bytes"'],
    ),
    "another tokenizer in the file": (
        {"data.fingerprint": "text-2", "data.tokenizer_fingerprint": "two"},
        {},
        ['data.tokenizer = "bytes" is not the tokenizer of step 6: name that one'],
    ),
    "another batch": (
        {"training.global_batch_size": 16},
        {"training": {"local_batch_size": 16}},
        ["training.global_batch_size = 16 was 8", "training.local_batch_size = 16 was 8"],
    ),
}


def merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    return {
        key: merged(low.get(key, {}), high[key])
        if isinstance(high.get(key), dict)
        else high.get(key, low.get(key))
        for key in {**low, **high}
    }


def state(config: dict[str, Any]) -> State:
    counts = {"step": 6, "n_tokens_seen": 0, "consumed_samples": 0, "validated": -1, "model_only": False}
    return State(**counts, identity=IDENTITY, schedule={}, config=config)


@pytest.mark.parametrize("name", CHANGES)
def test_a_difference_is_told_in_keys_of_the_configuration(name: str) -> None:
    identity, config, expected = CHANGES[name]
    now = merged(IDENTITY, identity), merged(CONFIG, config)
    with pytest.raises(ConfigError) as caught:
        check_same(state(CONFIG), *now, allow_changes=False)
    found = caught.value.problems
    assert len(found) == len(expected)
    for problem, line in zip(found, expected, strict=True):
        assert str(problem).startswith(line) and at(JobConfig, problem.key.split(".")[:2]) is not None
        assert "--checkpoint.allow-changes" in problem.remedy or problem.key == "model.name"
    assert check_same(state(CONFIG), *now, allow_changes=True) == [*found]


def test_the_same_run_differs_in_nothing() -> None:
    other = merged(CONFIG, {"model": {"flavor": "0.6B_flex"}, "data": {"path": "moved.txt"}})
    assert check_same(state(CONFIG), IDENTITY, other, allow_changes=False) == []


def test_a_step_without_settings_is_told_in_words() -> None:
    """An imported model has no settings of a run."""
    now = merged(IDENTITY, {"data.tokenizer_fingerprint": "two", "debug.seed": 1})
    keys = ["model", "data.tokenizer_fingerprint"]
    (problem,) = check_same(state({}), now, CONFIG, allow_changes=True, keys=keys)
    assert str(problem).startswith('data.tokenizer = "bytes" is not the tokenizer of step 6: name that one')
    place = Path("steps/tokenizer")
    (problem,) = check_same(state({}), now, CONFIG, allow_changes=True, keys=keys, tokenizer=place)
    assert str(problem).startswith('data.tokenizer = "bytes" is not the tokenizer of step 6: use steps/tok')
