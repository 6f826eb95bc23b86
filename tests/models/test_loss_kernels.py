"""The loss with its CUDA kernels equals the plain loss.

Without a GPU the kernels are replaced by references in PyTorch, or run by Triton's interpreter.
"""

import importlib.util
import itertools
import subprocess
import sys
from functools import partial
from types import ModuleType
from unittest import mock

import pytest
import torch
from loss_kernel_cases import PlainKernels, assert_equal_to, check_exactness, check_kernels, inputs
from programs import environment
from torch import Tensor

from torchtitan_lite import models
from torchtitan_lite.models import loss as loss_module
from torchtitan_lite.models.loss import (
    IGNORE,
    Labels,
    Vocabulary,
    linear_cross_entropy,
    reference_cross_entropy,
)


@pytest.fixture(autouse=True)
def chunks_of_64_rows(monkeypatch) -> None:
    """Six chunks, the last one smaller."""
    monkeypatch.setattr(loss_module, "_LITTLE_BYTES", 0)
    monkeypatch.setattr(loss_module, "chunk_rows", lambda *_: 64)


def exact_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The exact loss of these inputs; `reference_cross_entropy` would round the logits of bfloat16."""
    return reference_cross_entropy(x.double(), weight.to(x.dtype).double(), labels)


TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
def test_the_loss_around_the_kernels_equals_the_reference(monkeypatch, dtype, weight_dtype):
    monkeypatch.setattr(loss_module, "_kernels", lambda *_: PlainKernels)
    assert_equal_to(reference_cross_entropy, TOLERANCES[dtype], *inputs(326, 97, 24, dtype, weight_dtype))


class Known(Vocabulary):
    """Half of the vocabulary. Results over both halves are given; the results of its half are recorded."""

    n_parts = 2

    def __init__(self, columns: slice, max_C: Tensor, sums_2C: Tensor) -> None:
        self.columns, self.max_C, self.sums_2C = columns, max_C, sums_2C
        self.told: list[Tensor] = []

    def rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        here = (labels >= self.columns.start) & (labels < self.columns.stop)
        return torch.where(here, labels - self.columns.start, 0), here

    def max(self, x: Tensor) -> Tensor:
        self.told.append(x.clone())
        return x.copy_(self.max_C)

    def sum(self, x: Tensor) -> Tensor:
        self.told.append(x.clone())
        return x.copy_(self.sums_2C)


def test_the_kernels_serve_a_part_of_the_vocabulary():
    generator = torch.Generator().manual_seed(0)
    logits_CV = torch.randn(6, 90, generator=generator).mul(5)
    labels_C = torch.tensor([0, 89, 44, 45, IGNORE, 7])
    loss, gradient_CV = loss_module._cross_entropy_(
        logits_CV.clone(), Labels.of(labels_C, Vocabulary(), 90), torch.float32, Vocabulary()
    )
    max_C = logits_CV.amax(dim=1)
    label_logit_C = logits_CV.gather(1, labels_C.clamp(min=0)[:, None])[:, 0] - max_C
    label_logit_C[4] = 0
    sums_2C = torch.stack([(logits_CV - max_C[:, None]).exp().sum(dim=1), label_logit_C])
    parts = [Known(slice(start, start + 45), max_C, sums_2C) for start in (0, 45)]
    # One rank may use the kernels and another PyTorch: their maxima and sums must fit together.
    ways = partial(loss_module._fused_cross_entropy_, PlainKernels), loss_module._cross_entropy_
    for first, second in itertools.product(ways, ways):
        for way, part in zip((first, second), parts, strict=True):
            part.told.clear()
            own_CV = logits_CV[:, part.columns].contiguous()
            own_loss, own_gradient_CV = way(own_CV, Labels.of(labels_C, part, 45), torch.float32, part)
            torch.testing.assert_close(own_loss, loss)
            torch.testing.assert_close(own_gradient_CV, gradient_CV[:, part.columns])
        maxima, sums = zip(*(part.told for part in parts), strict=True)
        assert torch.equal(torch.maximum(*maxima), max_C)
        torch.testing.assert_close(sums[0] + sums[1], sums_2C)


@pytest.mark.parametrize("label", [-1, 90, IGNORE + 1])
def test_a_label_out_of_bounds_is_no_label_of_another_part(label: int):
    part = Known(slice(0, 45), torch.zeros(2), torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match="a label is out of bounds"):
        Labels.of(torch.tensor([3, label]), part, 45)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_the_kernels_equal_their_references_by_the_interpreter():
    # A fresh Python, as Triton looks for the variable when it is imported.
    code = "import loss_kernel_cases; loss_kernel_cases.check_kernels('cpu')"
    env = environment(TRITON_INTERPRET="1", PYTHONPATH=":".join(sys.path))
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_equal_their_references():
    check_kernels("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1003, 20_000])
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
def test_on_a_gpu_the_loss_equals_the_reference_with_and_without_the_kernels(
    monkeypatch, dtype, weight_dtype, vocab
):
    given = inputs(326, vocab, 16, dtype, weight_dtype, "cuda")
    assert loss_module._kernels(given[0].device, torch.float32) is not None
    assert_equal_to(exact_cross_entropy, TOLERANCES[dtype], *given)
    monkeypatch.setattr(loss_module, "_kernels", lambda *_: None)
    assert_equal_to(exact_cross_entropy, TOLERANCES[dtype], *given)


@pytest.mark.gpu
def test_on_a_gpu_bfloat16_gradients_are_as_exact_as_those_of_one_product():
    check_exactness(326, 65_536, "cuda")


@pytest.mark.gpu
def test_on_a_gpu_the_loss_holds_one_chunk_of_logits_and_a_copy_of_the_weight():
    vocab = 50_257  # Not a multiple of the alignment of rows.
    x, weight, labels = inputs(326, vocab, 32, torch.bfloat16, torch.float32, "cuda")
    buffer = loss_module._buffer(2, vocab, x)
    assert buffer.shape == (2, vocab) and buffer.stride(0) % 16 == 0
    linear_cross_entropy(x, weight, labels)[0].backward()  # Loads the libraries, which hold memory too.
    x.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    # Requested bytes, since the allocator may hand out a block that is up to a MiB larger.
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    linear_cross_entropy(x, weight, labels)[0].backward()
    chunk, copy, gradients = 64 * vocab * 4, weight.numel() * 2, x.nbytes + weight.nbytes
    beyond = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before - gradients
    assert chunk + copy <= beyond < 1.05 * (chunk + copy)


class NoSuchCard(Exception):
    """An exception that, like Triton's errors, is no RuntimeError."""


@pytest.mark.parametrize("is_installed", [True, False])
def test_if_triton_fails_pytorch_computes_the_loss_and_a_warning_says_so(
    monkeypatch, caplog, is_installed: bool
):
    kernels = ModuleType("torchtitan_lite.models.loss_kernels")
    monkeypatch.setattr(kernels, "try_on", mock.Mock(side_effect=NoSuchCard("sm_999")), raising=False)
    if is_installed:
        monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
        monkeypatch.setattr(models, "loss_kernels", kernels, raising=False)
    else:
        monkeypatch.setitem(sys.modules, "triton", None)
        monkeypatch.delitem(sys.modules, kernels.__name__, raising=False)
    assert loss_module._kernels.__wrapped__(torch.device("cuda", 0), torch.float32) is None
    error = "NoSuchCard: sm_999" if is_installed else "ModuleNotFoundError"
    assert f"the loss is left to PyTorch's own kernels: {error}" in caplog.text
