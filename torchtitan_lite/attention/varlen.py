"""Attention over packed documents by a variable-length FlashAttention kernel, or a loop over documents.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, K head dim;
T = B * Q and U = B * S packed query and key tokens, D documents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchtitan_lite.attention.capabilities import FLOATS, HALVES, Capabilities, Refusal
from torchtitan_lite.attention.mask import (
    Ranges,
    check_inputs,
    check_window,
    of_any_length,
    query_ranges,
    segments,
)
from torchtitan_lite.attention.tile_kernels import attend
from torchtitan_lite.attention.tiles import Tiles, document_tiles

Kernel = Callable[..., Tensor]
"""kernel(q_THK, k_UGK, v_UGK, run, scale, window) -> out_THK, causal and aligned at the bottom right."""


def _fa4_takes_no_window() -> str | None:
    from torch.nn.attention import _fa4

    # Causal attention is a window to varlen_attn, and torch 2.11 hands it to FlashAttention-4 as it stands.
    can = hasattr(_fa4, "_aten_to_fa4_window_size")
    return None if can else "this torch's FlashAttention-4 takes no causal window"


def _flash(name: str, majors: tuple[int, ...], package: str = "", install: str = "", **more) -> Capabilities:
    return Capabilities(
        name=f"varlen ({name})",
        devices=("cuda",),
        dtypes=HALVES,
        head_dim_multiple=8,
        head_dim_max=256,
        packages=(package,) if package else (),
        gpu_majors=majors,
        install=install,
        **more,
    )


_FA3 = "FlashAttention-3 from the flash-attention sources"
KERNELS = {
    "fa4": _flash(
        "fa4", (9, 10), "flash_attn.cute", "pip install --pre flash-attn-4", also_missing=_fa4_takes_no_window
    ),
    # torch does not pass its deterministic mode on to FlashAttention-3.
    "fa3": _flash("fa3", (9,), "flash_attn_interface", _FA3, deterministic=False),
    "flash_attn": _flash("flash_attn", (8, 9, 10, 12), "flash_attn.bert_padding", "pip install flash-attn"),
    "torch": _flash("torch", (8, 9, 10, 12)),
    "documents": Capabilities(name="varlen (documents)", devices=("cpu", "cuda"), dtypes=FLOATS),
}
"""Every kernel by name, the best first: the order in which "auto" looks for one that runs."""


@dataclass(frozen=True, kw_only=True)
class Varlen:
    """Variable-length FlashAttention: packed documents in one kernel call, or a loop over documents."""

    kind: Literal["varlen"] = "varlen"

    kernel: Literal["auto", "fa4", "fa3", "flash_attn", "torch", "documents"] = "auto"
    """Which kernel: auto takes the best that is installed and fits the GPU; documents is the loop."""

    supports: ClassVar[tuple[Capabilities, ...]] = tuple(KERNELS.values())

    def resolve(self, device: str) -> str:
        """The kernel that runs on "cpu" or "cuda"."""
        if self.kernel != "auto":
            return self.kernel
        if device == "cpu":
            return "documents"
        if not torch.cuda.is_available():  # a config checked for another machine
            return "torch"
        return next(name for name, can in KERNELS.items() if can.missing() is None)

    def implementation(self, device: str) -> Capabilities:
        """What runs on "cpu" or "cuda"."""
        return KERNELS[self.resolve(device)]

    def option_refusals(self, device: str) -> list[Refusal]:
        """Whether the kernel can run on "cpu" or "cuda"."""
        can = KERNELS[self.resolve(device)]
        if device not in can.devices:
            rule = f"needs a CUDA device with {can.needs}, and the device is {device}"
            return [Refusal("kernel", self.kernel, rule, 'use "auto" or "documents"')]
        if device == "cuda" and torch.cuda.is_available() and (lack := can.missing()):
            return [Refusal("kernel", self.kernel, f"needs {can.needs}, and {lack}", 'use "auto"')]
        return []

    def build(self) -> nn.Module:
        """The inner attention.

        Raises ValueError if the kernel was named and cannot run here.
        """
        if self.kernel != "auto" and (lack := KERNELS[self.kernel].missing()):
            raise ValueError(
                f"Varlen(kernel={self.kernel!r}) needs {KERNELS[self.kernel].needs or 'CUDA'}: {lack}"
            )
        name = self.resolve("cuda" if torch.cuda.is_available() else "cpu")
        return VarlenAttention(None if name == "documents" else LOADERS[name]())

    def mask(
        self,
        positions_BS: Tensor,
        queries: Ranges | None = None,
        sliding_window: int | None = None,
        device: torch.device | str | None = None,
    ) -> "VarlenMask":
        """What may attend to what, for one micro-batch and all layers; see docs/attention.md."""
        device = torch.device(device) if device is not None else positions_BS.device
        if self.resolve(device.type) == "documents":
            tiles = document_tiles(positions_BS, queries, sliding_window, device)
            return VarlenMask(tiles, (), sliding_window, tiles.shape, torch.empty(0, 5, dtype=torch.int64))
        return build_runs(positions_BS, queries, sliding_window, device)


class Run(NamedTuple):
    """Documents whose queries and whose keys abut, in packed order: one kernel call."""

    q0: int
    q1: int
    k0: int
    k1: int
    cu_q_D: Tensor
    """Cumulative query counts, [D + 1] int32."""
    cu_k_D: Tensor
    """Cumulative key counts, [D + 1] int32."""
    longest_q: Tensor
    """[max_q, 0]: of the size of a tensor torch.compile makes no constant, as it would of a number."""
    longest_k: Tensor
    """[max_k, 0]."""

    @property
    def max_q(self) -> int:
        """No document has more queries."""
        return self.longest_q.shape[0]

    @property
    def max_k(self) -> int:
        """No document has more keys."""
        return self.longest_k.shape[0]


@dataclass(frozen=True)
class VarlenMask:
    """Cumulative lengths for the kernel or, where there is none, a plan of tiles."""

    tiles: Tiles | None
    runs: tuple[Run, ...]
    """Of the rows one after the other."""
    window: int | None
    shape: tuple[int, int, int]
    """(B, Q, S) of the micro-batch."""
    segments_N5: Tensor
    """As in mask.segments."""

    @cached_property
    def row_runs(self) -> tuple[tuple[Run, ...], ...]:
        """The runs of each row by itself, for rows that do not follow each other in memory."""
        device = self.runs[0].cu_q_D.device if self.runs else torch.device("cpu")
        row_N, spans_N4 = self.segments_N5[:, 0], self.segments_N5[:, 1:]
        return tuple(_runs(spans_N4[row_N == row], device) for row in range(self.shape[0]))


def build_runs(
    positions_BS: Tensor, queries: Ranges | None, sliding_window: int | None, device: torch.device
) -> VarlenMask:
    """The documents as runs: one for a batch without padding, one a row and range for fewer queries."""
    check_window(sliding_window)
    segments_N5 = segments(positions_BS.cpu(), queries)
    batch, seq_len = positions_BS.shape
    n_queries = sum(stop - start for start, stop in query_ranges(queries, seq_len))
    before_N4 = segments_N5[:, :1] * torch.tensor([n_queries, n_queries, seq_len, seq_len])
    runs = _runs(segments_N5[:, 1:] + before_N4, device)
    return VarlenMask(None, runs, sliding_window, (batch, n_queries, seq_len), segments_N5)


def _runs(spans_N4: Tensor, device: torch.device) -> tuple[Run, ...]:
    """Documents (q0, q1, k0, k1), in order, cut wherever the next one's queries or keys do not follow."""
    breaks = (spans_N4[1:, 0] != spans_N4[:-1, 1]) | (spans_N4[1:, 2] != spans_N4[:-1, 3])
    edges = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(spans_N4)]
    return tuple(_run(spans_N4[start:stop], device) for start, stop in pairwise(edges) if start < stop)


