"""Attention as one torch operator, which makes the kernel calls that a table lists.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, K head dim.

torch.compile, autograd and recomputation see one node. `portable/tiles.py` and `packs.py` make the tables.
torch.compile does not see the contents of a table, so a batch with other documents needs no new compilation.
Autograd keeps q, k, v, the output and its log-sum-exp.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from torchtitan_lite.attention.mask import check_inputs, to_device

HALF = (torch.bfloat16, torch.float16)


class Kernel(Protocol):
    """An attention kernel with its backward. `how` holds the scale and the kernel's other arguments."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, how: Any) -> tuple[Tensor, Tensor]:
        """Return the output and its log-sum-exp."""
        ...

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, how: Any
    ) -> tuple[Tensor, ...]:
        """Return the gradients of q, k and v."""
        ...


class Work(NamedTuple):
    """The calls that an evaluator makes, and the scale. `Calls` explains the other fields."""

    table: Tensor
    data: Tensor
    window: int | None
    scale: float


class Evaluator(Kernel, Protocol):
    """A kernel that computes whole tables of one kind. `how` is a Work. The output is 0 on padding.

    All tensors passed in have stride 1 in their last dim. The log-sum-exp and the gradients are contiguous.
    """

    def lse_shape(self, q_BQHK: Tensor) -> tuple[int, ...]:
        """Return the shape of the log-sum-exp that `forward` returns."""
        ...


EVALUATORS: dict[str, Evaluator] = {}
"""The evaluators by name. Each module that makes tables adds its evaluator."""


@dataclass(frozen=True)
class Calls:
    """The kernel calls of one micro-batch, for all layers. Reading the calls does not wait for a GPU."""

    evaluator: str
    """The name of the evaluator in EVALUATORS."""
    table: Tensor
    """The calls, one for each row: [n, ...] int64 on the CPU."""
    data: Tensor
    """The data of the calls, on the device: the explicit mask of a tile, or cumulative lengths of packs."""
    shape: tuple[int, int, int]
    """The sizes (B, Q, S) of the micro-batch."""
    window: int | None = None
    """The number of tokens that a query sees, itself included. None if the evaluator needs no window."""


def make_calls(
    evaluator: str,
    rows: Sequence[Sequence[int]],
    data: Tensor,
    shape: tuple[int, int, int],
    device: torch.device | str,
    window: int | None = None,
) -> Calls:
    """Return Calls with a table of `rows`, one for each call, and with the 1-D `data` on `device`.

    A row of zeros is a call without tokens, which evaluators skip.
    """
    # Every length is padded to at least 2: torch.compile would treat a length of 0 or 1 as a constant.
    table = torch.tensor([*rows, *[[0] * len(rows[0])] * (2 - len(rows))], dtype=torch.int64)
    data = to_device(torch.nn.functional.pad(data, (0, 2)), device)
    return Calls(evaluator, _of_any_length(table), _of_any_length(data), shape, window)


def _of_any_length(x: Tensor) -> Tensor:
    """Return `x`, marked so that torch.compile treats its length as variable."""
    dynamo = sys.modules.get("torch._dynamo")  # if dynamo is not loaded, nothing is compiled
    if dynamo is not None:
        dynamo.maybe_mark_dynamic(x, 0)
    return x


def attend(q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, calls: Calls, scale: float | None) -> Tensor:
    """Return the attention that `calls` compute, [B, Q, H, K]. The scale defaults to 1 / sqrt(K)."""
    scale = check_inputs(q_BQHK, k_BSGK, v_BSGK, calls.shape, scale)
    # Autograd, torch.compile and recomputation need the operator. Inference avoids the operator's overhead.
    is_plain = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    act = _forward if is_plain else forward
    return act(q_BQHK, k_BSGK, v_BSGK, calls.evaluator, calls.table, calls.data, calls.window, scale)[0]


def _forward(
    q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor,
    evaluator: str, table: Tensor, data: Tensor, window: int | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output, in the memory layout of the queries, and its log-sum-exp."""
    q, k, v = (_unit_stride(x) for x in (q_BQHK, k_BSGK, v_BSGK))
    out_BQHK, lse = EVALUATORS[evaluator].forward(q, k, v, Work(table, data, window, scale))
    layout = torch.empty_like(q_BQHK, device="meta").stride()  # the fake below promises this layout
    return out_BQHK if out_BQHK.stride() == layout else torch.empty_like(q_BQHK).copy_(out_BQHK), lse


forward = torch.library.custom_op("torchtitan_lite::attend", _forward, mutates_args=())


@forward.register_fake
def _(q_BQHK, k_BSGK, v_BSGK, evaluator, *work):
    lse_shape = EVALUATORS[evaluator].lse_shape(q_BQHK)
    return torch.empty_like(q_BQHK), q_BQHK.new_empty(lse_shape, dtype=sum_dtype(q_BQHK.dtype))


@torch.library.custom_op("torchtitan_lite::attend_backward", mutates_args=())
def backward(
    dout_BQHK: Tensor, q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, out_BQHK: Tensor, lse: Tensor,
    evaluator: str, table: Tensor, data: Tensor, window: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, which are contiguous whatever the layouts of q, k and v."""
    dout, q, k, v, out = (_unit_stride(x) for x in (dout_BQHK, q_BQHK, k_BSGK, v_BSGK, out_BQHK))
    work = Work(table, data, window, scale)
    dq_BQHK, dk_BSGK, dv_BSGK = EVALUATORS[evaluator].backward(dout, q, k, v, out, lse, work)
    return dq_BQHK, dk_BSGK, dv_BSGK


@backward.register_fake
def _(dout_BQHK, q_BQHK, k_BSGK, v_BSGK, *_):
    dq, dk, dv = (contiguous_like(x) for x in (q_BQHK, k_BSGK, v_BSGK))
    return dq, dk, dv


def _save(ctx, inputs, output) -> None:
    q_BQHK, k_BSGK, v_BSGK, *ctx.calls = inputs  # all layers share the calls: no layer counts them as saved
    ctx.set_materialize_grads(False)  # the log-sum-exp has no gradient: make no zeros for it
    ctx.save_for_backward(q_BQHK, k_BSGK, v_BSGK, *output)


def _backward(ctx, dout_BQHK, dlse):
    if dout_BQHK is None:
        return (None,) * 8
    return *backward(dout_BQHK, *ctx.saved_tensors, *ctx.calls), *[None] * 5


forward.register_autograd(_backward, setup_context=_save)


def _unit_stride(x: Tensor) -> Tensor:
    """Return `x` with stride 1 in its last dim, copied if necessary. The kernels do not check the stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def contiguous_like(x: Tensor) -> Tensor:
    """Return an uninitialized contiguous tensor of the shape of `x`, for the gradient of `x`."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums over tokens: float32 for half precision, else `dtype` itself."""
    return torch.float32 if dtype in HALF else dtype
