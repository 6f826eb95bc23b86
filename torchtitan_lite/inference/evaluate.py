"""Measure how well a trained model predicts a text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from torchtitan_lite.data import Batch, Samples, Split, in_order
from torchtitan_lite.inference.progress import shown
from torchtitan_lite.models.decoder import Decoder
from torchtitan_lite.training.validation import mean_loss


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The loss of a model on a text, and the measures computed from the loss."""

    loss: float
    """The mean loss, in nats per token. The tokens that end documents count too."""
    n_tokens: int
    n_bytes: int

    @property
    def perplexity(self) -> float:
        """The perplexity per token."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of the UTF-8 text.

        The first token of a document is never predicted, so it counts with the mean loss.
        """
        return self.loss * self.n_tokens / self.n_bytes / math.log(2)


@torch.inference_mode()
def evaluate(model: Decoder, split: Split, *, seq_len: int, batch_size: int, rest: bool = True) -> Evaluation:
    """Measure the loss of `model` on the tokens of `split`, cut into samples of `seq_len` tokens.

    A token attends only to tokens of its own sample. With `rest`, the last, shorter sample counts too.
    Without `rest`, the loss is the same as that of a validation during training. Standard error shows the
    progress.
    """
    n_rest = split.n_tokens % seq_len if rest else 0
    n_batches = -(-(split.n_tokens // seq_len) // batch_size) + (n_rest > 0)

    def loss_of(batch: Batch) -> tuple[Tensor, Tensor]:
        tensors = batch.tokens_BS, batch.positions_BS, batch.labels_BS
        return model(*model.prepare(*tensors, device=model.device))

    def batches() -> Iterator[Batch]:
        if split.n_tokens >= seq_len or not rest:
            yield from in_order(Samples(split, seq_len), batch_size)
        if n_rest:
            yield Samples(_last(split, n_rest), n_rest).batch([0], [0])

    loss = mean_loss(model, loss_of, shown(batches(), n_batches, "eval"))
    return Evaluation(loss=loss, n_tokens=split.n_tokens, n_bytes=split.n_bytes)


def _last(split: Split, n_tokens: int) -> Split:
    """Return a split of the last `n_tokens` tokens of `split`."""
    start = split.n_tokens - n_tokens
    offsets = np.concatenate(([0], split.offsets[split.offsets > start] - start))
    return replace(split, tokens_T=split.tokens_T[start:], offsets=offsets)
