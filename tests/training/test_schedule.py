"""The learning rate against points worked out by hand."""

import math

import pytest

from torchtitan_lite.training.schedule import LRSchedulerConfig, lr_factor

# 100 steps: 10 of warm-up, 50 at the peak, 40 of decay.
WSD = {"warmup_steps": 10, "decay_ratio": 0.4}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.1),
        (4, 0.5),
        (9, 1.0),
        (10, 1.0),
        (59, 1.0),
        (60, 1.0),
        (70, 0.75),
        (80, 0.5),
        (99, 0.025),
        (100, 0.0),
    ],
)
def test_warm_up_then_plateau_then_linear_decay(step: int, expected: float) -> None:
    assert lr_factor(step, LRSchedulerConfig(**WSD), 100) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [("linear", 0.75), ("sqrt", 0.5), ("cosine", (1 + math.sqrt(0.5)) / 2)],
)
def test_each_shape_of_the_decay_follows_its_formula(shape, expected: float) -> None:
    assert lr_factor(70, LRSchedulerConfig(**WSD, decay_type=shape), 100) == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["linear", "sqrt", "cosine"])
def test_the_decay_ends_at_the_floor_and_stays_there(shape) -> None:
    config = LRSchedulerConfig(**WSD, decay_type=shape, min_lr_factor=0.1)
    assert lr_factor(100, config, 100) == pytest.approx(0.1)
    assert lr_factor(5000, config, 100) == pytest.approx(0.1)
    assert 0.1 < lr_factor(99, config, 100) < lr_factor(98, config, 100)


def test_the_floor_scales_the_decay_and_not_the_warm_up() -> None:
    config = LRSchedulerConfig(**WSD, min_lr_factor=0.2)
    assert lr_factor(0, config, 100) == pytest.approx(0.1)
    assert lr_factor(80, config, 100) == pytest.approx(0.2 + 0.8 * 0.5)


def test_without_a_ratio_the_decay_follows_the_warm_up() -> None:
    config = LRSchedulerConfig(warmup_steps=20)
    assert lr_factor(19, config, 100) == 1.0
    assert lr_factor(60, config, 100) == pytest.approx(0.5)


def test_without_decay_the_peak_stays() -> None:
    config = LRSchedulerConfig(warmup_steps=0, decay_ratio=0.0)
    assert {lr_factor(step, config, 10) for step in range(20)} == {1.0}


def test_a_decay_that_does_not_fit_beside_the_warm_up_is_cut_short() -> None:
    config = LRSchedulerConfig(warmup_steps=80, decay_ratio=0.5)
    assert lr_factor(79, config, 100) == 1.0
    assert lr_factor(90, config, 100) == pytest.approx(0.5)


def test_the_default_warm_up_is_a_tenth_of_the_run_and_at_most_200_steps() -> None:
    assert LRSchedulerConfig().warmup(600) == 60
    assert LRSchedulerConfig().warmup(100_000) == 200
    assert LRSchedulerConfig().warmup(5) == 0


def test_with_total_steps_a_shorter_run_has_the_same_schedule() -> None:
    early = LRSchedulerConfig(total_steps=100)
    assert [lr_factor(s, early, 30) for s in range(30)] == [
        lr_factor(s, LRSchedulerConfig(), 100) for s in range(30)
    ]


def test_a_warm_up_longer_than_the_schedule_is_a_problem() -> None:
    config = LRSchedulerConfig(warmup_steps=50)
    assert config.problems("lr_scheduler", 50) == []
    (problem,) = config.problems("lr_scheduler", 40)
    assert str(problem).startswith(
        "lr_scheduler.warmup_steps = 50 is longer than the schedule of 40 steps: use 40"
    )


def test_a_schedule_shorter_than_the_run_is_a_problem() -> None:
    config = LRSchedulerConfig(total_steps=50)
    assert config.problems("lr_scheduler", 50) == config.problems("lr_scheduler", 20) == []
    (problem,) = config.problems("lr_scheduler", 51)
    assert str(problem).startswith("lr_scheduler.total_steps = 50 is less than training.steps = 51")
    assert problem.remedy == "use 51 or more, or leave it out"
