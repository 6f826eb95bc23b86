"""Compiled blocks give the numbers of eager blocks, and inductor is set up as it should be."""

import pytest
import torch
import torch._dynamo

from torchtitan_lite.config.job import load_job
from torchtitan_lite.parallel.apply import CompileConfig, prepare_compile
from torchtitan_lite.training.trainer import Trainer

INDUCTOR = pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.compiler])


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize("attention", ["sdpa", "flex", "varlen"])
def test_compiled_blocks_train_to_the_losses_of_eager_ones(small_run, attention: str, backend: str) -> None:
    torch._dynamo.reset()
    flags = [*small_run, "--model.attention", attention, "--optimizer.lr", "1e-2"]
    flags += ["--compile.backend", backend]
    curves = []
    for compile in ("--compile.no-enable", "--compile.enable"):
        trainer = Trainer(load_job([*flags, compile]).config)
        curves.append([trainer.stepper.train_step().loss for _ in range(5)])
        compiled = [block._compiled_call_impl is not None for block in trainer.state.model.blocks]
        assert compiled == [compile == "--compile.enable"] * 2
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)


def test_all_blocks_share_one_compiled_graph(small_run) -> None:
    torch._dynamo.reset()
    trainer = Trainer(load_job([*small_run, "--compile.enable", "--compile.backend", "aot_eager"]).config)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(3):
        trainer.stepper.train_step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


def test_an_unknown_backend_is_a_problem_with_the_near_miss() -> None:
    (problem,) = CompileConfig(enable=True, backend="inductr").problems("compile")
    assert (
        str(problem)
        == 'compile.backend = "inductr" is not a backend of torch.compile: did you mean "inductor"?'
    )


def test_compiling_for_a_cpu_without_a_compiler_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    (problem,) = CompileConfig(enable=True).problems("compile", device="cpu")
    assert str(problem).startswith("compile.enable = true needs a C++ compiler, and ")
    assert CompileConfig(enable=True).problems("compile", device="cuda") == []
    assert CompileConfig(enable=True, backend="aot_eager").problems("compile", device="cpu") == []
    assert CompileConfig().problems("compile", device="cpu") == []


@pytest.mark.parametrize("set_before", [None, False])
def test_inductor_does_not_try_out_vector_instructions_unless_asked_to(monkeypatch, set_before) -> None:
    from torch._inductor import config

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with config.patch({"cpp.vec_isa_ok": set_before}):
        prepare_compile(CompileConfig(enable=True), device="cpu", head_dim=8)
        assert config.cpp.vec_isa_ok is (set_before is None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    with config.patch({"cpp.vec_isa_ok": None}):
        prepare_compile(CompileConfig(enable=True), device="cpu", head_dim=8)
        assert config.cpp.vec_isa_ok is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_compiled_backward_recomputes_cheap_inputs_on_every_device(device: str) -> None:
    from torch._functorch import config

    for compile, wanted in ((CompileConfig(), True), (CompileConfig(enable=True), False)):
        with config.patch({"ban_recompute_materialized_backward": True}):
            prepare_compile(compile, device=device, head_dim=8)
            assert config.ban_recompute_materialized_backward is wanted
