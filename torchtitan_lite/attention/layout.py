"""An adapter that lets any attention module take q, k and v in other layouts, as views without copies.

B batch rows, S tokens, T packed tokens, H heads, K head dim.
"""

from collections.abc import Callable

from torch import Tensor, nn

_View = Callable[[Tensor], Tensor]
LAYOUTS: dict[str, tuple[_View, _View]] = {
    "bshd": (lambda x_BSHK: x_BSHK, lambda x_BSHK: x_BSHK),
    "sbhd": (lambda x_SBHK: x_SBHK.transpose(0, 1), lambda x_BSHK: x_BSHK.transpose(0, 1)),
    "thd": (lambda x_THK: x_THK.unsqueeze(0), lambda x_1THK: x_1THK.squeeze(0)),
}
"""The layouts by name. Each has a function that views a tensor as [B, S, H, K], and the inverse function."""


class WithLayout(nn.Module):
    """The attention module `inner`, with tensors in `layout`: "bshd", "sbhd" or "thd" (one packed row)."""

    def __init__(self, inner: nn.Module, layout: str) -> None:
        """Wrap `inner`. Raises ValueError if `layout` is not a key of LAYOUTS."""
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r} is none of {', '.join(map(repr, LAYOUTS))}")
        self.inner = inner
        self.to_bshk, self.from_bshk = LAYOUTS[layout]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: object, scale: float | None = None) -> Tensor:
        """Return the attention output, which has the layout and shape of `q`."""
        out_BSHK = self.inner(self.to_bshk(q), self.to_bshk(k), self.to_bshk(v), mask, scale=scale)
        return self.from_bshk(out_BSHK)
