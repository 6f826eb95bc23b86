"""Measures speed and memory of the trainer's step on synthetic tokens, alone or in turns with other programs.

    benchmarks/step.py --preset tiny --dtype bf16 --compile --json
    benchmarks/step.py --compile --rounds 3 --compare "python other.py --compile" --compare "python third.py"

Prints tokens per second, milliseconds, peak memory, MFU and the share of each phase; with --json one line of
JSON. The last line of a command to compare with must be such a line, with `tokens_per_s_median` and
`peak_rss_gib` or `peak_mem_gib`. The programs take turns (A B C A B C), and the ratios are those of the
medians. A command that fails is left out. A first step compiles, or finds code that an earlier round has
compiled; startup.py measures these two cases apart.
"""

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clock import Clock
from synthetic import write_shards
from torch import Tensor

from torchtitan_lite.config.job import JobConfig, load_job
from torchtitan_lite.data import Batch
from torchtitan_lite.models.decoder import DecoderConfig
from torchtitan_lite.training.metrics import measured_flops, peak_flops, peak_memory_gib
from torchtitan_lite.training.trainer import Trainer

PRESETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tiny": (
        "qwen3", "debugmodel",
        {"n_layers": 8, "vocab_size": 8192, "tie_embeddings": False, "max_seq_len": 1 << 17},
    ),
    "qwen3-0.6b": ("qwen3", "0.6B", {}),
    "llama3-8b": ("llama3", "8B", {}),
}  # fmt: skip
"""Name and flavor of a model, and the fields that differ from the flavor."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
DESCRIPTION = """\
{preset}: {params:,} parameters, {attention}, {dtype}, {how}
{batch} x {seq} tokens on {device}, {threads} threads
{tokens_per_s_median:,.0f} tokens/s
a step takes {step_ms_median} ms ({step_ms_min} to {step_ms_max} in {steps} steps), the first {first_step_s} s
peak memory {memory} GiB
MFU {mfu_causal:.1%} causal, {mfu_full:.1%} full attention, of {peak_tflops} TFLOP/s ({measured_tflops} here)
phases: {shares}"""
ROW = (
    "{peer:22} {tokens_per_s_median:>10,.0f} tokens/s {peak_gib:6.2f} GiB, first step {first_step_s:5.1f} s; "
    "we are {times_as_fast:.3f} times as fast, in {memory_ratio:.3f} of the memory; rounds: {rounds}"
)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.compare:
        compare(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        report = measure(args, Path(folder))
    print(json.dumps(report) if args.json else described(report), flush=True)


def parse(argv: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    # No abbreviated options: `without_comparison` looks for whole names.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--layers", type=int, help="number of blocks; default: the preset's")
    parser.add_argument("--seq", type=int, default=512, help="tokens in a sample")
    parser.add_argument("--batch", type=int, default=8, help="samples in a step")
    parser.add_argument(
        "--documents",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="tokens of each packed document; default: one document",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="dtype of the computation; the weights are float32"
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--attention", choices=("sdpa", "flex", "flex_flash", "varlen"), default="sdpa")
    parser.add_argument("--window", type=int, help="tokens of its document that a token sees; default: all")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the measured steps")
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    parser.add_argument(
        "--loop",
        choices=("trainer", "plain"),
        default="trainer",
        help="plain: a loop of a few lines over the same model, loss and optimizer",
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="COMMAND",
        help="another program; the option can be repeated",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each compared program")
    return parser.parse_args(argv)


def job_of(args: argparse.Namespace, *more: str, world_size: int = 1) -> JobConfig:
    """The run's configuration, checked as usual. `more` options override the others."""
    name, flavor, overrides = PRESETS[args.preset]
    overrides = {**overrides, "max_seq_len": max(args.seq, 1 << 17)}
    if args.layers:
        overrides["n_layers"] = args.layers
    if args.window:
        overrides["sliding_window"] = args.window
    suffix = "" if args.attention == "sdpa" else f"_{args.attention}"
    return load_job(
        ["--model.name", name, "--model.flavor", flavor + suffix, "--model.overrides", json.dumps(overrides),
         "--job.device", args.device, "--training.seq-len", str(args.seq),
         "--training.local-batch-size", str(args.batch),
         "--training.mixed-precision-param", DTYPES[args.dtype],
         "--training.steps", str(args.warmup + args.steps), "--lr-scheduler.warmup-steps", "0",
         "--lr-scheduler.decay-ratio", "0",
         "--optimizer.lr", "3e-4", "--activation-checkpoint.mode", args.recompute,
         "--compile.enable" if args.compile else "--compile.no-enable", *more],
        world_size=world_size,
    ).config  # fmt: skip


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train in this process, and return every figure."""
    if args.threads:
        torch.set_num_threads(args.threads)
    job, n_steps = job_of(args), args.warmup + args.steps
    decoder = job.decoder
    shards = write_shards(folder, decoder.vocab_size, args.batch * n_steps, args.seq, args.documents)
    trainer = Trainer(job, shards=shards)
    clock = Clock(trainer.stepper.device)
    step = watched_step(trainer, clock) if args.loop == "trainer" else plain_step(trainer)
    ticks, losses = [clock.tick()], []
    for number in range(n_steps):
        if number == args.warmup:
            clock.forget()
        losses.append(step())
        clock.wait()  # as the other programs do
        ticks.append(clock.tick())
    peak = peak_memory_gib(trainer.stepper.device)  # before the device's speed is measured
    seconds = clock.between(ticks)
    timed = seconds[args.warmup :]
    return {
        **vars_of(args),
        **speeds(args, timed, decoder, trainer.stepper.device),
        "params": decoder.n_params,
        "first_step_s": round(seconds[0], 3),
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
        "peak_mem_gib" if args.device == "cuda" else "peak_rss_gib": round(peak, 3),
        "phases": clock.shares(sum(timed)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def vars_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options that the report repeats."""
    names = (
        "preset",
        "seq",
        "batch",
        "documents",
        "dtype",
        "device",
        "compile",
        "attention",
        "recompute",
        "loop",
    )
    return {"peer": "torchtitan_lite", **{name: getattr(args, name) for name in names}}


