"""Causal attention of whole documents on a CPU by `causal_cpu.cpp`, which the machine's GCC compiles.

B batch rows, S tokens, H query heads, G key/value heads, K head dim.

`compile_kernel` turns the kernel on for the whole process, for one head dim. Runs that compile the model call
`compile_kernel`.
"""

import ctypes
import hashlib
import logging
import os
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from torchtitan_lite import durable
from torchtitan_lite.attention.operator import Work

# torch has the same default: torch._inductor.config.cpp.cxx.
CXX = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
"""The C++ compiler for torch's CPU kernels and for `causal_cpu.cpp`."""

_SOURCE = Path(__file__).with_name("causal_cpu.cpp")
# The library is not linked with OpenMP: the library uses the OpenMP that torch has loaded. A second OpenMP
# would start threads of its own.
_COMPILE = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-Wno-psabi")
_DTYPES = (torch.float32, torch.bfloat16)
_LOG = logging.getLogger(__name__)
_KERNELS: dict[int, ctypes.CDLL] = {}


def compile_kernel(head_dim: int) -> None:
    """Turn on the kernel for heads of `head_dim` features: compile the kernel, or load it from the cache.

    If the kernel cannot be compiled or loaded, a warning says so, and torch's kernel is used. Systems other
    than Linux always use torch's kernel.
    """
    if head_dim % 16 or head_dim > 256 or head_dim in _KERNELS or sys.platform != "linux":
        return
    try:
        _KERNELS[head_dim] = _loaded(head_dim)
    except subprocess.CalledProcessError as error:
        said = " / ".join(error.stderr.decode(errors="replace").strip().splitlines()[:3])
        why = f"{CXX} cannot compile the kernel: {said}; name another GCC in CXX"
        _LOG.warning("attention uses torch's kernel: %s", why)
    except OSError as error:
        why = f"the kernel cannot be made or loaded: {error}; name another folder in TORCHINDUCTOR_CACHE_DIR"
        _LOG.warning("attention uses torch's kernel: %s", why)


def forget_kernels() -> None:
    """Turn off the kernels that `compile_kernel` has turned on. Torch's kernel is used again."""
    _KERNELS.clear()


def has_amx() -> bool:
    """Return True if the CPU has AMX, units for bfloat16 matrix products, which only torch's kernel uses."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def takes(q_BSHK: Tensor) -> bool:
    """Return True if a compiled kernel computes queries of this device, dtype and head dim."""
    fits = q_BSHK.is_cpu and q_BSHK.dtype in _DTYPES and q_BSHK.shape[-1] in _KERNELS
    return fits and not (q_BSHK.dtype == torch.bfloat16 and has_amx())


def forward(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, work: Work) -> tuple[Tensor, Tensor]:
    """Return the output [B, S, H, K] and its log-sum-exp [B, S, H], which are 0 on padding."""
    out_BSHK = torch.zeros_like(q_BSHK)
    lse_BSH = torch.zeros(q_BSHK.shape[:3], dtype=torch.float32, device=q_BSHK.device)
    _call(work, False, lse_BSH, q=q_BSHK, k=k_BSGK, v=v_BSGK, out=out_BSHK)
    return out_BSHK, lse_BSH


def backward(
    dout_BSHK: Tensor, q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, out_BSHK: Tensor, lse_BSH: Tensor,
    work: Work,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v."""
    dq, dk, dv = (zeros_for(x, x.dtype) for x in (q_BSHK, k_BSGK, v_BSGK))
    tensors = {"q": q_BSHK, "k": k_BSGK, "v": v_BSGK, "out": out_BSHK, "dout": dout_BSHK}
    _call(work, True, lse_BSH, **tensors, dq=dq, dk=dk, dv=dv)
    return dq, dk, dv


def zeros_for(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros for the gradient of `x`, which are contiguous whatever the layout of `x`."""
    return torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _call(work: Work, is_backward: bool, lse: Tensor, **tensors: Tensor) -> None:
    q, k, table = tensors["q"], tensors["k"], work.table
    assert lse.is_contiguous() and table.is_contiguous() and all(x.stride(-1) == 1 for x in tensors.values())
    assert lse.dtype == torch.float32 and all(x.is_cpu and x.dtype == q.dtype for x in tensors.values())
    # These are the members of `Problem` in causal_cpu.cpp, in the same order.
    fields = []
    for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv"):
        fields += [tensors[name].data_ptr(), *tensors[name].stride()[:3]] if name in tensors else [0] * 4
    fields += [lse.data_ptr(), table.data_ptr(), *table.shape]
    fields += [q.shape[1], q.shape[2], k.shape[2], torch.get_num_threads()]
    problem = struct.pack(f"{len(fields)}qf", *fields, work.scale)
    _KERNELS[q.shape[-1]].attend(problem, int(q.dtype == torch.bfloat16), int(is_backward))


def _loaded(head_dim: int) -> ctypes.CDLL:
    """Load and return the library of the kernel. If the library in the cache is damaged, compile it again."""
    library = _built(head_dim)
    try:
        return ctypes.CDLL(str(library))
    except OSError:
        library.unlink(missing_ok=True)
        return ctypes.CDLL(str(_built(head_dim)))


def _built(head_dim: int) -> Path:
    """Return the path of the library. Compile it unless torch's cache (TORCHINDUCTOR_CACHE_DIR) has it."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    flags = [*_COMPILE, f"-DHEAD_DIM={head_dim}"]
    # The predefined macros tell the compiler's version and the processor's instruction sets.
    about = _run([CXX, *flags, "-dM", "-E", "-x", "c++", os.devnull])
    key = hashlib.sha256(_SOURCE.read_bytes() + about + repr(flags).encode()).hexdigest()[:16]
    library = Path(cache_dir()) / "torchtitan_lite" / f"causal-{head_dim}-{key}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            parts = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
            _run([CXX, *flags, "-c", str(_SOURCE), "-o", str(parts[0])])
            _run([CXX, "-shared", str(parts[0]), "-o", str(parts[1])])
            durable.publish(parts[1], library)  # other processes may publish the same library now
    return library


def _run(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout
