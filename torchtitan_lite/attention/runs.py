"""Packed documents as runs: one call of a variable-length kernel for each, forward and backward.

B batch rows, S key tokens, Q query tokens, H query heads, G key/value heads, K head dim;
T = B * Q and U = B * S packed query and key tokens, D documents of a run, n runs.

A run is a stretch of documents whose queries and whose keys follow each other in memory. A batch without
padding is one run. Padding splits it, and so do queries that are only some chunks of the sequence.

One registered operator evaluates all runs, so torch.compile sees one node for any number and length of runs.
Autograd keeps q, k, v, the output and its log-sum-exp. `run_kernels.py` has the kernels.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from torchtitan_lite.attention.mask import (
    Ranges,
    check_inputs,
    check_window,
    of_any_length,
    query_ranges,
    segments,
)
from torchtitan_lite.attention.run_kernels import KERNELS, Documents
from torchtitan_lite.attention.strides import are_packed, laid_out_like, unit_stride
from torchtitan_lite.attention.tile_kernels import sum_dtype
from torchtitan_lite.attention.tiles import Tiles
from torchtitan_lite.attention.transfer import to_device

ALL_ROWS = -1
"""The `row` of a run of tokens of all rows, one row after the other."""


class Run(NamedTuple):
    """Queries [q0, q1) and keys [k0, k1) of `row`, or of all rows one after the other."""

    row: int
    q0: int
    q1: int
    k0: int
    k1: int
    first: int
    """Where in Runs.cumulative the query counts start; the key counts follow them."""
    n_documents: int
    max_q: int
    """No document has more queries."""
    max_k: int
    """No document has more keys."""


_NOTHING = Run(ALL_ROWS, 0, 0, 0, 0, 0, 0, 0, 0)
"""A run of no documents."""


@dataclass(frozen=True)
class Runs:
    """The runs of one micro-batch: the same for every layer, and nothing in them waits for a device."""

    table: Tensor
    """[n, 9] int64 on the CPU, a Run a row: first the runs over all batch rows, then those of each one."""
    cumulative: Tensor
    """[...] int32: cumulative counts of queries [D + 1], then of keys [D + 1], of one run after the other."""
    window: int | None
    """How many tokens of its document a query sees, itself included; None: all up to itself."""
    shape: tuple[int, int, int]
    """(B, Q, S) of the micro-batch."""
    kernel: str
    """Which of KERNELS computes them."""


def build_runs(
    positions_BS: Tensor,
    queries: Ranges | None = None,
    sliding_window: int | None = None,
    device: torch.device | str | None = None,
    kernel: str = "torch",
) -> Runs:
    """Build the runs: one for a batch without padding, one for each row and range if `queries` are given."""
    check_window(sliding_window)
    device = torch.device(device) if device is not None else positions_BS.device
    segments_N5 = segments(positions_BS.cpu(), queries)
    batch, seq_len = positions_BS.shape
    n_queries = sum(stop - start for start, stop in query_ranges(queries, seq_len))
    row_N, spans_N4 = segments_N5[:, 0], segments_N5[:, 1:]
    before_N4 = row_N[:, None] * torch.tensor([n_queries, n_queries, seq_len, seq_len])
    rows, counts = [], [torch.zeros(0, dtype=torch.int64)]
    # Runs of single rows are for tensors whose rows do not follow each other in memory.
    parts = [(ALL_ROWS, spans_N4 + before_N4)]
    parts += [(row, spans_N4[row_N == row]) for row in range(batch) if batch > 1]
    for row, spans in parts:
        for part in _cut(spans):
            first = sum(len(count) for count in counts)
            run, cumulative = _run(row, part, first)
            rows.append(run)
            counts += cumulative
    # torch.compile would make a constant of a length of 0 or 1.
    rows += [_NOTHING] * max(0, 2 - len(rows))
    counts.append(torch.zeros(2, dtype=torch.int64))
    table, flat = torch.tensor(rows, dtype=torch.int64), torch.cat(counts).int()
    cumulative = of_any_length(to_device(flat, device))
    shape = batch, n_queries, seq_len
    return Runs(of_any_length(table), cumulative, sliding_window, shape, kernel)


def _cut(spans_N4: Tensor) -> list[Tensor]:
    """Documents (q0, q1, k0, k1), in order, cut wherever the next one's queries or keys do not follow."""
    breaks = (spans_N4[1:, 0] != spans_N4[:-1, 1]) | (spans_N4[1:, 2] != spans_N4[:-1, 3])
    edges = [0, *(breaks.nonzero().flatten() + 1).tolist(), len(spans_N4)]
    return [spans_N4[start:stop] for start, stop in pairwise(edges) if start < stop]