def speeds(
    args: argparse.Namespace, seconds: list[float], decoder: DecoderConfig, device: torch.device
) -> dict[str, Any]:
    """Speed, and its share of the device's peak speed."""
    n_tokens, median = args.batch * args.seq, statistics.median(seconds)
    dtype = getattr(torch, DTYPES[args.dtype])
    peak, measured = peak_flops(device, dtype), measured_flops(device, dtype)
    causal = decoder.flops_per_token(args.seq) * n_tokens / median
    full = full_flops_per_token(decoder, args.seq) * n_tokens / median
    return {
        "tokens_per_s": round(n_tokens * len(seconds) / sum(seconds), 1),
        "tokens_per_s_median": round(n_tokens / median, 1),
        "step_ms_median": round(median * 1e3, 2),
        "step_ms_min": round(min(seconds) * 1e3, 2),
        "step_ms_max": round(max(seconds) * 1e3, 2),
        "steps": len(seconds),
        "model_tflops": round(causal / 1e12, 4),
        "peak_tflops": round(peak / 1e12, 3),
        "measured_tflops": round(measured / 1e12, 3),
        "mfu_causal": round(causal / peak, 4),
        "mfu_full": round(full / peak, 4),
    }


def full_flops_per_token(decoder: DecoderConfig, seq_len: int) -> float:
    """`flops_per_token` by the other convention: every token sees all `seq_len` keys."""
    half = 6 * decoder.n_layers * decoder.n_heads * decoder.head_dim * seq_len
    return decoder.flops_per_token(seq_len) + half


