"""Attention over packed documents by a variable-length FlashAttention kernel, or a loop over documents.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, K head dim.
"""

import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import activate_flash_attention_impl

from torchtitan_lite.attention.capabilities import FLOATS, HALVES, INSTALL_FA4, Capabilities, Refusal
from torchtitan_lite.attention.mask import Ranges
from torchtitan_lite.attention.operator import Calls, attend
from torchtitan_lite.attention.packs import document_packs
from torchtitan_lite.attention.portable.tiles import document_tiles

FA4_BEFORE = 19
"""The first beta of flash-attn-4 that torch cannot use: the beta returns four results, torch expects two."""


def _fa4_lacks() -> str | None:
    """Return the reason why torch cannot use the installed flash-attn-4, or None if it can."""
    from torch.nn.attention import _fa4

    # `TorchFlash` passes causal attention as a window, which torch 2.11 does not translate for version 4.
    if not hasattr(_fa4, "_aten_to_fa4_window_size"):
        return "this torch's FlashAttention-4 takes no causal window"
    try:
        installed = version("flash-attn-4")
    except PackageNotFoundError:  # a build from source records no version
        return None
    beta = re.match(r"4\.0\.0b(\d+)", installed)
    if beta and int(beta[1]) < FA4_BEFORE:
        return None
    return f"this torch does not take what flash-attn-4 {installed} returns"


def _flash_attn_lacks() -> str | None:
    """Return the reason why `FlashAttnPackage` cannot use the installed flash-attn, or None if it can."""
    try:
        installed = version("flash-attn")
    except PackageNotFoundError:
        return None
    number = re.match(r"(\d+)\.(\d+)", installed)
    is_old = number and (int(number[1]), int(number[2])) < (2, 7)
    return f"flash-attn {installed} is older than 2.7" if is_old else None


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


KERNELS = {
    "fa4": _flash(
        "fa4",
        (9, 10),
        "flash_attn.cute",
        INSTALL_FA4,
        # flash_attn/cute/interface.py supports head dims up to 128, and 256.
        head_dims_lacking={10: range(129, 256)},
        also_missing=_fa4_lacks,
    ),
    "fa3": _flash("fa3", (9,), "flash_attn_interface", "FlashAttention-3 from the flash-attention sources"),
    "flash_attn": _flash(
        "flash_attn",
        (8, 9, 10, 12),
        "flash_attn.bert_padding",
        'pip install "flash-attn>=2.7"',
        also_missing=_flash_attn_lacks,
    ),
    "torch": _flash("torch", (8, 9, 10, 12)),
    "documents": Capabilities(name="varlen (documents)", devices=("cpu", "cuda"), dtypes=FLOATS),
}
"""The kernels by name, the best first. "auto" takes the first kernel that runs on this machine."""

ACTIVATED: dict[str, Literal["FA3", "FA4"]] = {"fa3": "FA3", "fa4": "FA4"}
"""The kernels that replace torch's FlashAttention for the whole process, with torch's names for them."""


@dataclass(frozen=True, kw_only=True)
class Varlen:
    """Variable-length FlashAttention: packed documents in one kernel call, or a loop over documents."""

    kind: Literal["varlen"] = "varlen"

    kernel: Literal["auto", "fa4", "fa3", "flash_attn", "torch", "documents"] = "auto"
    """Name of the kernel. auto takes the best that is installed and fits the GPU. documents is a loop."""

    supports: ClassVar[tuple[Capabilities, ...]] = tuple(KERNELS.values())

    def resolve(self, device: str) -> str:
        """Return the name of the kernel that runs on `device`, "cpu" or "cuda"."""
        if self.kernel != "auto":
            return self.kernel
        if device == "cpu":
            return "documents"
        if not torch.cuda.is_available():  # the config is for another machine
            return "torch"
        return next(name for name, can in KERNELS.items() if can.missing() is None)

    def implementation(self, device: str) -> Capabilities:
        return KERNELS[self.resolve(device)]

    def option_refusals(self, device: str) -> list[Refusal]:
        can = self.implementation(device)
        rule = can.unmet_here() if device == "cuda" else None
        if device not in can.devices:
            rule = f"needs a CUDA device with {can.needs}, and the device is {device}"
        choices = ("auto", "documents")
        return [Refusal("kernel", self.kernel, rule, 'use "auto" or "documents"', choices)] if rule else []

    def build(self) -> nn.Module:
        """Return the attention module. Raises ValueError if `kernel` is not "auto" and cannot run here."""
        if self.kernel != "auto" and (lack := KERNELS[self.kernel].missing()):
            needs = KERNELS[self.kernel].needs
            raise ValueError(f"Varlen(kernel={self.kernel!r}) needs {needs}: {lack}")
        return VarlenAttention()

    def mask(
        self,
        positions_BS: Tensor,
        queries: Ranges | None = None,
        sliding_window: int | None = None,
        device: torch.device | str | None = None,
    ) -> Calls:
        device = torch.device(positions_BS.device if device is None else device)
        kernel = _ready(self, device.type)
        if kernel == "documents":
            return document_tiles(positions_BS, queries, sliding_window, device)
        return document_packs(positions_BS, queries, sliding_window, device, kernel)


@cache
def _ready(config: Varlen, device: str) -> str:
    """Return the name of the evaluator for `device`. If its kernel replaces torch's, activate the kernel.

    `Varlen.mask` calls this function, because the device is not known earlier: a run on a CPU must not touch
    a GPU.
    """
    name = config.resolve(device)
    if name in ACTIVATED:
        activate_flash_attention_impl(ACTIVATED[name])
    return "torch" if name in ACTIVATED else name


class VarlenAttention(nn.Module):
    """Attention by the kernel calls in the mask, which compute packs of documents or tiles of documents."""

    def forward(
        self, q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: Calls, scale: float | None = None
    ) -> Tensor:
        return attend(q_BQHK, k_BSGK, v_BSGK, mask, scale)