def _run(row: int, spans_D4: Tensor, first: int) -> tuple[Run, list[Tensor]]:
    """A run, and the cumulative counts of its queries and of its keys."""
    (q0, k0), (q1, k1) = spans_D4[0, [0, 2]].tolist(), spans_D4[-1, [1, 3]].tolist()
    counts = [torch.cat([spans_D4[:1, 0], spans_D4[:, 1]]) - q0]
    counts.append(torch.cat([spans_D4[:1, 2], spans_D4[:, 3]]) - k0)
    max_q, max_k = (int(count.diff().max()) for count in counts)
    return Run(row, q0, q1, k0, k1, first, len(spans_D4), max_q, max_k), counts


@dataclass(frozen=True)
class PackedMask:
    """Packed documents for whichever kernel there is: a plan of tiles, runs, or both."""

    tiles: Tiles | None
    runs: Runs | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, Q, S) of the micro-batch."""
        plan = self.tiles or self.runs
        assert plan is not None
        return plan.shape


class _Call(NamedTuple):
    """One run, ready for a kernel."""

    run: Run
    documents: Documents

    def q(self, x_BQHK: Tensor) -> Tensor:
        """The queries' part of q, of the output or of a gradient of one of them."""
        return _tokens(x_BQHK, self.run.row)[self.run.q0 : self.run.q1]

    def k(self, x_BSGK: Tensor) -> Tensor:
        """The keys' part of k, of v or of a gradient of one of them."""
        return _tokens(x_BSGK, self.run.row)[self.run.k0 : self.run.k1]

    def lse(self, lse_HT: Tensor, n_queries: int) -> Tensor:
        """The queries' part of the log-sum-exp."""
        before = max(self.run.row, 0) * n_queries
        return lse_HT[:, before + self.run.q0 : before + self.run.q1]


def _tokens(x_BSHK: Tensor, row: int) -> Tensor:
    return x_BSHK.view(-1, *x_BSHK.shape[2:]) if row == ALL_ROWS else x_BSHK[row]


def _calls(table: Tensor, cumulative: Tensor, *tensors: Tensor) -> list[_Call]:
    """The kernel calls: one for each run over all rows.

    If the rows of a tensor do not follow each other in memory, one for each run of each row: to pack such
    rows would copy the tensor.
    """
    packed = all(are_packed(x) for x in tensors)
    calls = []
    for fields in table.tolist():
        run = Run(*fields)
        if run.n_documents and (run.row == ALL_ROWS) == packed:
            cu_q_D, cu_k_D = cumulative[run.first :][: 2 * (run.n_documents + 1)].chunk(2)
            calls.append(_Call(run, Documents(cu_q_D, cu_k_D, run.max_q, run.max_k)))
    return calls


def _is_whole(calls: list[_Call], q_BQHK: Tensor, k_BSGK: Tensor) -> bool:
    """True if one call has all queries and all keys, so that its results are those of all tokens."""
    whole = (ALL_ROWS, 0, q_BQHK.shape[:2].numel(), 0, k_BSGK.shape[:2].numel())
    return len(calls) == 1 and calls[0].run[:5] == whole


