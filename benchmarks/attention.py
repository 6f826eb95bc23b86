"""Compares each attention backend with the kernel alone, forward and backward, and measures costs of copies.

    benchmarks/attention.py --seq 512 2048 --heads 8/4 8/8 --dtype bf16 --compiled-kernel --json

Runs the attention of one layer, on rows of one document (single) or of many documents (packed). The raw way
calls the kernel alone, on tensors in the kernel's own layout: F.scaled_dot_product_attention, in a loop over
packed documents. On CUDA, torch's varlen_attn takes packed documents, and flex is compared with a compiled
flex_attention. "keys repeated" gives sdpa a key for each query head. "layout copied" copies q, k, v and the
output to [B, H, S, K] and back.

The ways take turns. Times are medians; times_of_raw is the median of the ratios within a round. TFLOP/s
counts 4 H K n (n + 1) / 2 for a document of n tokens, and 2.5 times that for the backward. mib is the memory
that one forward and backward allocate: on a CPU the sum over all operators, on CUDA the peak. copies and cats
count calls of aten's operators (copies: of q, k, v, the output and their gradients); compiled kernels make
none. own_kernel is True for our kernel for CPUs, False for torch's.
B rows, S tokens, H query heads, G key/value heads, K head dim.
"""

import json
import os
import statistics
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from inspect import signature
from itertools import pairwise
from time import perf_counter
from typing import Any, NamedTuple, cast

import torch
from loss import DTYPES, table
from synthetic import lengths_between
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from torchtitan_lite.attention import Flex, Sdpa, Varlen, positions_from_cu_seqlens, refusals
from torchtitan_lite.attention.portable.native import compile_kernel
from torchtitan_lite.attention.portable.tiles import is_native

BACKENDS: dict[str, Any] = {"sdpa": Sdpa(), "flex": Flex(), "varlen": Varlen()}
BACKENDS["flex_flash"] = Flex(kernel_options={"BACKEND": "FLASH"})


def main() -> None:
    args = parse()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints a line at each start
    if args.compiled_kernel:
        compile_kernel(args.head_dim)
    shape = {"dtype": DTYPES[args.dtype], "head_dim": args.head_dim, "n_heads": 1, "n_kv_heads": 1}
    found = {name: refusals(BACKENDS[name], device=args.device, **shape) for name in args.backends}
    refused = {name: [why[:3] for why in found[name]] for name in found if found[name]}
    names = [name for name in found if name not in refused]
    report = vars(args) | {"threads": torch.get_num_threads(), "torch": torch.__version__, "refused": refused}
    report["rows"] = [row for case in cases(args) for row in measured(case, list(ways(case, names)))]
    print(json.dumps(report) if args.json else described(report))


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seq", type=int, nargs="+", help="tokens of a row; default: 512 2048, on CUDA 2048 8192")
    add("--heads", nargs="+", default=["8/4", "8/8"], metavar="H/G", help="H a multiple of G")
    add("--head-dim", type=int, default=32)
    add("--tokens", type=int, help="of all rows together; default: 4096, on CUDA 16384")
    add(
        "--documents",
        type=int,
        nargs=2,
        default=(16, 700),
        metavar=("MIN", "MAX"),
        help="their lengths, if packed",
    )
    add("--dtype", choices=DTYPES, help="default: fp32, on CUDA bf16")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backends", nargs="+", choices=BACKENDS, default=["sdpa", "flex", "varlen"])
    add("--compiled-kernel", action="store_true", help="our kernel for CPUs, as in compiled runs")
    add("--rounds", type=int, default=7)
    add("--json", action="store_true", help="print a line of JSON")
    args = parser.parse_args()
    defaults = ([2048, 8192], 16384, "bf16") if args.device == "cuda" else ([512, 2048], 4096, "fp32")
    for name, default in zip(("seq", "tokens", "dtype"), defaults, strict=True):
        setattr(args, name, getattr(args, name) or default)
    return args


