"""The check of the folders where torch keeps compiled code."""

import errno
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from torchtitan_lite import train
from torchtitan_lite.attention import Flex, kernel_cache
from torchtitan_lite.parallel.apply import CompileConfig

NOEXEC = "is mounted with noexec, so no code can be loaded from there"
WITHOUT_TORCH = "import runpy, sys; print(runpy.run_path(sys.argv[1])['fault']('cpu'))"
"""Python code that calls `fault` of the file that it is given."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of TMPDIR, which is the only variable that places compiled code."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@pytest.fixture
def noexec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder is as if it were mounted with noexec."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(mmap, "mmap", refuse)
    monkeypatch.setattr(sys, "platform", "linux")


def test_a_usual_folder_has_no_fault_and_stays_empty(folder: Path) -> None:
    assert kernel_cache.fault("cpu") is None and kernel_cache.fault("cuda") is None
    assert list(folder.iterdir()) == []


def test_a_folder_that_no_code_runs_from_is_a_fault_of_its_variable(
    folder: Path, noexec: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, remedy = kernel_cache.fault("cpu") or ("", "")
    assert rule == f"keeps compiled code in {folder} (TMPDIR), which {NOEXEC}"
    assert remedy == "set TORCHINDUCTOR_CACHE_DIR to a folder on another file system"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "own"))
    rule, _ = kernel_cache.fault("cpu") or ("", "")
    assert rule == f"keeps compiled code in {folder / 'own'} (TORCHINDUCTOR_CACHE_DIR), which {NOEXEC}"


def test_no_variable_is_named_where_none_places_the_folder(
    folder: Path, noexec: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(folder / "missing"))  # so tempfile takes another folder
    rule, _ = kernel_cache.fault("cpu") or ("", "")
    assert rule == f"keeps compiled code in {tempfile.gettempdir()}, which {NOEXEC}"


@pytest.mark.parametrize("device", ["cpu", "cuda", None])
def test_a_folder_that_cannot_be_written_is_a_fault(
    device: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "file" / "own"))
    rule, remedy = kernel_cache.fault(device) or ("", "")
    assert rule.endswith(f"which cannot be written ({os.strerror(errno.ENOTDIR)})")
    assert remedy == "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"


def test_the_folder_of_triton_counts_on_a_gpu_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "file"))
    assert kernel_cache.fault("cpu") is None
    rule, remedy = kernel_cache.fault("cuda") or ("", "")
    assert f"{folder / 'file'} (TRITON_CACHE_DIR)" in rule and remedy.startswith("set TRITON_CACHE_DIR to ")


def test_no_temporary_folder_at_all_is_a_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> NoReturn:
        raise FileNotFoundError

    monkeypatch.setattr(tempfile, "gettempdir", find)
    assert "there is none that can be written" in str(kernel_cache.fault("cpu"))


def test_only_a_run_that_compiles_needs_a_folder_to_load_code_from(folder: Path, noexec: None) -> None:
    (problem,) = CompileConfig(enable=True).problems("compile", "cpu")
    assert str(problem) == (
        f"compile.enable = true keeps compiled code in {folder} (TMPDIR), which {NOEXEC}: "
        "set TORCHINDUCTOR_CACHE_DIR to a folder on another file system, or do not compile"
    )
    assert CompileConfig(enable=True, backend="aot_eager").problems("compile", "cpu") == []
    assert CompileConfig(enable=True).problems("compile") == []  # a dry run
    assert CompileConfig().problems("compile", "cpu") == []


def test_flex_on_a_gpu_compiles_in_any_case(
    folder: Path, noexec: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (refusal,) = Flex().option_refusals("cuda")
    assert (refusal.field, refusal.value) == ("kind", "flex") and NOEXEC in refusal.rule
    assert Flex().option_refusals("cpu") == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Flex().option_refusals("cuda") == []  # a dry run


def test_a_run_is_refused_in_one_line(
    folder: Path, noexec: None, small_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*small_run, "--compile.enable"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"compile.enable = true keeps compiled code in {folder} (TMPDIR), which ")


def test_a_real_mount_with_noexec_is_found(folder: Path) -> None:
    mount = f"mount -t tmpfs -o noexec tmpfs {folder} || exit 77"
    python = [sys.executable, "-c", WITHOUT_TORCH, kernel_cache.__file__]
    if shutil.which("unshare") is None:
        pytest.skip("mounting needs unshare")
    words = ["unshare", "-rm", "sh", "-c", f'{mount}; exec "$@"', "sh", *python]
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    assert f"keeps compiled code in {folder} (TMPDIR), which {NOEXEC}" in done.stdout
