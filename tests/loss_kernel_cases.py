"""Inputs and references of the loss and of its two kernels, for the tests and for Triton's interpreter:

TRITON_INTERPRET=1 python -c "import loss_kernel_cases; loss_kernel_cases.check_kernels('cpu')"
"""

from collections.abc import Callable

import torch
from torch import Tensor

from torchtitan_lite.models.loss import (
    IGNORE,
    Labels,
    Vocabulary,
    linear_cross_entropy,
    reference_cross_entropy,
)

Loss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def inputs(
    n_rows: int, vocab: int, dim: int, dtype: torch.dtype, weight_dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [2, n_rows / 2, dim], a weight, and labels, some of which are IGNORE."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, n_rows // 2, dim, generator=generator, dtype=torch.float64).to(device, dtype)
    weight = torch.randn(vocab, dim, generator=generator, dtype=torch.float64).mul(0.2)
    labels = torch.randint(vocab, (2, n_rows // 2), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORE
    weight = weight.to(device, weight_dtype)
    return x.requires_grad_(), weight.requires_grad_(), labels.to(device)


def results(loss: Loss, x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The value, the count, and the gradients of 0.3 times the mean."""
    value, count = loss(x, weight, labels)
    dx, dweight = torch.autograd.grad(0.3 * value / count.clamp(min=1), (x, weight))
    return value.detach(), count, dx, dweight


def assert_equal_to(reference: Loss, tolerance: float, x: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Compare our loss and its gradients with those of `reference`, each in proportion to its maximum."""
    found, expected = (results(f, x, weight, labels) for f in (linear_cross_entropy, reference))
    sum_dtype = torch.promote_types(x.dtype, torch.float32)
    assert [each.dtype for each in found] == [sum_dtype, torch.int64, x.dtype, weight.dtype]
    for ours, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max().double().clamp(min=1e-30)
        torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=tolerance)


def check_exactness(n_rows: int, vocab: int, device: str) -> None:
    """In bfloat16, gradients are as exact as those of one product."""
    x, weight, labels = inputs(n_rows, vocab, 16, torch.bfloat16, torch.float32, device)
    found, expected = (results(f, x, weight, labels) for f in (linear_cross_entropy, reference_cross_entropy))
    exact = results(reference_cross_entropy, x.double(), weight, labels)
    for ours, theirs, truth in list(zip(found, expected, exact, strict=True))[2:]:
        assert (ours - truth).norm() < 1.15 * (theirs - truth).norm()


class PlainKernels:
    """The reference of `models.loss_kernels`, in PyTorch."""

    @staticmethod
    def row_sums(logits_CV: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor]:
        max_C = logits_CV.amax(dim=1)
        base_C = torch.where(max_C.isinf(), 0, max_C)
        label_logit_C = torch.where(labels.here, logits_CV.gather(1, labels.row[:, None])[:, 0], 0)
        return max_C, (logits_CV - base_C[:, None]).exp().sum(dim=1), label_logit_C

    @staticmethod
    def gradient_(
        logits_CV: Tensor, labels: Labels, max_C: Tensor, total_C: Tensor, dtype: torch.dtype
    ) -> Tensor:
        softmax_CV = (logits_CV - max_C[:, None]).exp() / total_C[:, None]
        softmax_CV.scatter_add_(1, labels.row[:, None], -labels.here.to(softmax_CV.dtype)[:, None])
        dlogits_CV = logits_CV.view(dtype)[:, : logits_CV.shape[1]]
        return dlogits_CV.copy_(torch.where(labels.valid[:, None], softmax_CV, 0))


def case(vocab: int, device: str) -> tuple[Tensor, Labels]:
    """Six rows of logits, which start at multiples of 16 numbers. Labels: first, last, none, and not here."""
    generator = torch.Generator().manual_seed(0)
    room_CV = torch.randn(6, (vocab // 16 + 1) * 16, generator=generator).mul_(5)
    logits_CV = room_CV[:, :vocab]
    logits_CV[2, 3:] = -torch.inf
    logits_CV[3, : vocab // 2] = -torch.inf
    logits_CV[4] = -torch.inf  # A row without a label: its gradient must be zero, not NaN.
    labels_C = torch.tensor([0, vocab - 1, 1, vocab - 1, IGNORE, 7])
    labels = Labels.of(labels_C, Vocabulary(), vocab)
    labels.here[5] = False  # As if another rank had this row of the weight.
    room_CV, *parts = (each.to(device) for each in (room_CV, *labels))
    return room_CV[:, :vocab], Labels(*parts)


def check_kernels(device: str) -> None:
    """Compare the kernels with PlainKernels, for vocabularies of less than one to more than two blocks."""
    from torchtitan_lite.models import loss_kernels

    for vocab in (17, 300, 4096, 9001):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
            logits_CV, labels = case(vocab, device)
            found = loss_kernels.row_sums(logits_CV, labels)
            expected = PlainKernels.row_sums(logits_CV, labels)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            max_C, total_C, _ = expected
            expected_CV = PlainKernels.gradient_(logits_CV.clone(), labels, max_C, total_C, dtype)
            found_CV = loss_kernels.gradient_(logits_CV, labels, max_C, total_C, dtype)
            assert found_CV.data_ptr() == logits_CV.data_ptr()
            assert not found_CV[4].any() and found_CV.isfinite().all()
            torch.testing.assert_close(found_CV, expected_CV, rtol=0, atol=tolerance)
