"""The hook that writes the numbers of metrics.jsonl, the configuration and the plan for TensorBoard."""

import logging
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torchtitan_lite.training.hooks import Outcome, RunInfo
from torchtitan_lite.training.metrics import Reporter

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_LOG = logging.getLogger(__name__)

_FLUSH_SECONDS = 10
"""The longest time until TensorBoard can show a number. The default, two minutes, is long in a first run."""
_BOTH = "loss"
"""The tag of the one chart with two curves: the losses of training and of validation."""
_TAGS = {
    "loss": "loss/train",
    "validation_loss": "loss/validation",
    "grad_norm": "optimizer/grad_norm",
    "lr": "optimizer/lr",
    "tokens_per_second": "speed/tokens_per_second",
    "n_tokens_seen": "speed/n_tokens_seen",
    "mfu": "speed/mfu",
    "data_wait_fraction": "speed/data_wait_fraction",
    "hooks_fraction": "speed/hooks_fraction",
    "peak_memory_gib": "memory/peak_memory_gib",
}
"""The tag for each number of a record. TensorBoard shows a section for each word before a slash."""
_CURVES = {"loss": "train", "validation_loss": "validation"}
"""The run, below the run's own name, that holds a number for the chart `_BOTH`."""


@dataclass(frozen=True, kw_only=True)
class TensorBoardConfig:
    """The config of the TensorBoard hook, built on the first rank if `metrics.enable_tensorboard` is set."""

    name: Literal["tensorboard"] = "tensorboard"

    def build(self, run: RunInfo) -> "TensorBoard | None":
        metrics = run.job.metrics
        return TensorBoard(metrics) if run.rank == 0 and metrics.enable_tensorboard else None


class TensorBoard(Reporter):
    """A hook that writes each number of metrics.jsonl as a scalar, and the configuration and plan as text.

    TensorBoard draws several curves in one chart only if they have the same tag in different runs. So a run
    that validates also writes its losses under the tag `_BOTH` to the runs NAME/train and NAME/validation.
    """

    def start(self, run: RunInfo) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed for --dry-run

        super().start(run)
        # TensorBoard also reads the files from before a resume. The purge hides the steps that are repeated.
        purge_step = None if run.resumed_step is None else run.first_step
        folder = _folder(run, self.config.save_tb_folder)
        curves = _CURVES.values() if run.job.validation.enable else ()
        self._writers: dict[str, SummaryWriter] = {
            name: SummaryWriter(str(folder / name), purge_step=purge_step, flush_secs=_FLUSH_SECONDS)
            for name in ("", *curves)
        }
        plan = "\n".join(run.job.plan(run.world_size))
        self._write_text("configuration", run.job.to_toml(run.world_size), run.first_step)
        self._write_text("plan", plan, run.first_step)

    def write(self, record: Mapping[str, float]) -> None:
        step = int(record["step"])
        for key, value in record.items():
            if key == "step" or not math.isfinite(value):  # NaN: a number that is not known
                continue
            self._write_scalar("", _TAGS.get(key, f"other/{key}"), value, step)
            if key in _CURVES:
                self._write_scalar(_CURVES[key], _BOTH, value, step)

    def end(self, outcome: Outcome) -> None:
        for name in tuple(self._writers):
            self._try(name, lambda writer: writer.close())

    def _write_scalar(self, name: str, tag: str, value: float, step: int) -> None:
        self._try(name, lambda writer: writer.add_scalar(tag, value, step))

    def _write_text(self, tag: str, text: str, step: int) -> None:
        code = textwrap.indent(text, " " * 4)  # Markdown shows lines with four spaces as they are
        self._try("", lambda writer: writer.add_text(tag, code, step))

    def _try(self, name: str, act: Callable[["SummaryWriter"], object]) -> None:
        """Call `act` with the writer `name`, if there is one. If writing fails, warn and drop all."""
        try:
            if name in self._writers:
                act(self._writers[name])
        except OSError as error:  # the writer's thread has ended, so the writer is of no more use
            _LOG.warning("nothing more is written for TensorBoard (%s)", error.strerror)
            self._writers.clear()


def _folder(run: RunInfo, name: str) -> Path:
    """Return the folder of event files: the TensorBoard run, whose name is the name of this folder.

    The name is that of the run's folder. A resumed run keeps its first name, even if the folder has moved.
    """
    board = run.folder / name
    if run.resumed_step is not None:
        earlier = sorted(path.parent for path in board.glob("*/events.out.tfevents.*"))
        if earlier:
            return earlier[0]
    return board / run.folder.name
