"""The layers that decoders are made of, each computed in the dtype of its input.

B batch, D model dim, V vocab.

Parameters stay as they were made (float32 master weights). A layer casts its weight to the dtype of its
input, so gradients arrive in the float32 parameters without autocast.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def cast_weight(weight: Tensor, x: Tensor) -> Tensor:
    """The weight for the input `x`, in its dtype.

    A layer reads its weight by `weight_for`: this function, until tensor parallel puts another one there, for
    a rank's share.
    """
    return weight if weight.dtype == x.dtype else weight.to(x.dtype)


class Linear(nn.Linear):
    """A projection without bias, computed in the dtype of its input."""

    weight_for = staticmethod(cast_weight)
    multiply = staticmethod(F.linear)
    """Selective recompute replaces this function to keep a product."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: `init_weights` draws every parameter."""

    def forward(self, input: Tensor) -> Tensor:
        return self.multiply(input, self.weight_for(self.weight, input))


class RMSNorm(nn.RMSNorm):
    """Root mean square norm over the last dim, computed in the dtype of its input."""

    weight_for = staticmethod(cast_weight)

    def reset_parameters(self) -> None:
        """Nothing: `init_weights` draws every parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight_for(self.weight, x), self.eps)


class Embedding(nn.Embedding):
    """A table of token vectors, handed out in the compute dtype."""

    look_up = staticmethod(F.embedding)
    """Tensor parallel replaces this function, for a rank's share of the rows."""

    def __init__(self, vocab_size: int, dim: int, compute_dtype: torch.dtype) -> None:
        super().__init__(vocab_size, dim)
        self.compute_dtype = compute_dtype

    def reset_parameters(self) -> None:
        """Nothing: `init_weights` draws every parameter."""

    def forward(self, input: Tensor) -> Tensor:
        return self.look_up(input, self.weight).to(self.compute_dtype)


class Logits(nn.Module):
    """The output projection as a part of the model, so that tensor parallel can exchange it from outside."""

    def forward(self, x_BD: Tensor, weight_VD: Tensor) -> Tensor:
        return F.linear(x_BD, weight_VD.to(x_BD.dtype)).float()
