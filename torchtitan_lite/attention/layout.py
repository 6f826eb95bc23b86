"""Other layouts of q, k and v, as views: one exact adapter around any inner attention.

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
"""Each layout by name: the view of it as [B, S, H, K], and back."""


class WithLayout(nn.Module):
    """An inner attention that takes and returns another layout: "bshd", "sbhd" or "thd" (one packed row)."""

    def __init__(self, inner: nn.Module, layout: str) -> None:
        """Raise ValueError for a layout that is not exactly one of LAYOUTS."""
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r} is none of {', '.join(map(repr, LAYOUTS))}")
        self.inner = inner
        self.to_bshk, self.from_bshk = LAYOUTS[layout]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: object, scale: float | None = None) -> Tensor:
        """Attend; the output has q's layout and shape."""
        out_BSHK = self.inner(self.to_bshk(q), self.to_bshk(k), self.to_bshk(v), mask, scale=scale)
        return self.from_bshk(out_BSHK)