def _run(spans_D4: Tensor, device: torch.device) -> Run:
    (q0, k0), (q1, k1) = spans_D4[0, [0, 2]].tolist(), spans_D4[-1, [1, 3]].tolist()
    cu_q_D, cu_k_D = (
        torch.cat([spans_D4[:1, first], spans_D4[:, first + 1]]).sub(spans_D4[0, first]).int()
        for first in (0, 2)
    )
    # At least 2, as torch.compile makes a constant of 1.
    longest = (of_any_length(torch.empty(max(2, int(cu_D.diff().max())), 0)) for cu_D in (cu_q_D, cu_k_D))
    cu_q_D, cu_k_D = (of_any_length(cu_D.to(device, non_blocking=True)) for cu_D in (cu_q_D, cu_k_D))
    return Run(q0, q1, k0, k1, cu_q_D, cu_k_D, *longest)


class VarlenAttention(nn.Module):
    """A kernel call for each run of documents, or the loop over documents where the mask is a plan."""

    def __init__(self, kernel: Kernel | None) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(
        self, q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: VarlenMask, scale: float | None = None
    ) -> Tensor:
        """Attend; [B, Q, H, K]."""
        if mask.tiles is not None:
            return attend(q_BQHK, k_BSGK, v_BSGK, mask.tiles, scale)
        scale = check_inputs(q_BQHK, k_BSGK, v_BSGK, mask.shape, scale)
        tensors = q_BQHK, k_BSGK, v_BSGK
        if all(len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in tensors):
            q_THK, k_UGK, v_UGK = (x.flatten(0, 1) for x in tensors)
            out_THK = self._attend(q_THK, k_UGK, v_UGK, mask.runs, scale, mask.window)
            return out_THK.unflatten(0, q_BQHK.shape[:2])
        # Rows that do not follow each other, as in [S, B, H, K]: packing them would copy all three tensors.
        rows = zip(*(x.unbind() for x in tensors), mask.row_runs, strict=True)
        return torch.stack([self._attend(q, k, v, runs, scale, mask.window) for q, k, v, runs in rows])

    def _attend(
        self,
        q_THK: Tensor,
        k_UGK: Tensor,
        v_UGK: Tensor,
        runs: tuple[Run, ...],
        scale: float,
        window: int | None,
    ) -> Tensor:
        assert self.kernel is not None
        outs, done = [], 0
        for run in runs:
            outs.append(q_THK.new_zeros(run.q0 - done, *q_THK.shape[1:]))  # padding
            q, k, v = _part(q_THK, run.q0, run.q1), _part(k_UGK, run.k0, run.k1), _part(v_UGK, run.k0, run.k1)
            outs.append(self.kernel(q, k, v, run, scale, window))
            done = run.q1
        outs.append(q_THK.new_zeros(len(q_THK) - done, *q_THK.shape[1:]))
        outs = [out for out in outs if len(out)]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _part(x_THK: Tensor, start: int, stop: int) -> Tensor:
    """A slice of tokens; all of them as they are, since the gradient of a slice is a copy."""
    return x_THK if (start, stop) == (0, len(x_THK)) else x_THK[start:stop]


