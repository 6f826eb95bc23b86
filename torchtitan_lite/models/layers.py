"""The layers that decoders are made of. Each computes in the dtype of its input.

B batch, D model dim, V vocab.

Parameters keep the dtype that they were created in (float32 master weights). A layer casts its weight to the
dtype of its input, so gradients arrive in the float32 parameters without autocast.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def cast_weight(weight: Tensor, x: Tensor) -> Tensor:
    """Return `weight` in the dtype of the input `x`.

    A layer reads its weight through its attribute `weight_for`, which is this function. Tensor parallel
    replaces `weight_for` by a function that reads this rank's shard.
    """
    return weight if weight.dtype == x.dtype else weight.to(x.dtype)


class _Undrawn:
    def reset_parameters(self) -> None:
        """Do nothing: `init_weights` draws every parameter."""


class Linear(_Undrawn, nn.Linear):
    """A projection without bias, computed in the dtype of its input."""

    weight_for = staticmethod(cast_weight)
    multiply = staticmethod(F.linear)
    """The function for the matrix product. Selective recompute replaces it to keep the layer's output."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input, self.weight_for(self.weight, input))


class RMSNorm(_Undrawn, nn.RMSNorm):
    """Root mean square norm over the last dim, computed in the dtype of its input."""

    weight_for = staticmethod(cast_weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight_for(self.weight, x), self.eps)


class Embedding(_Undrawn, nn.Embedding):
    """The embedding: a table of token vectors, whose output is cast to the compute dtype."""

    look_up = staticmethod(F.embedding)
    """The function for the look-up. Tensor parallel replaces it by one for this rank's rows of the table."""

    def __init__(self, vocab_size: int, dim: int, compute_dtype: torch.dtype) -> None:
        super().__init__(vocab_size, dim)
        self.compute_dtype = compute_dtype

    def forward(self, input: Tensor) -> Tensor:
        return self.look_up(input, self.weight).to(self.compute_dtype)


def logits(x_BD: Tensor, weight_VD: Tensor) -> Tensor:
    """Return the logits [B, V] in float32. The output projection is computed in the dtype of `x_BD`."""
    return F.linear(x_BD, weight_VD.to(x_BD.dtype)).float()
