"""Seeds, and runs that repeat to the bit; the runs themselves are compared in test_train.py."""

import os

import pytest
import torch

from torchtitan_lite.training.determinism import DebugConfig, set_determinism


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch):
    """The settings are those of the whole process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]


def test_a_deterministic_run_refuses_kernels_whose_result_depends_on_timing() -> None:
    set_determinism(DebugConfig(deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.ones(4).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)


def test_an_ordinary_run_may_use_every_kernel() -> None:
    set_determinism(DebugConfig())
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_the_seed_reaches_torch() -> None:
    draws = []
    for seed in (1, 1, 2):
        set_determinism(DebugConfig(seed=seed))
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