def _attend_runs(
    q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, table: Tensor, cumulative: Tensor,
    scale: float, window: int | None, kernel: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention by runs: the output [B, Q, H, K] and its log-sum-exp [H, T]; padding rows are zeros.

    The output has the layout of the queries.
    """
    out_BQHK, lse_HT = _evaluate(q_BQHK, k_BSGK, v_BSGK, table, cumulative, scale, window, kernel)
    return laid_out_like(q_BQHK, out_BQHK), lse_HT


def _evaluate(
    q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, table: Tensor, cumulative: Tensor,
    scale: float, window: int | None, kernel: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    forward = KERNELS[kernel].forward
    q_BQHK, k_BSGK, v_BSGK = (unit_stride(x) for x in (q_BQHK, k_BSGK, v_BSGK))
    calls = _calls(table, cumulative, q_BQHK, k_BSGK, v_BSGK)
    if _is_whole(calls, q_BQHK, k_BSGK):
        (call,) = calls
        out_THK, lse_HT = forward(
            call.q(q_BQHK), call.k(k_BSGK), call.k(v_BSGK), call.documents, scale, window
        )
        return out_THK.unflatten(0, q_BQHK.shape[:2]), lse_HT
    out_BQHK = torch.zeros_like(q_BQHK)
    batch, n_queries, heads = q_BQHK.shape[:3]
    lse_HT = q_BQHK.new_zeros(heads, batch * n_queries, dtype=sum_dtype(q_BQHK.dtype))
    for call in calls:
        out, lse = forward(call.q(q_BQHK), call.k(k_BSGK), call.k(v_BSGK), call.documents, scale, window)
        call.q(out_BQHK).copy_(out)
        call.lse(lse_HT, n_queries).copy_(lse)
    return out_BQHK, lse_HT


attend_runs = torch.library.custom_op("torchtitan_lite::attend_runs", _attend_runs, mutates_args=())


@attend_runs.register_fake
def _(q_BQHK, k_BSGK, v_BSGK, table, cumulative, scale, window, kernel):
    batch, n_queries, heads = q_BQHK.shape[:3]
    lse_HT = q_BQHK.new_empty(heads, batch * n_queries, dtype=sum_dtype(q_BQHK.dtype))
    return torch.empty_like(q_BQHK), lse_HT


@torch.library.custom_op("torchtitan_lite::attend_runs_backward", mutates_args=())
def attend_runs_backward(
    dout_BQHK: Tensor, q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, out_BQHK: Tensor, lse_HT: Tensor,
    table: Tensor, cumulative: Tensor, scale: float, window: int | None, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `attend_runs`, contiguous whatever the layouts of q, k and v."""
    backward = KERNELS[kernel].backward
    given = dout_BQHK, q_BQHK, k_BSGK, v_BSGK, out_BQHK
    dout_BQHK, q_BQHK, k_BSGK, v_BSGK, out_BQHK = (unit_stride(x) for x in given)
    calls = _calls(table, cumulative, q_BQHK, k_BSGK, v_BSGK, dout_BQHK, out_BQHK)
    gradients = []
    for call in calls:
        q, k, v = call.q(q_BQHK), call.k(k_BSGK), call.k(v_BSGK)
        dout, out, lse = call.q(dout_BQHK), call.q(out_BQHK), call.lse(lse_HT, q_BQHK.shape[1])
        gradients.append(backward(dout, q, k, v, out, lse.contiguous(), call.documents, scale, window))
    return _put_together(calls, gradients, q_BQHK, k_BSGK, v_BSGK)


def _put_together(
    calls: list[_Call],
    gradients: list[tuple[Tensor, Tensor, Tensor]],
    q_BQHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of all tokens, from those of each run; a key that runs share gets their sum.

    The sum is made in the dtype of the keys: under context parallel at most two runs share a key.
    """
    if _is_whole(calls, q_BQHK, k_BSGK):
        (found,) = gradients
        dq, dk, dv = (
            part.contiguous().view(x.shape) for part, x in zip(found, (q_BQHK, k_BSGK, v_BSGK), strict=True)
        )
        return dq, dk, dv
    dq_BQHK, dk_BSGK, dv_BSGK = (x.new_zeros(x.shape) for x in (q_BQHK, k_BSGK, v_BSGK))
    for call, (dq, dk, dv) in zip(calls, gradients, strict=True):
        call.q(dq_BQHK).copy_(dq)
        call.k(dk_BSGK).add_(dk)
        call.k(dv_BSGK).add_(dv)
    return dq_BQHK, dk_BSGK, dv_BSGK


@attend_runs_backward.register_fake
def _(dout_BQHK, q_BQHK, k_BSGK, v_BSGK, out_BQHK, lse_HT, table, cumulative, scale, window, kernel):
    dq, dk, dv = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_BQHK, k_BSGK, v_BSGK)
    )
    return dq, dk, dv


def _save(ctx, inputs, output) -> None:
    q_BQHK, k_BSGK, v_BSGK, table, cumulative, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # the log-sum-exp has no gradient: make no zeros for it
    ctx.save_for_backward(q_BQHK, k_BSGK, v_BSGK, *output)
    ctx.runs = table, cumulative  # all layers share these: not counted as kept by each


def _backward(ctx, dout_BQHK, dlse_HT):
    if dout_BQHK is None:
        return (None,) * 8
    grads = attend_runs_backward(dout_BQHK, *ctx.saved_tensors, *ctx.runs, *ctx.options)
    return *grads, None, None, None, None, None


attend_runs.register_autograd(_backward, setup_context=_save)


def attend_packed(q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, runs: Runs, scale: float | None) -> Tensor:
    """Attention by runs, [B, Q, H, K]; the scale defaults to 1 / sqrt(K)."""
    scale = check_inputs(q_BQHK, k_BSGK, v_BSGK, runs.shape, scale)
    # Autograd, torch.compile and recompute need the operator. Inference does without its overhead.
    is_plain = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    act = _attend_runs if is_plain else attend_runs
    return act(q_BQHK, k_BSGK, v_BSGK, runs.table, runs.cumulative, scale, runs.window, runs.kernel)[0]
