"""Only tests that -m gpu chooses see a GPU."""

import gpus
import programs
import pytest
import torch


@pytest.mark.parametrize(
    ("mark_expression", "hidden"),
    [
        ("", True),
        ("not gpu", True),
        ("not slow and not gpu", True),
        ("gpu or slow", True),
        ("not (gpu or slow)", True),
        ("gpu", False),
        ("not slow and gpu", False),
    ],
)
def test_gpus_are_hidden_unless_the_mark_expression_chooses_only_gpu_tests(mark_expression, hidden):
    assert gpus.are_hidden(mark_expression) == hidden


def test_neither_this_test_nor_a_program_that_it_starts_sees_a_gpu():
    assert not torch.cuda.is_available()
    assert programs.environment()["CUDA_VISIBLE_DEVICES"] == "-1"
