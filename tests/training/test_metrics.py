"""The numbers of reports, how often there is a report, and the speed and memory of the device."""

import math
from collections.abc import Mapping

import pytest
import torch
from hook_cases import job_with, run_info, stats

from torchtitan_lite.training import metrics
from torchtitan_lite.training.metrics import MetricsConfig, Peak, Reporter

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
    reporter.start(run_info(n_steps=n_steps, world_size=2, job=job_with(metrics=config)))
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


def test_a_measurement_counts_two_operations_per_multiply_and_add(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(ticks))
    assert metrics.measured_flops(CPU, torch.float32, seconds=1) == 2 * 1024**3


def test_a_measurement_leaves_the_global_generator_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        before = torch.get_rng_state()
        assert 1e7 < metrics.measured_flops(CPU, dtype, seconds=0.01) < 1e15
        assert torch.equal(torch.get_rng_state(), before)


def test_all_hooks_that_report_share_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([1e3, 2e3, 4e3])
    monkeypatch.setattr(metrics, "measured_flops", lambda *_: next(measured))
    run = run_info(job=job_with(metrics=MetricsConfig(log_freq=1)), flops_per_token=10.0)
    hooks = [Recorder(run.job.metrics) for _ in range(3)]
    for hook in hooks:
        hook.start(run)
    taken = stats(1, seconds=0.4)  # 2500 FLOP per second: above the first two measurements
    for hook in hooks:
        hook.step(taken)
    assert [len(hook.records) for hook in hooks] == [1, 1, 1]
    assert all(hook.records[0] is hooks[0].records[0] for hook in hooks)
    assert math.isnan(hooks[2].records[0]["mfu"])


def test_a_figure_above_the_peak_has_the_processor_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, now = [1e9], 0.0
    monkeypatch.setattr(metrics, "measured_flops", lambda *_: measured[-1])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    peak = Peak(CPU, torch.float32)
    assert peak.share(5e8) == 0.5
    measured.append(4e9)  # the other programs have ended
    assert peak.share(2e9) == 0.5
    measured.append(1e9)
    now = 1000.0
    assert peak.share(2e9) == 0.5  # the best measurement counts


def test_no_figure_is_above_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "measured_flops", lambda *_: 1e9)
    peak = Peak(CPU, torch.float32)
    assert peak.share(1e9) == 1.0
    assert all(math.isnan(peak.share(1.8e9)) for _ in range(100))


def test_a_given_peak_below_the_speed_of_the_run_gives_no_figure_and_one_warning(caplog) -> None:
    peak = Peak(CPU, torch.float32, given=1e9)
    assert [math.isnan(peak.share(flops)) for flops in (2e9, 3e9, 5e8)] == [True, True, False]
    assert caplog.messages == ["no MFU is reported: the run computes more than metrics.peak_flops = 1e+09"]


@pytest.mark.parametrize("share", [0.5, 1.5])
def test_measuring_again_takes_less_than_half_a_percent_of_the_time(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, n_measured = 0.0, 0

    def measure(*_: object) -> float:
        nonlocal now, n_measured
        now, n_measured = now + 0.1, n_measured + 1
        return 1e9

    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    monkeypatch.setattr(metrics, "measured_flops", measure)
    peak = Peak(CPU, torch.float32)
    for _ in range(1000):
        now += 1.0
        peak.share(share * 1e9)
    assert 30 <= n_measured <= 1 + 0.005 * 1000 / 0.1


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
