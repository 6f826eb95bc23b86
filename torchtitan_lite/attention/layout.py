"""Other layouts of q, k and v, as views: one exact adapter around any inner attention.

B batch rows, S tokens, T packed tokens, H heads, K head dim.
"""

from collections.abc import Callable

from torch import Tensor, nn

_TO_BSHK: dict[str, Callable[[Tensor], Tensor]] = {
    "bshd": lambda x_BSHK: x_BSHK,
    "sbhd": lambda x_SBHK: x_SBHK.transpose(0, 1),
    "thd": lambda x_THK: x_THK.unsqueeze(0),
}
_FROM_BSHK: dict[str, Callable[[Tensor], Tensor]] = {
    "bshd": lambda x_BSHK: x_BSHK,
    "sbhd": lambda x_BSHK: x_BSHK.transpose(0, 1),
    "thd": lambda x_1THK: x_1THK.squeeze(0),
}
LAYOUTS = tuple(_TO_BSHK)


class WithLayout(nn.Module):
    """An inner attention that takes and returns another layout: "bshd", "sbhd" or "thd" (one packed row)."""

    def __init__(self, inner: nn.Module, layout: str) -> None:
        """Raise ValueError for a layout that is not exactly one of LAYOUTS."""
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r} is none of {', '.join(map(repr, LAYOUTS))}")
        self.inner = inner
        self.to_bshk, self.from_bshk = _TO_BSHK[layout], _FROM_BSHK[layout]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: object, scale: float | None = None) -> Tensor:
        """Attend; the output has q's layout and shape."""
        out_BSHK = self.inner(self.to_bshk(q), self.to_bshk(k), self.to_bshk(v), mask, scale=scale)
        return self.from_bshk(out_BSHK)