class Case(NamedTuple):
    """One attention to compute. `ends` are cumulative lengths of documents, from 0; none crosses a row."""

    args: Namespace
    kind: str
    seq_len: int
    heads: list[int]
    ends: list[int]

    def qkv(self, transposed: bool = False) -> list[Tensor]:
        """Random q, k, v: [B, S, H or G, K], or [B, H or G, S, K]."""
        heads, dtype = [*self.heads, self.heads[1]], DTYPES[self.args.dtype]
        shape = self.ends[-1] // self.seq_len, self.seq_len, sum(heads), self.args.head_dim
        drawn = torch.randn(shape, device=self.args.device, dtype=dtype, requires_grad=True)
        return [(x.transpose(1, 2) if transposed else x).contiguous() for x in drawn.split(heads, 2)]

    def mask(self, name: str) -> Any:
        """A backend's mask of the documents."""
        positions_BS = positions_from_cu_seqlens(torch.tensor(self.ends)).view(-1, self.seq_len)
        return BACKENDS[name].mask(positions_BS, device=self.args.device)


def cases(args: Namespace) -> Iterator[Case]:
    for seq_len in args.seq:
        rows = range(0, max(args.tokens, seq_len) + 1, seq_len)
        packed = lengths_between(*args.documents, n_tokens=rows[-1]).cumsum().tolist()
        for heads in args.heads:
            for kind, ends in (("single", []), ("packed", packed)):
                yield Case(args, kind, seq_len, [*map(int, heads.split("/"))], sorted({*rows, *ends}))


class Way(NamedTuple):
    name: str
    inputs: list[Tensor]
    forward: Callable[[], list[Any]]
    own_kernel: bool = False


def ways(case: Case, names: list[str]) -> Iterator[Way]:
    is_cuda = case.args.device == "cuda"
    yield from (raw(case, name) for name in ["", *names] if not name or (is_cuda and name.startswith("flex")))
    yield from (ours(case, name) for name in names)
    changes = ["keys repeated"] * (case.heads[0] > case.heads[1]) + ["layout copied"]
    yield from (ours(case, "sdpa", change) for change in changes if "sdpa" in names)


def ours(case: Case, name: str, change: str = "") -> Way:
    """A backend. `change` names what is done to the tensors before and after the backend."""
    inner, mask, qkv = BACKENDS[name].build(), case.mask(name), case.qkv()
    calls = getattr(mask, "tiles", mask)  # varlen's mask is its calls, as flex's is on a CPU
    own_kernel = getattr(calls, "evaluator", "") == "tiles" and is_native(qkv[0], calls.table)

    def act(x_BSHK: Tensor) -> Tensor:
        if change == "layout copied":
            return x_BSHK.transpose(1, 2).contiguous().transpose(1, 2).contiguous()
        repeats = case.heads[0] // x_BSHK.shape[2] if change else 1
        return x_BSHK.repeat_interleave(repeats, 2) if repeats > 1 else x_BSHK

    return Way(change or name, qkv, lambda: [act(inner(*map(act, qkv), mask))], own_kernel)


