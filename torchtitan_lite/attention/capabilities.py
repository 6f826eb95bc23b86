"""The capabilities of every attention: data for the validator, the documentation and the tests."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, device, nn

from torchtitan_lite.attention.mask import Ranges

FLOATS = ("float64", "float32", "bfloat16", "float16")
HALVES = ("bfloat16", "float16")
INSTALL_FA4 = 'pip install "flash-attn-4>=4.0.0b4,<4.0.0b19"'


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """One implementation of an attention backend: what it supports, and what it needs."""

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dim_multiple: int = 1
    head_dim_max: int | None = None
    head_dims_lacking: Mapping[int, range] = dataclasses.field(default_factory=dict)
    """Head dims up to `head_dim_max` that are not supported, by the GPU's major compute capability."""
    sliding_window: bool = True
    deterministic: bool = True
    """Whether its gradients are the same from run to run in torch's deterministic mode."""
    packages: tuple[str, ...] = ()
    """Modules that must be importable."""
    gpu_majors: tuple[int, ...] = ()
    """Major compute capabilities that it runs on; empty: any."""
    install: str = ""
    """How to get the packages."""
    also_missing: Callable[[], str | None] = lambda: None
    """Any other reason why the implementation cannot run here, in words."""

    @property
    def needs(self) -> str:
        """The needs of the implementation besides torch, in words."""
        gpus = " or ".join(f"{major}.x" for major in self.gpu_majors)
        parts = [f"compute capability {gpus}" * bool(gpus), self.install]
        return ", ".join(part for part in parts if part)

    def missing(self) -> str | None:
        """The needs that this machine or its GPU does not meet, in words; None if it meets all."""
        if "cuda" in self.devices and "cpu" not in self.devices and not torch.cuda.is_available():
            return "no CUDA device"
        major, minor = torch.cuda.get_device_capability() if self.gpu_majors else (0, 0)
        if self.gpu_majors and major not in self.gpu_majors:
            return f"this GPU's compute capability is {major}.{minor}"
        absent = [package for package in self.packages if not _importable(package)]
        return f"{', '.join(absent)} not installed" if absent else self.also_missing()

    def unmet_here(self) -> str | None:
        """The unmet need, as the rule of a Refusal; None if all are met, or if there is no GPU to check."""
        lack = self.missing() if torch.cuda.is_available() else None
        return lack and f"needs {self.needs}, and {lack}"


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is not there
        return False


def table(rows: Iterable[Capabilities]) -> list[tuple[str, ...]]:
    """The capabilities in words: a header, then one row each. Every device runs every dtype of its row."""
    lines = [("attention", "devices", "dtypes", "head_dim", "window", "deterministic", "needs besides torch")]
    for can in rows:
        head_dim = f"multiple of {can.head_dim_multiple}, " * (can.head_dim_multiple > 1)
        head_dim += "any" if can.head_dim_max is None else f"up to {can.head_dim_max}"
        for major, lacking in can.head_dims_lacking.items():
            head_dim += f" (on {major}.x up to {lacking[0] - 1}, or {lacking[-1] + 1})"
        window, deterministic = ("yes" if able else "no" for able in (can.sliding_window, can.deterministic))
        devices, dtypes = ", ".join(can.devices), ", ".join(can.dtypes)
        lines.append((can.name, devices, dtypes, head_dim, window, deterministic, can.needs or "nothing"))
    return lines


class Refusal(NamedTuple):
    """Why a config cannot run here.

    `field` is a field of the attention config or an argument of `refusals`: device, dtype, head_dim,
    n_heads, sliding_window or deterministic.
    """

    field: str
    value: object
    rule: str
    remedy: str


@runtime_checkable
class AttentionConfig(Protocol):
    """The attention of a model: a frozen dataclass with a `kind` of its own."""

    supports: ClassVar[tuple[Capabilities, ...]]
    """The capabilities of each implementation."""

    @property
    def kind(self) -> str: ...

    def implementation(self, device: str) -> Capabilities:
        """The implementation that runs on "cpu" or "cuda"."""
        ...

    def option_refusals(self, device: str) -> list[Refusal]:
        """The options that are wrong on "cpu" or "cuda"."""
        ...

    def build(self) -> nn.Module:
        """The inner attention."""
        ...

    def mask(
        self,
        positions_BS: Tensor,
        queries: Ranges | None = None,
        sliding_window: int | None = None,
        device: device | str | None = None,
    ) -> Any:
        """The mask of a micro-batch: which keys each query sees, in all layers; see docs/attention.md."""
        ...


def refusals(
    config: AttentionConfig,
    *,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    n_heads: int,
    n_kv_heads: int,
    sliding_window: int | None = None,
    deterministic: bool = False,
) -> list[Refusal]:
    """All reasons why attention of this shape cannot run with `config` on `device` ("cpu" or "cuda").

    Packages and the GPU itself are checked only if there is a CUDA device here.
    """
    found = list(config.option_refusals(device))
    can = config.implementation(device)
    name, dtype_name = f"{can.name} attention", str(dtype).removeprefix("torch.")

    def refuse(is_wrong: object, field: str, value: object, rule: str, remedy: str) -> None:
        if is_wrong:
            found.append(Refusal(field, value, rule, remedy))

    # If an option is the reason, the option has been refused already.
    is_elsewhere = device not in can.devices and not found
    refuse(is_elsewhere, "device", device, f"does not run {name}", f"it needs {' or '.join(can.devices)}")
    remedy = f"use {can.dtypes[0]}, or another attention"
    refuse(dtype_name not in can.dtypes, "dtype", dtype_name, f"is not for {name} on {device}", remedy)
    rule = f"is no multiple of {can.head_dim_multiple}, which {name} needs"
    refuse(head_dim % can.head_dim_multiple, "head_dim", head_dim, rule, "use sdpa, or another head_dim")
    rule = f"is more than {can.head_dim_max}, the most that {name} has"
    is_above = can.head_dim_max is not None and head_dim > can.head_dim_max
    refuse(is_above, "head_dim", head_dim, rule, "use sdpa, or a smaller head_dim")
    rule, remedy = f"is not for {name} on this GPU", "use another kernel, sdpa, or another head_dim"
    asks_gpu = bool(can.head_dims_lacking) and torch.cuda.is_available()
    major = torch.cuda.get_device_capability()[0] if asks_gpu else 0
    refuse(head_dim in can.head_dims_lacking.get(major, ()), "head_dim", head_dim, rule, remedy)
    divisors = [n for n in range(1, n_heads + 1) if n_heads % n == 0]
    remedy = f"use {n_kv_heads * (n_heads // n_kv_heads or 1)} heads, or n_kv_heads out of {divisors}"
    refuse(n_heads % n_kv_heads, "n_heads", n_heads, f"is no multiple of n_kv_heads = {n_kv_heads}", remedy)
    is_windowed = sliding_window is not None and not can.sliding_window
    refuse(is_windowed, "sliding_window", sliding_window, f"is not for {name}", "use sdpa")
    refuse(deterministic and not can.deterministic, "deterministic", True, f"is not for {name}", "use sdpa")
    return found
