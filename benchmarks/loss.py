"""Compares projection and cross-entropy in chunks with all logits at once: time and memory by vocabulary.

    benchmarks/loss.py --vocabularies 512 151936 --rows 2048 --dim 256 --dtype bf16 --json

The two ways, chunked and full, take turns. Milliseconds are the median over rounds of a forward and backward.
Memory is the peak beyond the hidden states, the weight and their gradients: on a GPU the memory that torch
allocates; on a CPU the resident memory of the process (Linux), with a new process for each way. The memory of
the chunked way is compared with the size of all logits, in float32 and in the dtype of the hidden states. One
label in ten is ignored.

On a GPU the script also prints the launches of both ways, as torch's profiler sees them, and three figures by
formula: the bytes that the chunked way reads and writes if no cache holds anything from one kernel to the
next, the bytes that every way must move (inputs and gradients once), and the TFLOP of the three products.
"""

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from ctypes import CDLL
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from clock import Clock
from torch import Tensor

from torchtitan_lite.models.loss import IGNORE, chunk_rows, linear_cross_entropy, reference_cross_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "chunked": linear_cross_entropy,
    "full": reference_cross_entropy,
}


def main() -> None:
    args = parse(sys.argv[1:])
    sizes = [
        Sizes(args.rows, args.dim, vocabulary, args.dtype, args.device) for vocabulary in args.vocabularies
    ]
    report = {
        "rows": args.rows,
        "dim": args.dim,
        "dtype": args.dtype,
        "device": args.device,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "vocabularies": [measure(each, args.rounds) for each in sizes],
    }
    print(json.dumps(report) if args.json else described(report), flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[512, 8192, 32768, 151936])
    parser.add_argument("--rows", type=int, default=2048, help="tokens whose loss is computed")
    parser.add_argument("--dim", type=int, default=256, help="features of a hidden state")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the hidden states")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after a warm-up round")
    parser.add_argument("--json", action="store_true", help="print a line of JSON")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Sizes:
    """One loss to compute."""

    rows: int
    dim: int
    vocabulary: int
    dtype: str
    device: str

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [N, D], the weight [V, D] and labels [N]; the same in each call."""
        generator = torch.Generator().manual_seed(0)
        x_ND = torch.randn(self.rows, self.dim, generator=generator).to(self.device, DTYPES[self.dtype])
        weight_VD = torch.randn(self.vocabulary, self.dim, generator=generator).mul_(0.02)
        labels_N = torch.randint(self.vocabulary, (self.rows,), generator=generator)
        labels_N[torch.rand(self.rows, generator=generator) < 0.1] = IGNORE
        return x_ND.requires_grad_(), weight_VD.to(self.device).requires_grad_(), labels_N.to(self.device)


def measure(sizes: Sizes, n_rounds: int) -> dict[str, Any]:
    """Time and memory of both ways at one size."""
    n_bytes = {way: extra_bytes(sizes, way) for way in WAYS}
    ms = milliseconds(sizes, n_rounds)
    logits, itemsize = sizes.rows * sizes.vocabulary, DTYPES[sizes.dtype].itemsize
    return {
        "vocabulary": sizes.vocabulary,
        "chunked_ms": round(ms["chunked"], 3),
        "full_ms": round(ms["full"], 3),
        "times_as_fast": round(ms["full"] / ms["chunked"], 3),
        "chunked_bytes": n_bytes["chunked"],
        "full_bytes": n_bytes["full"],
        "logits_float32_bytes": logits * 4,
        "logits_bytes": logits * itemsize,
        "chunked_of_float32_logits": round(n_bytes["chunked"] / (logits * 4), 4),
        "chunked_of_logits": round(n_bytes["chunked"] / (logits * itemsize), 4),
        **(on_a_gpu(sizes) if sizes.device == "cuda" else {}),
    }


def on_a_gpu(sizes: Sizes) -> dict[str, Any]:
    """The launches of both ways, and the bytes and TFLOP by formula."""
    inputs = sizes.inputs()
    return {
        **{f"{way}_launches": launches(way, *inputs) for way in WAYS},
        "chunked_moved_bytes": moved_bytes(sizes, chunk_rows(sizes.rows, sizes.vocabulary, inputs[0])),
        "least_moved_bytes": 2 * sum(x.numel() * x.itemsize for x in inputs[:2]),
        "tflop": round(6 * sizes.rows * sizes.dim * sizes.vocabulary / 1e12, 3),
    }


def launches(way: str, *inputs: Tensor) -> int | None:
    """Kernels, copies and fills of a forward and a backward; None if the profiler sees no kernel."""
    compute(way, *inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        compute(way, *inputs)
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() or () if event.device_type.name == "CUDA"]
    return len(on_device) or None


def moved_bytes(sizes: Sizes, rows: int) -> int:
    """The bytes that the kernels of the chunked way read and write, with `rows` rows in a chunk.

    A product writes the logits; the sums and the gradient read them. The logits' gradient is written once and
    read by two products. The weight is copied to the dtype of the products, and two products of each chunk
    read the copy. The weight's gradient is zeroed, each chunk adds to it, and it is scaled.
    """
    itemsize = DTYPES[sizes.dtype].itemsize
    logits, weight = sizes.rows * sizes.vocabulary, sizes.vocabulary * sizes.dim
    n_chunks = -(-sizes.rows // rows)
    copied = 0 if itemsize == 4 else weight * (4 + itemsize)
    hidden = sizes.rows * sizes.dim * (2 * itemsize + 4 + 4 + 3 * itemsize)
    return logits * (12 + 3 * itemsize) + copied + weight * (n_chunks * (2 * itemsize + 8) + 12) + hidden


def compute(way: str, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the mean loss, the loss of the trainer."""
    loss_sum, count = WAYS[way](x_ND, weight_VD, labels_N)
    return torch.autograd.grad(loss_sum / count, (x_ND, weight_VD))


