"""The settings of the process; test_train.py compares whole deterministic runs."""

import gc
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import programs
import pytest
import torch
from programs import FreshProgram

from torchtitan_lite import train
from torchtitan_lite.launch import process
from torchtitan_lite.training.step import Stepper
from torchtitan_lite.training.trainer import Trainer

USUAL = gc.get_threshold()


def set_up(device: str, *, seed: int = 0, deterministic: bool = False, uses_inductor: bool = False) -> None:
    process.set_up_process(device=device, seed=seed, deterministic=deterministic, uses_inductor=uses_inductor)


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch):
    """Put back the settings of the whole process."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]


def test_a_process_whose_modules_another_process_imported_is_no_orphan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "_launcher", 0)
    assert process.is_orphan()
    with process.starting():
        assert not process.is_orphan()


def test_garbage_is_not_collected_at_the_end_of_a_start() -> None:
    events: list[str] = []
    gc.callbacks.append(watch := lambda phase, info: events.append(phase))
    try:
        with process.starting():
            kept = [[number] for number in range(20_000)]
        kept += [[number] for number in range(USUAL[0] // 2)]
    finally:
        gc.callbacks.remove(watch)
    assert not events and gc.get_threshold() == USUAL


def test_a_deterministic_run_refuses_kernels_whose_result_depends_on_timing() -> None:
    set_up("cuda", deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.ones(4).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)


def test_an_ordinary_run_may_use_every_kernel() -> None:
    set_up("cuda")
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_the_seed_reaches_torch() -> None:
    draws = []
    for seed in (1, 1, 2):
        set_up("cuda", seed=seed)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has these settings")
@pytest.mark.parametrize(("device", "wanted"), [("cpu", [1, 1]), ("cuda", [])])
def test_glibc_accepts_the_settings_that_keep_freed_memory_on_a_cpu(
    device: str, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mallopt, accepted = process.ctypes.CDLL(None).mallopt, []
    library = SimpleNamespace(mallopt=lambda *setting: accepted.append(mallopt(*setting)))
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: library)
    set_up(device)
    assert accepted == wanted


@pytest.mark.parametrize("error", [AttributeError, OSError])
def test_other_c_libraries_keep_their_settings(error, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: None) -> None:
        raise error

    monkeypatch.setattr(process.ctypes, "CDLL", load)
    set_up("cpu")


@pytest.mark.parametrize(
    ("device", "capability", "before", "after"),
    [
        ("cpu", "AVX512", None, True),
        ("cpu", "AVX512", False, False),
        ("cpu", "DEFAULT", None, None),
        ("cuda", "AVX512", None, None),
    ],
)
def test_inductor_does_not_try_out_vector_instructions_and_recomputes_cheap_inputs(
    device: str, capability: str, before: bool | None, after: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    patched = {"ban_recompute_materialized_backward": True}
    with inductor.patch({"cpp.vec_isa_ok": before}), functorch.patch(patched):
        set_up(device)
        assert (inductor.cpp.vec_isa_ok, functorch.ban_recompute_materialized_backward) == (before, True)
        set_up(device, uses_inductor=True)
        assert (inductor.cpp.vec_isa_ok, functorch.ban_recompute_materialized_backward) == (after, False)


def test_garbage_collection_is_rare_until_training_begins(small_run, monkeypatch) -> None:
    seen = []
    begin, step = Trainer.__init__, Stepper.train_step
    look = lambda: seen.append(gc.get_threshold())
    monkeypatch.setattr(Trainer, "__init__", lambda *a, **k: (look(), begin(*a, **k))[1])
    monkeypatch.setattr(Stepper, "train_step", lambda *a: (look(), step(*a))[1])
    assert train.main([*small_run, "--training.steps", "2"]) == 0
    assert seen[0][0] >= 50 * USUAL[0] and seen[1:] == [USUAL, USUAL]
    assert gc.get_threshold() == USUAL and gc.isenabled() and not gc.get_freeze_count()


@pytest.mark.parametrize("words", [["--no-such-option"], ["--dry-run"]])
def test_garbage_collection_is_as_usual_after_a_start_that_fails_or_only_prints(words, capsys) -> None:
    train.main(words)
    assert gc.get_threshold() == USUAL


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "torchtitan_lite.train", "--dry-run"],
        ["-m", "torchtitan_lite", "generate", "somewhere"],
        ["-m", "torchtitan_lite", "models"],
    ],
    ids=["train", "generate", "models"],
)
def test_an_interrupt_during_the_import_of_torch_ends_the_process_with_one_line(
    words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    # Like an import in C, this module loses the exception.
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(1)\n"
        "except KeyboardInterrupt:\n"
        "    pass\n"
    )
    # PYTHONPATH is searched before the folder of the packages, and -m searches the working directory first.
    found = FreshProgram(words, cwd=tmp_path, env=programs.environment())
    out, err = found.communicate(timeout=60)
    assert (out, err, found.returncode) == ("", "interrupted\n", 130)


def test_a_second_interrupt_at_the_end_of_a_process_prints_no_traceback() -> None:
    code = """
import atexit, os, signal
from torchtitan_lite.launch.process import end_process
atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), sum(range(1000))))
end_process(130)
"""
    found = FreshProgram(["-c", code])
    assert found.communicate(timeout=60) == ("", "")
    assert found.returncode == -signal.SIGINT
