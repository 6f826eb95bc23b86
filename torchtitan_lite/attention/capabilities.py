"""The capabilities of each attention backend: data for the config check, the documentation and tests."""

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
    """The devices, dtypes and head dims that one implementation of a backend supports, and its needs."""

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dim_multiple: int = 1
    head_dim_max: int | None = None
    head_dims_lacking: Mapping[int, range] = dataclasses.field(default_factory=dict)
    """The unsupported head dims up to `head_dim_max`, by the GPU's major compute capability."""
    sliding_window: bool = True
    deterministic: bool = True
    """True if the gradients are the same from run to run in torch's deterministic mode."""
    packages: tuple[str, ...] = ()
    """The modules that must be importable."""
    gpu_majors: tuple[int, ...] = ()
    """The major compute capabilities that the implementation runs on. Empty means any."""
    install: str = ""
    """The instruction for installing `packages`, for messages."""
    also_missing: Callable[[], str | None] = lambda: None
    """A function that returns any other reason why the implementation cannot run on this machine, or None."""

    @property
    def needs(self) -> str:
        """The GPUs and packages that the implementation needs besides torch, in words."""
        gpus = " or ".join(f"{major}.x" for major in self.gpu_majors)
        parts = [f"compute capability {gpus}" * bool(gpus), self.install]
        return ", ".join(part for part in parts if part)

    def head_dim_rule(self, head_dim: int) -> str | None:
        """Return the rule that `head_dim` breaks, or None. The GPU's own limits count if there is one."""
        if head_dim % self.head_dim_multiple:
            return f"is no multiple of {self.head_dim_multiple}, which {self.name} attention needs"
        if self.head_dim_max is not None and head_dim > self.head_dim_max:
            return f"is more than {self.head_dim_max}, the most that {self.name} attention has"
        asks_gpu = bool(self.head_dims_lacking) and torch.cuda.is_available()
        major = torch.cuda.get_device_capability()[0] if asks_gpu else 0
        if head_dim in self.head_dims_lacking.get(major, ()):
            return f"is not for {self.name} attention on this GPU"
        return None

    def head_dims_near(self, head_dim: int) -> list[int]:
        """Return the even head dims next to `head_dim` that are supported: one below, then one above.

        Rotary embedding turns pairs, so an odd head dim is of no use.
        """
        most = head_dim + self.head_dim_multiple * 2 if self.head_dim_max is None else self.head_dim_max
        below, above = range(min(head_dim - 1, most), 0, -1), range(head_dim + 1, most + 1)
        found = (
            next((n for n in some if n % 2 == 0 and not self.head_dim_rule(n)), None)
            for some in (below, above)
        )
        return [n for n in found if n is not None]

    def missing(self) -> str | None:
        """Return the reason why this machine cannot run the implementation, or None if it can."""
        if "cuda" in self.devices and "cpu" not in self.devices and not torch.cuda.is_available():
            return "no CUDA device"
        major, minor = torch.cuda.get_device_capability() if self.gpu_majors else (0, 0)
        if self.gpu_majors and major not in self.gpu_majors:
            return f"this GPU's compute capability is {major}.{minor}"
        absent = [package for package in self.packages if not _importable(package)]
        return f"{', '.join(absent)} not installed" if absent else self.also_missing()

    def unmet_here(self) -> str | None:
        """Return what is missing, as the rule of a Refusal. None if nothing is missing or there is no GPU."""
        lack = self.missing() if torch.cuda.is_available() else None
        return lack and f"needs {self.needs}, and {lack}"


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package of the module is not installed
        return False


def table(rows: Iterable[Capabilities]) -> list[tuple[str, ...]]:
    """Return `rows` as a table of words below a header. In a row, every device supports every dtype."""
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
    """The reason why an attention config cannot run: a field and its value, the broken rule, the remedy.

    `field` is a field of the attention config or an argument of `refusals`: device, dtype, head_dim,
    n_heads, sliding_window or deterministic.
    """

    field: str
    value: object
    rule: str
    remedy: str
    choices: tuple[object, ...] = ()
    """Values of the field to try instead, the best first. Another rule may refuse some of them."""


@runtime_checkable
class AttentionConfig(Protocol):
    """The config of a model's attention: a frozen dataclass whose `kind` names the backend."""

    supports: ClassVar[tuple[Capabilities, ...]]
    """The capabilities of each implementation."""

    @property
    def kind(self) -> str: ...

    def implementation(self, device: str) -> Capabilities:
        """Return the capabilities of the implementation that runs on `device`, "cpu" or "cuda"."""
        ...

    def option_refusals(self, device: str) -> list[Refusal]:
        """Return a Refusal for each option that is wrong on `device`, "cpu" or "cuda"."""
        ...

    def build(self) -> nn.Module:
        """Return the module that computes attention from q, k, v, the mask and the scale."""
        ...

    def mask(
        self,
        positions_BS: Tensor,
        queries: Ranges | None = None,
        sliding_window: int | None = None,
        device: device | str | None = None,
    ) -> Any:
        """Return the mask of a micro-batch, for all layers: the keys that each query sees.

        docs/attention.md explains the arguments.
        """
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
    """Return every reason why attention of this shape cannot run with `config` on `device` ("cpu" or "cuda").

    Packages and the GPU are checked only if this machine has a CUDA device. If the implementation cannot run
    here at all, only that is reported: no other dtype or shape would help.
    """
    found = list(config.option_refusals(device))
    can = config.implementation(device)
    name, dtype_name = f"{can.name} attention", str(dtype).removeprefix("torch.")
    if device not in can.devices and not found:
        rule, remedy = f"does not run {name}", f"it needs {' or '.join(can.devices)}"
        choices = tuple(other for other in can.devices if other == "cpu")  # every machine has one
        return [Refusal("device", device, rule, remedy, choices)]
    if device not in can.devices or (found and device == "cuda" and can.unmet_here()):
        return found

    def refuse(field: str, value: object, rule: str, remedy: str, *choices: object) -> None:
        found.append(Refusal(field, value, rule, remedy, choices))

    if dtype_name not in can.dtypes:
        remedy = f"use {can.dtypes[0]}, or another attention"
        refuse("dtype", dtype_name, f"is not for {name} on {device}", remedy, *can.dtypes)
    if rule := can.head_dim_rule(head_dim):
        near = can.head_dims_near(head_dim)
        remedy = f"use {' or '.join([*map(str, near), 'another attention'])}"
        refuse("head_dim", head_dim, rule, remedy, *near)
    if n_heads % n_kv_heads:
        divisors = [n for n in range(1, n_heads + 1) if n_heads % n == 0]
        remedy = f"use {n_kv_heads * (n_heads // n_kv_heads or 1)} heads, or n_kv_heads out of {divisors}"
        refuse("n_heads", n_heads, f"is no multiple of n_kv_heads = {n_kv_heads}", remedy)
    if sliding_window is not None and not can.sliding_window:
        refuse("sliding_window", sliding_window, f"is not for {name}", "use another attention")
    if deterministic and not can.deterministic:
        refuse("deterministic", True, f"is not for {name}", "use another attention")
    return found