def milliseconds(sizes: Sizes, n_rounds: int) -> dict[str, float]:
    """The median milliseconds of each way; the ways take turns."""
    inputs, clock = sizes.inputs(), Clock(torch.device(sizes.device))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(n_rounds + 1):
        for way in WAYS:
            clock.wait()
            ticks = [clock.tick()]
            compute(way, *inputs)
            clock.wait()
            seconds[way] += clock.between([*ticks, clock.tick()])
    return {way: statistics.median(found[1:]) * 1e3 for way, found in seconds.items()}


def extra_bytes(sizes: Sizes, way: str) -> int:
    """The peak memory of a loss and its gradients, without the gradients and the inputs."""
    if sizes.device == "cuda":
        return peak_of_loss(sizes, way)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(peak_of_loss, sizes, way).result()


def peak_of_loss(sizes: Sizes, way: str) -> int:
    """`extra_bytes`, in this process."""
    # Loads the libraries before the measurement.
    compute(way, *Sizes(32, sizes.dim, 64, sizes.dtype, sizes.device).inputs())
    inputs = sizes.inputs()
    before = reset_peak(sizes.device)
    gradients = compute(way, *inputs)
    return peak(sizes.device) - before - sum(gradient.nbytes for gradient in gradients)


def reset_peak(device: str) -> int:
    """Give free memory back to the system and reset the peak. Returns the bytes that are still held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform != "linux":
        sys.exit("the peak of a process on a CPU is read from /proc, which only Linux has")
    CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: str) -> int:
    """The most bytes held since `reset_peak`: of tensors on a GPU, of the whole process on a CPU."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")


def resident(name: str) -> int:
    """A line of /proc/self/status, in bytes (man 5 proc)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def described(report: dict[str, Any]) -> str:
    """The report as text."""
    title = "{rows} x {dim} hidden states in {dtype} on {device} ({threads} threads), torch {torch}"
    rows = [{name: mib(name, x) for name, x in row.items()} for row in report["vocabularies"]]
    return f"{title.format(**report)}\n{table(rows)}"


def mib(name: str, x: float) -> float | str:
    """A number of bytes as MiB; another value unchanged."""
    return f"{x / 2**20:,.1f} MiB" if name.endswith("_bytes") else x


def table(rows: list[dict[str, Any]]) -> str:
    """A line with the names of the last row's figures, and a line of figures for each row."""
    names = [name for name, value in rows[-1].items() if not isinstance(value, dict)]
    numbers = [[row.get(name, "") for name in names] for row in rows]
    words = [[f"{x:,}" if type(x) in (int, float) else str(x) for x in line] for line in numbers]
    widths = [max(map(len, column)) for column in zip(names, *words, strict=True)]
    aligned = ([x.rjust(width) for x, width in zip(line, widths, strict=True)] for line in [names, *words])
    return "\n".join("  ".join(line) for line in aligned)


if __name__ == "__main__":
    main()
