"""The numbers of reports, and how often there is a report."""

from collections.abc import Mapping

import pytest
from hook_cases import run_info, stats

from torchtitan_lite.training.metrics import MetricsConfig, Reporter


class Recorder(Reporter):
    """Keeps the records."""

    def __init__(self, config: MetricsConfig) -> None:
        super().__init__(config)
        self.records: list[Mapping[str, float]] = []

    def write(self, record: Mapping[str, float]) -> None:
        self.records.append(record)


def reports(config: MetricsConfig, n_steps: int = 4) -> list[Mapping[str, float]]:
    """The reports of a run in which step n takes n halves of a second."""
    reporter = Recorder(config)
    reporter.start(run_info(n_steps=n_steps, world_size=2))
    for step in range(1, n_steps + 1):
        reporter.step(stats(step, seconds=0.5 * step, hook_seconds=0.1 * step))
    return reporter.records


def test_speed_is_tokens_over_the_time_of_the_steps_since_the_last_report() -> None:
    _, _, last = reports(MetricsConfig(log_freq=2, peak_flops=3e6))
    assert last == {
        "step": 4,
        "loss": 2.5,
        "grad_norm": 1.25,
        "lr": 1e-3,
        "n_tokens_seen": 400,
        "tokens_per_second": pytest.approx(200 / 3.5),
        "mfu": pytest.approx(200 / 3.5 * 3e3 / 6e6),
        "peak_memory_gib": 0.75,
        "data_wait_fraction": pytest.approx(0.1 / 3.5),
        "hooks_fraction": pytest.approx(0.7 / 3.5),
    }


def test_the_first_the_last_and_every_log_freqth_step_are_reported() -> None:
    found = reports(MetricsConfig(log_freq=3, peak_flops=1.0), n_steps=8)
    assert [report["step"] for report in found] == [1, 3, 6, 8]