def raw(case: Case, flex: str = "") -> Way:
    """A kernel alone, in one call or one call per document. All its inputs are made beforehand."""
    attend, calls, n = cast(Any, scaled_dot_product_attention), [case.qkv(transposed=True)], case.seq_len
    options: dict[str, Any] = {"enable_gqa": case.heads[0] != case.heads[1]}
    if flex:
        attend = cast(Any, torch.compile(flex_attention, dynamic=False))
        options |= {"block_mask": case.mask(flex).block_mask, "kernel_options": BACKENDS[flex].kernel_options}
    elif case.kind == "packed" and case.args.device == "cuda" and case.args.dtype == "bf16":
        attend, cu_D = cast(Any, varlen_attn), torch.tensor(case.ends, dtype=torch.int32, device="cuda")
        lengths = cu_D, cu_D, *[max(b - a for a, b in pairwise(case.ends))] * 2
        calls = [[*(x.flatten(0, 1) for x in case.qkv()), *lengths]]
        is_asked = "enable_gqa" in signature(varlen_attn).parameters
        options = {"window_size": (-1, 0), **(options if is_asked else {})}
    else:
        options["is_causal"] = True
        spans = pairwise(case.ends) if case.kind == "packed" else ()
        calls = [[x[a // n, None, :, a % n : (b - 1) % n + 1] for x in calls[0]] for a, b in spans] or calls
    inputs = [x for call in calls for x in call[:3]]
    return Way(f"raw {flex}".strip(), inputs, lambda: [attend(*call, **options) for call in calls])


def measured(case: Case, found: list[Way]) -> Iterator[dict[str, Any]]:
    """A row for each way."""
    torch.compiler.reset()  # otherwise a kernel may be compiled for all shapes so far
    turns = [(way, [torch.randn(x.shape).to(x) for x in way.forward()]) for way in found]
    seconds: dict[str, list[tuple[float, float]]] = {way.name: [] for way in found}
    for number in range(2 + case.args.rounds):
        for way, douts in turns if number % 2 else turns[::-1]:
            seconds[way.name].append(once(way, douts))
    n_pairs = sum((b - a) * (b - a + 1) // 2 for a, b in pairwise(case.ends))
    for way, douts in turns:
        own, raw = seconds[way.name][2:], seconds.get(f"raw {way.name}", seconds["raw"])[2:]
        row: dict[str, Any] = {"seq": case.seq_len, "heads": "{}/{}".format(*case.heads), "kind": case.kind}
        row |= {"documents": len(case.ends) - 1, "way": way.name, "own_kernel": way.own_kernel}
        for i, (part, times) in enumerate((("forward", 4), ("backward", 10))):
            median = statistics.median(spent[i] for spent in own)
            flops = times * case.heads[0] * case.args.head_dim * n_pairs
            row |= {f"{part}_ms": round(median * 1e3, 3), f"{part}_tflops": round(flops / median / 1e12, 5)}
        ratios = (sum(a) / sum(b) for a, b in zip(own, raw, strict=True))
        yield row | traffic(way, douts) | {"times_of_raw": round(statistics.median(ratios), 3)}


def once(way: Way, douts: list[Tensor]) -> tuple[float, float]:
    """Seconds of a forward and of its backward."""
    wait = torch.cuda.synchronize if douts[0].is_cuda else lambda: None
    began = perf_counter()  # the device is idle: the previous turn waited for it
    outs = way.forward()
    wait()
    middle = perf_counter()
    torch.autograd.grad(outs, way.inputs, douts)
    wait()
    return middle - began, perf_counter() - middle


def traffic(way: Way, douts: list[Tensor]) -> dict[str, float]:
    """The MiB that a forward and a backward allocate, and their numbers of copies and concatenations."""
    is_cuda, before = douts[0].is_cuda, torch.cuda.memory_allocated()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    once(way, douts)
    peak = torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as profiled:
        once(way, douts)
    events = profiled.events() or []
    n_bytes = peak if is_cuda else sum(max(0, event.self_cpu_memory_usage) for event in events)
    calls = [event.name for event in events if event.name != "aten::copy_" or len(event.input_shapes[0]) > 2]
    copies, cats = calls.count("aten::copy_"), calls.count("aten::cat")
    return {"mib": round(n_bytes / 2**20, 2), "copies": copies, "cats": cats}


def described(report: dict[str, Any]) -> str:
    lines = ["{device}, {threads} threads, torch {torch}, {dtype}, head dim {head_dim}".format(**report)]
    for name, reasons in report["refused"].items():
        lines += [f"{name} is refused here: {' '.join(map(str, why))}" for why in reasons]
    return "\n".join([*lines, table(report["rows"])])


if __name__ == "__main__":
    main()
