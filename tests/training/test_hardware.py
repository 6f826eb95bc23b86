"""What the device can do."""

import sys
from types import SimpleNamespace

import pytest
import torch

from torchtitan_lite.training import hardware

CPU = torch.device("cpu")


def test_a_measurement_counts_two_operations_per_multiply_and_add(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(ticks))
    assert hardware.measured_flops(CPU, torch.float32, seconds=1) == 2 * 1024**3


def test_a_cpu_is_measured_in_the_precision_of_the_run() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        before = torch.get_rng_state()
        assert 1e7 < hardware.measured_flops(CPU, dtype, seconds=0.01) < 1e15
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
    ],
)
def test_a_known_gpu_has_its_makers_figure(name: str, tera: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert hardware.peak_flops(torch.device("cuda"), torch.bfloat16) == tera * 1e12


def test_the_makers_figure_is_not_used_for_another_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(hardware, "measured_flops", lambda *_: 1.0)
    assert hardware.peak_flops(torch.device("cuda"), torch.float32) == 1.0


def test_an_unknown_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU of next year")
    monkeypatch.setattr(hardware, "measured_flops", lambda *_: 1.0)
    assert hardware.peak_flops(torch.device("cuda"), torch.bfloat16) == 1.0


def test_peak_memory_of_a_cpu_run_is_that_of_the_process() -> None:
    gibibyte = torch.ones(2**28)
    assert gibibyte.nbytes / 2**30 < hardware.peak_memory_gib(CPU) < 500


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has the settings")
def test_glibc_takes_the_settings_that_keep_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    real, taken = hardware.ctypes.CDLL(None).mallopt, []
    library = SimpleNamespace(mallopt=lambda *setting: taken.append((setting, real(*setting))))
    monkeypatch.setattr(hardware.ctypes, "CDLL", lambda name: library)
    hardware.keep_freed_memory()
    assert taken == [((-1, 2**31 - 1), 1), ((-3, 32 << 20), 1)]  # 1: it was taken


def test_other_c_libraries_keep_their_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in (object(), OSError):

        def load(name: None, found: object = library) -> object:
            if found is OSError:
                raise OSError
            return found

        monkeypatch.setattr(hardware.ctypes, "CDLL", load)
        hardware.keep_freed_memory()
