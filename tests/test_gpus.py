"""The tests of CPU runs see no GPU, whatever machine they are on."""

import gpus
import programs
import pytest
import torch


@pytest.mark.parametrize(
    "chosen",
    [
        "",
        "not slow",
        "not gpu",
        "slow or not slow",
        "not slow and not gpu",
        "gpu or slow",
        "not (gpu or slow)",
    ],
)
def test_gpus_are_hidden_from_tests_that_are_not_chosen_for_them(chosen):
    assert gpus.are_hidden(chosen)


@pytest.mark.parametrize("chosen", ["gpu", "gpu and not slow", "not slow and gpu"])
def test_gpus_are_there_for_tests_that_are(chosen):
    assert not gpus.are_hidden(chosen)


def test_neither_this_test_nor_a_program_that_it_starts_sees_one():
    assert not torch.cuda.is_available()
    assert programs.environment()["CUDA_VISIBLE_DEVICES"] == "-1"
