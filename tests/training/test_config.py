"""The settings of training."""

import pytest

from torchtitan_lite.training.config import TrainingConfig


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