def watched_step(trainer: Trainer, clock: Clock) -> Callable[[], float]:
    """The trainer's step, with a mark of the clock at the end of each phase."""
    batches, loss_of = trainer.state.batches, trainer.stepper.loss_of
    reduce_and_clip, update = trainer.stepper.reduce_and_clip, trainer.stepper.update

    class Batches:
        consumed_samples = 0  # only an error message needs the true number

        def __next__(self) -> Batch:
            clock.mark("")
            batch = next(batches)
            clock.mark("data")
            return batch

    def timed_loss_of(batch: Batch) -> tuple[Tensor, Tensor]:
        clock.mark("")
        found = loss_of(batch)
        clock.mark("loss")
        return found

    def timed_clip(*words: Any) -> tuple[float, float, tuple[bool, ...]]:
        clock.mark("backward")
        found = reduce_and_clip(*words)
        clock.mark("clip")
        return found

    def timed_update() -> float:
        clock.mark("")
        lr = update()
        clock.mark("optimizer")
        return lr

    trainer.state.model.norm.register_forward_hook(lambda *_: clock.mark("forward"))
    replaced = {"loss_of": timed_loss_of, "reduce_and_clip": timed_clip, "update": timed_update}
    for name, act in replaced.items():
        setattr(trainer.stepper, name, act)
    setattr(trainer.state, "batches", Batches())  # noqa: B010 - has only the part of a Loader that a step needs
    return lambda: trainer.stepper.train_step().loss


def plain_step(trainer: Trainer) -> Callable[[], float]:
    """A training step of a few lines, over the trainer's model, loss and optimizer."""
    model, optimizer, batches = trainer.state.model, trainer.state.optimizer, iter(trainer.state.batches)
    decoder, device = model.config, trainer.stepper.device

    def step() -> float:
        batch = next(batches)
        mask = decoder.attention.mask(batch.positions_BS, device=device)
        tensors = batch.tokens_BS, batch.positions_BS, batch.labels_BS
        tokens_BS, positions_BS, labels_BS = (x.to(device, non_blocking=True) for x in tensors)
        loss_sum, count = model(tokens_BS, positions_BS, mask, labels_BS)
        loss = loss_sum / count
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def described(report: dict[str, Any]) -> str:
    """The report as text."""
    return DESCRIPTION.format(
        **report,
        how="compiled" if report["compile"] else "eager",
        memory=report.get("peak_mem_gib", report.get("peak_rss_gib")),
        shares="  ".join(f"{phase} {share:.1%}" for phase, share in report["phases"].items()),
    )


def compare(args: argparse.Namespace) -> None:
    """Run this program and the others in turns, and report the medians and their ratios."""
    own = shlex.join([sys.executable, *without_comparison(sys.argv), "--json"])
    commands = [own, *args.compare]
    reports: dict[str, list[dict[str, Any]]] = {command: [] for command in commands}
    for _ in range(args.rounds):
        for command in list(reports):
            report = run(command)
            if report is not None:
                reports[command].append(report)
            elif command == own:
                sys.exit(1)
            else:
                del reports[command]
    rows = [summary(command, found) for command, found in reports.items()]
    for row in rows:
        row["times_as_fast"] = round(rows[0]["tokens_per_s_median"] / row["tokens_per_s_median"], 3)
        row["memory_ratio"] = round(rows[0]["peak_gib"] / row["peak_gib"], 3)
        if not args.json:
            print(ROW.format(**row))
    if args.json:
        print(json.dumps(rows))


def without_comparison(argv: list[str]) -> list[str]:
    """The command line without the options of the comparison."""
    kept, words = [], iter(argv)
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in ("--compare", "--rounds"):
            kept += [word] if word != "--json" else []
        elif not equals:
            next(words)
    return kept


def run(command: str) -> dict[str, Any] | None:
    """A program's report, the last line of JSON that it prints; if it fails, prints why and returns None."""
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        why = f"failed with status {done.returncode}" if done.returncode else "printed no line of JSON"
        print(f"{command}\n{why}:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    report = json.loads(lines[-1])
    print(f"{report.get('peer', command)}: {report['tokens_per_s_median']} tokens/s", file=sys.stderr)
    return report


def summary(command: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians over the rounds of one program."""

    def median(*keys: str) -> float:
        return statistics.median(next(report[key] for key in keys if key in report) for report in reports)

    return {
        "peer": reports[0].get("peer", command),
        "command": command,
        "tokens_per_s_median": median("tokens_per_s_median"),
        "step_ms_median": median("step_ms_median"),
        "peak_gib": median("peak_mem_gib", "peak_rss_gib"),
        "first_step_s": median("first_step_s"),
        "rounds": [report["tokens_per_s_median"] for report in reports],
    }


if __name__ == "__main__":
    main()
