"""Speed and memory of the device."""

import pytest
import torch

from torchtitan_lite.training import hardware

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def measured_afresh() -> None:
    hardware.measured_flops.cache_clear()


def test_a_measurement_counts_two_operations_per_multiply_and_add(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(ticks))
    assert hardware.measured_flops(CPU, torch.float32, seconds=1) == 2 * 1024**3


def test_a_measurement_leaves_the_global_generator_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        before = torch.get_rng_state()
        assert 1e7 < hardware.measured_flops(CPU, dtype, seconds=0.01) < 1e15
        assert torch.equal(torch.get_rng_state(), before)


def test_the_device_is_measured_once() -> None:
    first, second = (hardware.measured_flops(CPU, torch.float32, seconds=0.01) for _ in range(2))
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
    monkeypatch.setattr(hardware, "measured_flops", lambda *_: 1.0)
    assert hardware.peak_flops(torch.device("cuda"), dtype) == (tera * 1e12 if tera else 1.0)


def test_peak_memory_of_a_cpu_run_is_that_of_the_process() -> None:
    gibibyte = torch.ones(2**28)
    assert gibibyte.nbytes / 2**30 < hardware.peak_memory_gib(CPU) < 500
