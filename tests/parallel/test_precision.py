"""bfloat16 on many ranks is as near to float32 as on one rank: sums over ranks lose no precision."""

from pathlib import Path

import parallel_cases as cases
import pytest
import torch

MESHES = {
    "fsdp": (2, []),
    "tp": (2, ["--parallelism.tensor-parallel-degree", "2"]),
    "cp": (2, ["--parallelism.context-parallel-degree", "2"]),
    "cp and tp": (
        4,
        ["--parallelism.tensor-parallel-degree", "2", "--parallelism.context-parallel-degree", "2"],
    ),
}


@pytest.fixture(scope="module")
def words(texts: Path) -> list[str]:
    """The options of one step of 16,384 tokens: a sum of so many rows in bfloat16 would show."""
    options = {
        "model.overrides": {
            "n_layers": 1, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 96
        },
        "validation.enable": "true",
        "validation.freq": 1,
        "data.validation-fraction": 0.2,
        "training.seq-len": 256,
        "training.local-batch-size": 32,
        "training.global-batch-size": 64,
        "training.mixed-precision-param": "bfloat16",
    }  # fmt: skip
    return cases.run_of(texts, options)


@pytest.fixture(scope="module")
def exact(words) -> cases.Training:
    """The step of one rank in float32."""
    return cases.train([*words, "--training.mixed-precision-param", "float32"], 1, double=False)


@pytest.fixture(scope="module")
def alone(words) -> cases.Training:
    """The step of one rank in bfloat16."""
    return cases.train(words, 1, double=False)


@pytest.mark.parametrize("mesh", MESHES)
def test_bfloat16_gradients_are_as_good_on_many_ranks_as_on_one(
    ranks, words, exact: cases.Training, alone: cases.Training, mesh: str
) -> None:
    size, flags = MESHES[mesh]
    spread = ranks(size).run(cases.train, [*words, *flags], 1, False)[0]
    assert spread.losses[0] == pytest.approx(alone.losses[0], rel=1e-3)
    assert spread.norms[0] == pytest.approx(alone.norms[0], rel=1e-3)
    for name, gradient in exact.gradients.items():
        far, far_alone = (float(torch.dist(run.gradients[name], gradient)) for run in (spread, alone))
        assert far <= 1.5 * far_alone, f"{name}: {far / float(gradient.norm()):.2e} of its norm"
