"""Speed changes no numbers: the losses of fifty steps with each fast path are those of the slow one."""

import pytest
import torch
from programs import words_of

from torchtitan_lite.attention.portable import kernels, native, tiles
from torchtitan_lite.attention.portable.kernels import PlainKernel
from torchtitan_lite.config.job import load_job
from torchtitan_lite.models import decoder, loss
from torchtitan_lite.models.loss import linear_cross_entropy, reference_cross_entropy
from torchtitan_lite.training.trainer import Trainer

STEPS = 50
MODEL = {"n_layers": 2, "dim": 48, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 64}
# Of a loss of about 4 nats. In bfloat16 a weight that is rounded the other way is other by 1 in 256.
TOLERANCES = {"float32": 2e-4, "bfloat16": 2e-2}


@pytest.fixture
def losses(small_run, monkeypatch):
    """`losses(dtype, fast)` are those of a run with all that is slow, but for one fast path."""

    def run(dtype: str, fast: str | None, *words: str) -> torch.Tensor:
        with monkeypatch.context() as patched:
            if fast != "attention in blocks":
                patched.setattr(kernels, "_is_medium", lambda q: False)
                patched.setattr(kernels, "HALF", ())  # else the backward makes them float32
            if fast != "chunked loss":
                patched.setattr(decoder, "linear_cross_entropy", reference_cross_entropy)
            if fast == "weight cast in tiles":
                patched.setattr(decoder, "linear_cross_entropy", linear_cross_entropy)
                patched.setattr(loss, "_LITTLE_BYTES", 0)
            options = {
                "model.overrides": MODEL,
                "training.steps": STEPS,
                "training.seq-len": 320,  # more than a block of queries
                "training.local-batch-size": 2,
                "training.mixed-precision-param": dtype,
                "lr-scheduler.warmup-steps": 5,
                "optimizer.lr": 3e-3,
            }
            calls, forward = [], native.forward
            patched.setattr(native, "forward", lambda *args: calls.append(1) or forward(*args))
            trainer = Trainer(load_job([*small_run, *words_of(options), *words]).config)
            if fast == "compiled kernel":
                native.compile_kernel(16)
            found = torch.tensor([trainer.stepper.train_step().loss for _ in range(STEPS)])
            is_native = fast == "compiled kernel" or "--compile.enable" in words
            assert len(calls) == (STEPS * MODEL["n_layers"] if is_native else 0)
            native.forget_kernels()
            return found

    return run


@pytest.fixture(scope="module")
def known() -> dict[str, torch.Tensor]:
    """The losses with all that is slow, by dtype: each run is done once."""
    return {}


@pytest.fixture
def slow_losses(losses, known):
    """`slow_losses(dtype)` are those of a run without any fast path."""

    def slow(dtype: str) -> torch.Tensor:
        if dtype not in known:
            known[dtype] = losses(dtype, None)
        return known[dtype]

    return slow


FAST = ["attention in blocks", "chunked loss", "weight cast in tiles"]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("fast", [*FAST, pytest.param("compiled kernel", marks=pytest.mark.compiler)])
def test_a_fast_path_trains_as_the_slow_one(losses, slow_losses, fast, dtype):
    found, wanted = losses(dtype, fast), slow_losses(dtype)
    assert wanted[-1] < wanted[0] - 1, "it was meant to learn"
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.slow
@pytest.mark.compiler
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_compiled_run_trains_as_the_slow_one(losses, slow_losses, dtype):
    found = losses(dtype, "chunked loss", "--compile.enable")
    torch.testing.assert_close(found, slow_losses(dtype), rtol=0, atol=TOLERANCES[dtype])


def test_the_slow_path_is_the_one_that_torch_has_nothing_faster_for(losses, slow_losses, monkeypatch):
    """The reference itself against matrix products written out."""
    wanted = slow_losses("float32")
    monkeypatch.setattr(tiles, "kernel_for", lambda q: PlainKernel())
    torch.testing.assert_close(losses("float32", None), wanted, rtol=0, atol=TOLERANCES["float32"])