def _window(window: int | None) -> tuple[int, int]:
    """(left, right) as FlashAttention counts them: keys before and after the query's own."""
    return (-1 if window is None else window - 1, 0)


def _load_torch(flash_impl: str | None = None) -> Kernel:
    """torch's varlen_attn, on torch's own kernel or on FA3 or FA4 for the whole process."""
    from torch.nn import attention
    from torch.nn.attention.varlen import varlen_attn

    if flash_impl is not None:
        attention.activate_flash_attention_impl(flash_impl)
    # Grouped heads were implied before torch asked for a word.
    asks = "enable_gqa" in signature(varlen_attn).parameters
    attend_packed: Callable[..., Any] = varlen_attn

    def kernel(q_THK, k_UGK, v_UGK, run: Run, scale: float, window: int | None) -> Tensor:
        grouped = {"enable_gqa": True} if asks and q_THK.shape[1] != k_UGK.shape[1] else {}
        return attend_packed(
            q_THK, k_UGK, v_UGK, run.cu_q_D, run.cu_k_D, run.max_q, run.max_k,
            scale=scale, window_size=_window(window), **grouped,
        )  # fmt: skip

    return kernel


def _load_flash_attn() -> Kernel:
    """The flash-attn package, version 2.1 or later (bottom-right causal)."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    def kernel(q_THK, k_UGK, v_UGK, run: Run, scale: float, window: int | None) -> Tensor:
        return flash_attn_varlen_func(
            q_THK, k_UGK, v_UGK, run.cu_q_D, run.cu_k_D, run.max_q, run.max_k,
            softmax_scale=scale, causal=True, window_size=_window(window),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    return kernel


LOADERS: dict[str, Callable[[], Kernel]] = {
    "fa4": partial(_load_torch, "FA4"),
    "fa3": partial(_load_torch, "FA3"),
    "flash_attn": _load_flash_attn,
    "torch": _load_torch,
}
