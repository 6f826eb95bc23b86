"""Inputs and references for the two kernels of the loss. To check the kernels in Triton's interpreter:

TRITON_INTERPRET=1 python -c "import loss_kernel_cases; loss_kernel_cases.check_kernels('cpu')"
"""

import torch
from torch import Tensor

from torchtitan_lite.models.loss import IGNORE, Labels, Vocabulary


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
    """Six rows of logits, each aligned to 16 numbers; labels: first, last, ignored, and of another rank."""
    generator = torch.Generator().manual_seed(0)
    room_CV = torch.randn(6, (vocab // 16 + 1) * 16, generator=generator).mul_(5)
    logits_CV = room_CV[:, :vocab]
    logits_CV[2, 3:] = -torch.inf
    logits_CV[3, : vocab // 2] = -torch.inf
    logits_CV[4] = -torch.inf  # A row without a label: its gradient must be zero, not NaN.
    labels_C = torch.tensor([0, vocab - 1, 1, vocab - 1, IGNORE, 7])
    labels = Labels.of(labels_C, Vocabulary(), vocab)
    labels.here[5] = False  # The label of another rank.
    room_CV, *parts = (each.to(device) for each in (room_CV, *labels))
    return room_CV[:, :vocab], Labels(*parts)


def check_kernels(device: str) -> None:
    """Compare the kernels with PlainKernels, for vocabularies from a part of a block to over two blocks."""
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
