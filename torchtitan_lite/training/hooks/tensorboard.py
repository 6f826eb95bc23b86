"""The numbers of metrics.jsonl, for TensorBoard."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torchtitan_lite.training.hooks import Outcome, RunInfo, StepStats
from torchtitan_lite.training.metrics import Meter, MetricsConfig
from torchtitan_lite.training.validation import Validation

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TensorBoardConfig:
    """The files of the first rank, if they are asked for."""

    name: Literal["tensorboard"] = "tensorboard"

    def build(self, run: RunInfo) -> "TensorBoard | None":
        """The hook, on the first rank."""
        metrics = run.job.metrics
        return TensorBoard(metrics) if run.rank == 0 and metrics.enable_tensorboard else None


class TensorBoard:
    """Writes a scalar for each number, under the names of metrics.jsonl."""

    def __init__(self, config: MetricsConfig) -> None:
        self.config = config
        self._writer: SummaryWriter | None = None

    def start(self, run: RunInfo) -> None:
        """Open the file of this start."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so not for --dry-run

        self._meter = Meter(self.config, run)
        # It appends; whoever reads is told to forget what an earlier start reported from there on.
        purge_step = None if run.resumed_step is None else run.first_step
        self._writer = SummaryWriter(str(run.folder / self.config.save_tb_folder), purge_step=purge_step)

    def step(self, stats: StepStats) -> None:
        """Write the report if one is due."""
        if report := self._meter.report(stats):
            self._write(report)

    def validated(self, result: Validation) -> None:
        """Write the loss on held-out text."""
        self._write({"step": result.step, "validation_loss": result.loss})

    def end(self, outcome: Outcome) -> None:
        """Close the file."""
        self._try(lambda writer: writer.close())

    def _write(self, record: Mapping[str, float]) -> None:
        for key in record.keys() - {"step"}:
            self._try(lambda writer, key=key: writer.add_scalar(key, record[key], int(record["step"])))

    def _try(self, act: Callable[["SummaryWriter"], object]) -> None:
        try:
            if self._writer is not None:
                act(self._writer)
        except OSError as error:  # its own thread has ended with it
            _LOG.warning("no more is written for TensorBoard (%s)", error.strerror)
            self._writer = None
