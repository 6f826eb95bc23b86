"""The hooks that print to the console: reports, a progress bar, and the balance of attention work."""

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

from torchtitan_lite.launch.log import say
from torchtitan_lite.training.hooks import Outcome, RunInfo, StepStats
from torchtitan_lite.training.metrics import MetricsConfig, Reporter
from torchtitan_lite.training.validation import Validation

_NEGLIGIBLE = 0.05
"""The share of the time that waiting for data, or hooks, must take before the console mentions it."""
_COLUMNS = {
    "time": 8,
    "step": 8,
    "loss": 7,
    "norm": 7,
    "lr": 8,
    "tok/s": 5,
    "MFU": 5,
    "memory": 6,
    "elapsed": 7,
    "left": 7,
}
"""The columns of a report with their widths. With a space between the columns this makes 77."""
_ROWS_PER_HEADER = 20
_RECENT_REPORTS = 20
"""The number of reports whose speed says how much time is left."""


@dataclass(frozen=True, kw_only=True)
class ConsoleConfig:
    """The config of the hook that prints reports on the console. Only the first rank builds the hook."""

    name: Literal["console"] = "console"

    def build(self, run: RunInfo) -> "Console | None":
        return Console(run.job.metrics) if run.rank == 0 else None


class Console(Reporter):
    """A hook that prints a line per report and per validation. A terminal also gets a progress bar."""

    def __init__(self, config: MetricsConfig) -> None:
        super().__init__(config)
        self._n_rows = 0
        self._reported: deque[tuple[int, float]] = deque(maxlen=_RECENT_REPORTS + 1)
        """The recent reports: step and time. The first entry is the slow first step of this process."""

    def start(self, run: RunInfo) -> None:
        super().start(run)
        self._began = time.monotonic()
        self._bar = tqdm(
            initial=run.resumed_step or 0,
            total=run.n_steps,
            unit="step",
            desc="training",
            disable=None,
            dynamic_ncols=True,
        )

    def step(self, stats: StepStats) -> None:
        if not self._reported:
            self._reported.append((stats.step, time.monotonic()))
        self._bar.update(stats.step - self._bar.n)
        super().step(stats)

    def write(self, record: Mapping[str, float]) -> None:
        now, step = time.monotonic(), int(record["step"])
        self._say_columns()
        if step > self._reported[-1][0]:
            self._reported.append((step, now))
        say(
            _row(
                time.strftime("%H:%M:%S"),
                _count(step),
                _fixed(record["loss"], 7, 4),
                _fixed(record["grad_norm"], 7, 3),
                _scientific(record["lr"], 8),
                _count(record["tokens_per_second"], 5),
                _percent(record["mfu"]),
                f"{_fixed(record['peak_memory_gib'], 5, 2)}G",
                duration(now - self._began),
                duration(self._seconds_left(step)),
            )
        )
        shares = {"waiting for data": record["data_wait_fraction"], "in hooks": record["hooks_fraction"]}
        notable = [
            f"{share:.0%} of the time {name}" for name, share in shares.items() if share >= _NEGLIGIBLE
        ]
        if notable:
            say(f"{' ' * 8} {', '.join(notable)}")

    def validated(self, result: Validation) -> None:
        self._say_columns()
        loss, per_byte = _fixed(result.loss, 7, 4), _fixed(result.nats_per_byte, 7, 4).strip()
        row = _row(time.strftime("%H:%M:%S"), _count(result.step), loss)
        say(f"{row} validation loss per token; {per_byte} per byte")

    def end(self, outcome: Outcome) -> None:
        self._bar.close()

    def _say_columns(self) -> None:
        """Print the names of the columns, before the first row and again after some rows."""
        if self._n_rows % _ROWS_PER_HEADER == 0:
            say(_row(*_COLUMNS))
        self._n_rows += 1

    def _seconds_left(self, step: int) -> float:
        """Return the seconds that the steps left take at the recent speed, validations and saves included.

        NaN: no speed is known, because this process has taken one step only.
        """
        (first, began), (last, ended) = self._reported[0], self._reported[-1]
        if step == self.n_steps:
            return 0.0
        return (self.n_steps - step) * (ended - began) / (last - first) if last > first else math.nan


def _row(*cells: str) -> str:
    """Return the cells below the columns of a report. There may be fewer cells than columns."""
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, _COLUMNS.values(), strict=False))


def _fixed(value: float, width: int, decimals: int) -> str:
    """Return a number in at most `width` (5 or more) columns, with at most `decimals` decimals."""
    is_small = 0 < abs(value) < 10.0 ** (1 - decimals)
    if not is_small:
        for n in range(decimals, -1, -1):
            if len(text := f"{value:.{n}f}") <= width:
                return text
    return _scientific(value, width)


def _scientific(value: float, width: int) -> str:
    """Return a number with an exponent in at most `width` columns, if that is possible."""
    texts = [f"{value:.{n}e}" for n in (2, 1, 0)]
    texts.append(texts[-1].replace("e+0", "e").replace("e-0", "e-").replace("e+", "e"))
    return next((text for text in texts if len(text) <= width), "0" if abs(value) < 1 else "huge")


def _count(value: float, width: int = 8) -> str:
    """Return a number in at most `width` (5 or more) columns, such as 1234567, 12.3k or 4.56M.

    The number must not be negative.
    """
    if not math.isfinite(value):
        return f"{value}"
    if width > 5 and len(text := f"{value:.0f}") <= width:
        return text
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5:
            decimals = 0 if value >= 99.95 or not prefix else 1 if value >= 9.995 else 2
            return f"{value:.{decimals}f}{prefix}"
        value /= 1000
    return _scientific(value * 1e15, width)


def _percent(share: float) -> str:
    if math.isnan(share):
        return "-"
    return f"{share:.0%}" if share >= 0.9995 else f"{share:.1%}"


def duration(seconds: float) -> str:
    """Return a duration in at most 7 columns: 0:01:02, 12h34m, 5d06h, or "-" if it is not known."""
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if hours < 10:
        return f"{hours}:{minute:02}:{second:02}"
    if hours < 100:
        return f"{hours}h{minute:02}m"
    return f"{days}d{hour:02}h" if days < 1000 else _count(days, 6) + "d"


@dataclass(frozen=True, kw_only=True)
class WorkConfig:
    """The config of the hook that reports the balance of attention work under context parallel."""

    name: Literal["work"] = "work"

    def build(self, run: RunInfo) -> "Work | None":
        # Every rank needs the hook: the ranks exchange their work in an all-reduce.
        degrees = run.job.parallelism.degrees(run.world_size)
        return Work(run, degrees.context, degrees.tensor) if degrees.context > 1 else None


class Work:
    """A hook that prints max/mean of the ranks' attention work, after the first step of this process."""

    def __init__(self, run: RunInfo, context_degree: int, tensor_degree: int) -> None:
        self.run, self.degrees = run, (context_degree, tensor_degree)

    def step(self, stats: StepStats) -> None:
        if stats.attention_work is None:
            return
        # Each rank fills in its own entry, so the sum over ranks holds every rank's work.
        work = torch.zeros(self.run.world_size, dtype=torch.float64)
        work[self.run.rank] = stats.attention_work
        work = work.to(self.run.device)
        dist.all_reduce(work)
        # Only ranks that share a sequence can share its work: compare these, and report the worst sequence.
        shared = work.view(-1, *self.degrees)
        ratio = (shared.amax(1) / shared.mean(1).clamp(min=1)).max()
        if self.run.rank == 0:
            say(f"attention work per rank in the first step: max/mean {ratio:.3f}")
