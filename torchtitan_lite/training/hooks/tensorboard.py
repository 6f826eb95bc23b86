"""The hook that writes the numbers of metrics.jsonl for TensorBoard."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torchtitan_lite.training.hooks import Outcome, RunInfo
from torchtitan_lite.training.metrics import Reporter

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TensorBoardConfig:
    """The config of the TensorBoard hook, built on the first rank if `metrics.enable_tensorboard` is set."""

    name: Literal["tensorboard"] = "tensorboard"

    def build(self, run: RunInfo) -> "TensorBoard | None":
        metrics = run.job.metrics
        return TensorBoard(metrics) if run.rank == 0 and metrics.enable_tensorboard else None


class TensorBoard(Reporter):
    """A hook that writes each number of metrics.jsonl as a scalar of the same name."""

    def start(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed for --dry-run

        super().start(run)
        # TensorBoard also reads the files from before a resume. The purge hides the steps that are repeated.
        purge_step = None if run.resumed_step is None else run.first_step
        folder = str(run.folder / self.config.save_tb_folder)
        self._writer: SummaryWriter | None = SummaryWriter(folder, purge_step=purge_step)

    def write(self, record: Mapping[str, float]) -> None:
        known = {key for key in record if math.isfinite(record[key])}  # NaN: not known
        for key in known - {"step"}:
            self._try(lambda writer, key=key: writer.add_scalar(key, record[key], int(record["step"])))

    def end(self, outcome: Outcome) -> None:
        self._try(lambda writer: writer.close())

    def _try(self, act: Callable[["SummaryWriter"], object]) -> None:
        try:
            if self._writer is not None:
                act(self._writer)
        except OSError as error:  # the writer's thread has ended, so the writer is of no more use
            _LOG.warning("nothing more is written for TensorBoard (%s)", error.strerror)
            self._writer = None
