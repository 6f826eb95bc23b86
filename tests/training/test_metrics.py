"""The numbers of reports, how often there is a report, and the speed and memory of the device."""

from collections.abc import Mapping

import pytest
import torch
from hook_cases import run_info, stats

from torchtitan_lite.training import metrics
from torchtitan_lite.training.metrics import MetricsConfig, Reporter

CPU = torch.device("cpu")


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


@pytest.fixture(autouse=True)
def measured_afresh() -> None:
    metrics.measured_flops.cache_clear()


def test_a_measurement_counts_two_operations_per_multiply_and_add(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(ticks))
    assert metrics.measured_flops(CPU, torch.float32, seconds=1) == 2 * 1024**3


def test_a_measurement_leaves_the_global_generator_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        before = torch.get_rng_state()
        assert 1e7 < metrics.measured_flops(CPU, dtype, seconds=0.01) < 1e15
        assert torch.equal(torch.get_rng_state(), before)


def test_the_device_is_measured_once() -> None:
    first, second = (metrics.measured_flops(CPU, torch.float32, seconds=0.01) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H200", torch.bfloat16, 989),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("NVIDIA L40", torch.bfloat16, 181),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA H100 80GB HBM3", torch.float32, None),
        ("a GPU of next year", torch.bfloat16, None),
    ],
)
def test_a_gpu_has_its_makers_figure_if_there_is_one_and_is_measured_otherwise(
    name: str, dtype: torch.dtype, tera: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(metrics, "measured_flops", lambda *_: 1.0)
    assert metrics.peak_flops(torch.device("cuda"), dtype) == (tera * 1e12 if tera else 1.0)


def test_peak_memory_of_a_cpu_run_is_that_of_the_process() -> None:
    gibibyte = torch.ones(2**28)
    assert gibibyte.nbytes / 2**30 < metrics.peak_memory_gib(CPU) < 500
