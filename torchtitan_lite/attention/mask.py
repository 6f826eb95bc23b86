"""The keys that each query sees, from the positions of tokens: documents, causality and sliding windows.

B batch rows, S key tokens, Q query tokens (Q <= S), N segments.

Every query sees one interval of the keys of its own row: from the first token of its document (or of its
window) up to its own token. The backends differ only in how they evaluate these intervals.
"""

import torch
from torch import Tensor

SEQ_DIM = 1
"""The sequence axis of q, k, v and the output, which have the shape [B, S, H, K]."""

PADDING = -1
"""The position of a padding token."""

Ranges = tuple[tuple[int, int], ...]
"""The type of half-open ranges of key tokens, such as ((0, 64), (448, 512))."""


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Return `x` on `device`. A copy to a GPU is made from pinned memory, so that the host does not wait.

    From pageable memory CUDA first copies to a buffer of its own, and the host waits for that first copy:
    https://docs.nvidia.com/cuda/cuda-driver-api/api-sync-behavior.html
    """
    device = torch.device(device)
    if x.is_cpu and device.type == "cuda":
        # `x` is made contiguous first: of a tensor that is not contiguous, torch makes an unpinned copy.
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=True)


def query_ranges(queries: Ranges | None, seq_len: int) -> Ranges:
    """Return the ranges in `queries` that are not empty, in the same order. None stands for all tokens.

    Raises ValueError if a range is outside the sequence, or if ranges overlap.
    """
    if queries is None:
        return ((0, seq_len),)
    ranges = tuple((int(start), int(stop)) for start, stop in queries if start != stop)
    for start, stop in ranges:
        if not 0 <= start < stop <= seq_len:
            raise ValueError(f"queries {(start, stop)} are no range of the {seq_len} key tokens")
    for (_, stop), (start, _) in zip(sorted(ranges), sorted(ranges)[1:], strict=False):
        if start < stop:
            raise ValueError(f"queries {queries} overlap")
    return ranges


def count_queries(queries: Ranges | None, seq_len: int) -> int:
    """Return the number of tokens in `queries`. None stands for all tokens."""
    return sum(stop - start for start, stop in query_ranges(queries, seq_len))


def check_window(sliding_window: int | None) -> None:
    """Raise ValueError if `sliding_window` is below 1: a query must see itself."""
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window {sliding_window} must be at least 1: a query sees itself")


def check_positions(positions_BS: Tensor) -> None:
    """Raise ValueError unless each row is documents that count from 0, with padding only before and after."""
    if positions_BS.ndim != 2 or positions_BS.dtype != torch.int64:
        raise ValueError(
            f"positions must be int64 of shape [B, S], not {positions_BS.dtype} {list(positions_BS.shape)}"
        )
    before = torch.nn.functional.pad(positions_BS, (1, 0), value=PADDING)[:, :-1]
    starts_or_follows = (positions_BS == 0) | ((positions_BS == before + 1) & (before != PADDING))
    pads = positions_BS == PADDING
    if not bool((starts_or_follows | pads).all()):
        raise ValueError(
            "positions must start at 0, go up by 1 within a document, and be -1 on padding; a row that "
            "starts in the middle of a document starts at 0 too"
        )
    real = (~pads).int()
    between = pads & (real.cumsum(1) > 0) & (real.flip(1).cumsum(1).flip(1) > 0)
    if bool(between.any()):
        raise ValueError("padding may only stand before or after a row's tokens, not between them")


def check_inputs(
    q_BQHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, shape: tuple[int, int, int], scale: float | None
) -> float:
    """Check that the tensors fit each other and a mask of the sizes (B, Q, S), and return the scale.

    The scale is 1 / sqrt(K) by default. Raises ValueError if the tensors do not fit, or if the scale is not
    positive: some kernels would return NaN.
    """
    batch, n_queries, seq_len = shape
    q, k, v = tuple(q_BQHK.shape), tuple(k_BSGK.shape), tuple(v_BSGK.shape)
    if q[:2] != (batch, n_queries) or k[:2] != (batch, seq_len) or k != v or len(q) != 4 or q[3] != k[3]:
        raise ValueError(
            f"q {list(q)}, k {list(k)}, v {list(v)} must be [B, Q, H, K], [B, S, G, K], [B, S, G, K] with "
            f"the mask's B = {batch}, Q = {n_queries}, S = {seq_len}"
        )
    kinds = [f"{x.dtype} on {x.device}" for x in (q_BQHK, k_BSGK, v_BSGK)]
    if len(set(kinds)) > 1:
        raise ValueError(f"q, k and v must be of one dtype and on one device, not {', '.join(kinds)}")
    if q[2] % k[2]:
        raise ValueError(f"{q[2]} query heads are no multiple of {k[2]} key/value heads")
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"scale {scale} must be positive")
    return q[3] ** -0.5 if scale is None else scale


def segments(positions_BS: Tensor, queries: Ranges | None = None) -> Tensor:
    """Cut the queries where documents begin. Return sorted int64 rows (row, q0, q1, k0, k1), [N, 5].

    The queries [q0, q1) of `row` see the keys [k0, k1) causally, aligned at the bottom right: the last query
    sees all of these keys. q0 and q1 are indices of queries, k0 and k1 are indices of keys. `positions_BS`
    must be on the CPU.
    """
    check_positions(positions_BS)
    seq_len = positions_BS.shape[1]
    real = positions_BS != PADDING
    row, start = (positions_BS == 0).nonzero(as_tuple=True)
    goes_on = torch.nn.functional.pad(positions_BS, (0, 1), value=PADDING)[:, 1:] > 0
    stop = (real & ~goes_on).nonzero(as_tuple=True)[1] + 1

    pieces, offset = [], 0
    for first, last in query_ranges(queries, seq_len):
        q0, q1 = start.clamp(min=first), stop.clamp(max=last)
        piece = torch.stack([row, q0 - first + offset, q1 - first + offset, start, q1], dim=1)
        pieces.append(piece[q0 < q1])
        offset += last - first
    found_N5 = torch.cat(pieces) if pieces else torch.empty(0, 5, dtype=torch.int64)
    return found_N5[(found_N5[:, 0] * (offset + 1) + found_N5[:, 1]).argsort()]


def intervals(
    positions_BS: Tensor, queries: Ranges | None = None, sliding_window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the first and the last key that each query sees: first_BQ and last_Q.

    Padding queries have first = S, so that they see no key. Nothing is read back from the device.
    """
    check_window(sliding_window)
    seq_len = positions_BS.shape[1]
    index_S = torch.arange(seq_len, device=positions_BS.device)
    first_BS = index_S - positions_BS
    if sliding_window is not None:
        first_BS = torch.maximum(first_BS, index_S - (sliding_window - 1))
    first_BS = first_BS.masked_fill(positions_BS == PADDING, seq_len)
    ranges = query_ranges(queries, seq_len)
    if ranges == ((0, seq_len),):
        return first_BS, index_S
    last_Q = torch.cat([index_S[:0], *(index_S[start:stop] for start, stop in ranges)])
    return first_BS[:, last_Q], last_Q


def explicit_mask(
    positions_BS: Tensor, queries: Ranges | None = None, sliding_window: int | None = None
) -> Tensor:
    """Return the mask [B, Q, S], True where a query sees a key, for the reference. Its size is quadratic."""
    first_BQ, last_Q = intervals(positions_BS, queries, sliding_window)
    key_S = torch.arange(positions_BS.shape[1], device=positions_BS.device)
    return (key_S >= first_BQ[..., None]) & (key_S <= last_Q[:, None])


def positions_from_cu_seqlens(cu_seqlens: Tensor) -> Tensor:
    """Return the positions [1, T] of T packed tokens, given the cumulative lengths [N + 1] of documents."""
    cu = cu_seqlens.to(torch.int64)
    token_T = torch.arange(int(cu[-1]), device=cu.device)
    return (token_T - cu[torch.searchsorted(cu, token_T, right=True) - 1])[None]
