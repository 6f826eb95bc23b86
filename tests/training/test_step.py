"""The settings of a step, and the refusal of numbers that are not finite."""

import math

import pytest

from torchtitan_lite.training.step import NonFinite, TrainingConfig, check_finite


def lines(config: TrainingConfig, data_ranks: int = 1) -> list[str]:
    return [str(problem) for problem in config.problems("training", data_ranks)]


@pytest.mark.parametrize(
    ("config", "data_ranks", "micro_batches"),
    [
        (TrainingConfig(local_batch_size=8), 1, 1),
        (TrainingConfig(local_batch_size=8), 4, 1),
        (TrainingConfig(local_batch_size=4, global_batch_size=32), 1, 8),
        (TrainingConfig(local_batch_size=4, global_batch_size=32), 2, 4),
    ],
)
def test_accumulation_fills_the_global_batch(
    config: TrainingConfig, data_ranks: int, micro_batches: int
) -> None:
    assert config.problems("training", data_ranks) == []
    assert config.accumulation(data_ranks) == micro_batches


def test_a_global_batch_that_does_not_divide_names_the_nearest_that_do() -> None:
    assert lines(TrainingConfig(local_batch_size=8, global_batch_size=20)) == [
        "training.global_batch_size = 20 is not a multiple of training.local_batch_size = 8: use 16 or 24"
    ]
    assert lines(TrainingConfig(local_batch_size=8, global_batch_size=4)) == [
        "training.global_batch_size = 4 is not a multiple of training.local_batch_size = 8: use 8"
    ]
    (line,) = lines(TrainingConfig(local_batch_size=2, global_batch_size=6), data_ranks=2)
    assert "local_batch_size = 2 times 2 data ranks of [parallelism]: use 4 or 8" in line


@pytest.mark.parametrize(
    "wrong",
    [
        {"local_batch_size": 0},
        {"seq_len": 0},
        {"steps": -5},
        {"max_norm": -1.0},
        {"global_batch_size": 0},
        {"global_batch_size": -8},
    ],
)
def test_a_value_out_of_range_is_one_problem_named_by_its_key(wrong) -> None:
    (problem,) = TrainingConfig(**wrong).problems("training")
    assert problem.key == f"training.{next(iter(wrong))}"


@pytest.mark.parametrize(
    ("name", "loss", "norm"), [("loss", math.nan, 1.0), ("gradient norm", 2.0, math.inf)]
)
def test_a_number_that_is_not_finite_is_refused_with_step_value_and_samples(name, loss, norm) -> None:
    with pytest.raises(NonFinite) as caught:
        check_finite(step=7, loss=loss, grad_norm=norm, sample_ids=[24, 25])
    value = loss if name == "loss" else norm
    for part in (f"the {name} of step 7 is {value}", "24, 25"):
        assert part in str(caught.value)
    assert caught.value.sample_ids == [24, 25]


def test_finite_numbers_pass() -> None:
    check_finite(step=1, loss=0.0, grad_norm=1e30, sample_ids=[])
