"""The loss by kernels equals the plain one: on a CPU with their references, by an interpreter, on a GPU."""

import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from unittest import mock

import pytest
import torch
from loss_kernel_cases import PlainKernels, case, check_kernels
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

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def inputs(
    dtype: torch.dtype, weight_dtype: torch.dtype, vocab: int = 97, dim: int = 24, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """326 hidden states, a weight and labels, a part of them ignored."""
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(326, dim, generator=generator).to(device, dtype).requires_grad_()
    weight_VD = torch.randn(vocab, dim, generator=generator).mul(0.2).to(device, weight_dtype)
    labels_N = torch.randint(vocab, (326,), generator=generator)
    labels_N[torch.rand(326, generator=generator) < 0.2] = IGNORE
    labels_N[:16] = IGNORE
    return x_ND, weight_VD.requires_grad_(), labels_N.to(device)


@pytest.fixture(autouse=True)
def chunks_of_64_rows(monkeypatch) -> None:
    """Several of them, the last one smaller."""
    monkeypatch.setattr(loss_module, "_LITTLE_BYTES", 0)
    monkeypatch.setattr(loss_module, "chunk_rows", lambda *_: 64)


def results(loss: Loss, x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Value, count and the gradients of the mean."""
    value, count = loss(x, weight, labels)
    return value.detach(), count, *torch.autograd.grad(value / count, (x, weight))


def exact_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The exact loss of these inputs; `reference_cross_entropy` would round the logits of bfloat16."""
    return reference_cross_entropy(x.double(), weight.to(x.dtype).double(), labels)


def assert_equal_to(reference: Loss, x: Tensor, weight: Tensor, labels: Tensor) -> None:
    tolerance = 1e-5 if x.dtype == torch.float32 else 1e-2
    found, expected = (results(f, x, weight, labels) for f in (linear_cross_entropy, reference))
    assert [each.dtype for each in found] == [torch.float32, torch.int64, x.dtype, weight.dtype]
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().double()
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=tolerance)


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
def test_the_loss_around_the_kernels_equals_the_reference(monkeypatch, dtype, weight_dtype):
    monkeypatch.setattr(loss_module, "_kernels", lambda *_: PlainKernels)
    assert_equal_to(reference_cross_entropy, *inputs(dtype, weight_dtype))


class Known(Vocabulary):
    """Half of the vocabulary, with known answers of the other half; records what it is told."""

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
    # One rank may have the kernels, and another one do without: what they exchange must fit together.
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


def test_the_references_of_the_kernels_equal_the_plain_loss():
    logits_CV, labels = case(300, "cpu")
    rows = torch.tensor([0, 1, 2, 3])  # The others have a gradient that the plain loss does not share.
    logits_CV, labels = logits_CV[rows], Labels(*(each[rows] for each in labels))
    expected, expected_CV = loss_module._cross_entropy_(
        logits_CV.clone(), labels, torch.float32, Vocabulary()
    )
    found, found_CV = loss_module._fused_cross_entropy_(
        PlainKernels, logits_CV, labels, torch.float32, Vocabulary()
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_CV, expected_CV)


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
    given = inputs(dtype, weight_dtype, vocab, dim=16, device="cuda")
    assert loss_module._kernels(given[0].device, torch.float32) is not None
    assert_equal_to(exact_cross_entropy, *given)
    monkeypatch.setattr(loss_module, "_kernels", lambda *_: None)
    assert_equal_to(exact_cross_entropy, *given)


@pytest.mark.gpu
def test_on_a_gpu_bfloat16_gradients_are_as_exact_as_those_of_one_product():
    x, weight, labels = inputs(torch.bfloat16, torch.float32, 65_536, dim=16, device="cuda")
    found, expected = (results(f, x, weight, labels) for f in (linear_cross_entropy, reference_cross_entropy))
    exact = results(reference_cross_entropy, x.double(), weight, labels)
    for ours, theirs, truth in list(zip(found, expected, exact, strict=True))[2:]:
        assert (ours - truth).norm() < 1.15 * (theirs - truth).norm()


@pytest.mark.gpu
def test_on_a_gpu_the_loss_holds_one_chunk_of_logits_and_a_copy_of_the_weight():
    vocab = 50_257  # Not a multiple of what rows are aligned to.
    x, weight, labels = inputs(torch.bfloat16, torch.float32, vocab, dim=32, device="cuda")
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


def test_without_triton_the_loss_is_left_to_pytorch_and_says_so(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "torchtitan_lite.models.loss_kernels", raising=False)
    found = loss_module._kernels.__wrapped__(torch.device("cuda", 0), torch.float32)
    assert found is None
    assert "the loss is left to PyTorch's own kernels: ModuleNotFoundError" in caplog.text


class NoSuchCard(Exception):
    """As Triton's errors, no RuntimeError."""


def test_where_triton_cannot_compile_the_loss_is_left_to_pytorch_too(monkeypatch, caplog):
    kernels = ModuleType("torchtitan_lite.models.loss_kernels")
    monkeypatch.setattr(kernels, "try_on", mock.Mock(side_effect=NoSuchCard("sm_999")), raising=False)
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    monkeypatch.setattr(models, "loss_kernels", kernels, raising=False)
    assert loss_module._kernels.__wrapped__(torch.device("cuda", 0), torch.float32) is None
    assert "the loss is left to PyTorch's own kernels: NoSuchCard: sm_999" in caplog.text
