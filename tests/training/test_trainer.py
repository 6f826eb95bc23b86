"""The training step and the loop of a run, in this process."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from parallel_cases import precision
from programs import words_of

from torchtitan_lite.attention.portable import native
from torchtitan_lite.checkpoint.save import Saver
from torchtitan_lite.config.job import JobConfig, load_job
from torchtitan_lite.config.load import ConfigError
from torchtitan_lite.data import IGNORE, Batch, Loader
from torchtitan_lite.launch.world import Progress, World
from torchtitan_lite.parallel import apply
from torchtitan_lite.training import state
from torchtitan_lite.training.step import NonFinite
from torchtitan_lite.training.trainer import Trainer


def job(*words: object) -> JobConfig:
    return load_job([str(word) for word in words]).config


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.state.model.named_parameters()}


def test_micro_batches_train_like_one_batch_of_their_sum(small_run) -> None:
    runs = []
    for local in (8, 4, 2):
        sizes = ("--training.local-batch-size", local, "--training.global-batch-size", 8)
        # In float32 rounding decides Adam's update of a weight whose gradient is almost 0.
        with precision(double=True):
            trainer = Trainer(job(*small_run, *sizes))
            stats = [trainer.stepper.train_step() for _ in range(3)]
        assert trainer.stepper.accumulation == 8 // local
        runs.append(([(s.loss, s.grad_norm) for s in stats], weights(trainer)))
        assert [s.n_tokens for s in stats] == [8 * 64] * 3
    for numbers, parameters in runs[1:]:
        torch.testing.assert_close(numbers, runs[0][0], rtol=1e-12, atol=0)
        torch.testing.assert_close(parameters, runs[0][1], rtol=0, atol=1e-9)


def on_a_gpu(small_run, attention: str, **overrides: int) -> Trainer:
    """A trainer of a model with a head_dim that every kernel accepts."""
    sizes = {"n_layers": 2, "dim": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 64}
    options = {
        "job.device": "cuda",
        "model.attention": attention,
        "model.overrides": {**sizes, **overrides},
        "training.global-batch-size": 8,
        "training.mixed-precision-param": "bfloat16",
    }
    return Trainer(job(*small_run, *words_of(options)))


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flex", "varlen"])
def test_a_step_waits_for_the_gpu_once(small_run, attention) -> None:
    trainer = on_a_gpu(small_run, attention)
    trainer.stepper.train_step()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.stepper.train_step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [str(each.message) for each in found if "called a synchronizing" in str(each.message)]
    assert len(waits) == 1, waits


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flex", "varlen"])
def test_a_step_copies_only_pinned_memory_to_the_gpu(small_run, attention) -> None:
    trainer = on_a_gpu(small_run, attention, sliding_window=20)
    trainer.stepper.train_step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
    ) as profile:
        trainer.stepper.train_step()
    copies = [event.name for event in profile.events() or () if event.name.startswith("Memcpy HtoD")]
    assert copies and all("Pinned" in name for name in copies), copies


@pytest.mark.parametrize("attention", ["sdpa", "flex", "varlen"])
def test_a_run_on_a_cpu_does_not_touch_a_gpu(small_run, monkeypatch, tmp_path, attention) -> None:
    # Where torch has no CUDA, all else that has to do with a GPU raises.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    saves = ("--checkpoint.enable", "--checkpoint.async-mode", "async_with_pinned_mem", "--training.steps", 1)
    trainer = Trainer(job(*small_run, "--model.attention", attention, *saves), folder=tmp_path / "run")
    (tmp_path / "run").mkdir()
    trainer.run()
    assert (tmp_path / "run/checkpoint/step-1").is_dir()


def test_a_save_may_take_as_long_as_the_start(small_run, monkeypatch, tmp_path: Path) -> None:
    allowed = []
    monkeypatch.setattr(Saver, "save", lambda saver, *_, **__: allowed.append(saver.world.progress.seconds))
    world = World(progress=Progress(seconds=7))
    words = ("--checkpoint.enable", "--training.steps", 1, "--comm.init-timeout-seconds", 300)
    Trainer(job(*small_run, *words), world, folder=tmp_path).run()
    assert allowed == [300] and world.progress.seconds == 7


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in trainer.state.parameters.items() if p.grad is not None}


def test_loss_and_gradients_are_those_of_the_mean_over_all_valid_tokens(small_run, monkeypatch) -> None:
    trainer = Trainer(job(*small_run, "--training.global-batch-size", 8, "--training.max-norm", 0))
    micro = [next(trainer.state.batches) for _ in range(2)]
    micro[0].labels_BS[:, 5:] = IGNORE  # few valid tokens in one micro-batch, many in the other
    (one, n_one), (other, n_other) = (trainer.stepper.loss_of(batch) for batch in micro)
    mean = (one + other) / (n_one + n_other)
    mean.backward()
    expected = gradients(trainer)
    trainer.state.optimizer.zero_grad()
    monkeypatch.setattr(Loader, "__next__", lambda self: micro.pop(0))
    monkeypatch.setattr(trainer.state.optimizer, "zero_grad", lambda: None)
    assert trainer.stepper.train_step().loss == pytest.approx(mean.item(), rel=1e-6)
    torch.testing.assert_close(gradients(trainer), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("max_norm", [0.25, 0])
def test_gradients_are_clipped_to_the_norm_unless_it_is_0(small_run, monkeypatch, max_norm: float) -> None:
    trainer = Trainer(job(*small_run, "--training.max-norm", max_norm))
    monkeypatch.setattr(trainer.state.optimizer, "zero_grad", lambda: None)
    before = trainer.stepper.train_step().grad_norm
    after = torch.stack([gradient.norm() for gradient in gradients(trainer).values()]).norm()
    assert before > 0.3
    assert float(after) == pytest.approx(max_norm or before, rel=1e-3)


def test_every_step_has_the_learning_rate_of_the_schedule(small_run) -> None:
    schedule = ("--lr-scheduler.warmup-steps", 2, "--lr-scheduler.total-steps", 6, "--optimizer.lr", 1e-3)
    trainer = Trainer(job(*small_run, *schedule))
    found = [trainer.stepper.train_step().lr for _ in range(5)]
    assert found == pytest.approx([5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4])


@pytest.mark.parametrize("broken", ["loss", "gradient norm"])
def test_a_number_that_is_not_finite_stops_the_run_before_the_weights_change(
    small_run, broken, monkeypatch
) -> None:
    trainer = Trainer(job(*small_run))
    trainer.stepper.train_step()
    before = weights(trainer)
    if broken == "loss":
        monkeypatch.setattr(trainer.stepper, "loss_of", _times(trainer.stepper.loss_of, math.nan))
    else:
        trainer.state.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(NonFinite, match=rf"^the {broken} of step 2 is .* ids are 4, 5, 6, 7$"):
        trainer.stepper.train_step()
    torch.testing.assert_close(weights(trainer), before, rtol=0, atol=0)


def _times(loss_of, factor: float):
    def broken(batch: Batch):
        loss, count = loss_of(batch)
        return loss * factor, count

    return broken


def test_every_block_gets_the_one_mask_of_its_micro_batch(small_run, monkeypatch) -> None:
    trainer = Trainer(job(*small_run, "--training.global-batch-size", 8))
    made, used = [], []
    config = type(trainer.state.model.config.attention)
    make = config.mask
    monkeypatch.setattr(
        config, "mask", lambda *args, **kwargs: made.append(make(*args, **kwargs)) or made[-1]
    )
    for block in trainer.state.model.blocks:
        block.register_forward_pre_hook(lambda _, args: used.append(args[-1]))
    trainer.stepper.train_step()
    assert len(made) == 2
    assert [id(mask) for mask in used] == [id(mask) for mask in made for _ in range(2)]


def with_window(small_run: list[str], window: int) -> list[str]:
    """The options `small_run` for a model with a sliding window."""
    return [word.replace("}", f', "sliding_window": {window}}}') for word in small_run]


def test_the_sliding_window_of_the_model_reaches_the_mask(small_run) -> None:
    losses = [
        Trainer(job(*argv)).stepper.train_step().loss for argv in (small_run, with_window(small_run, 2))
    ]
    assert losses[0] != losses[1]


def test_weights_and_optimizer_state_are_float32_although_the_model_computes_in_bfloat16(small_run) -> None:
    trainer = Trainer(job(*small_run, "--training.mixed-precision-param", "bfloat16"))
    seen = []
    trainer.state.model.norm.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    trainer.stepper.train_step()
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in trainer.state.model.parameters()} == {torch.float32}
    states = trainer.state.optimizer.state.values()
    assert {x.dtype for state in states for x in state.values()} == {torch.float32}


def test_the_seed_decides_the_weights_and_the_order_of_the_data(small_run) -> None:
    same, again, other = (Trainer(job(*small_run, "--debug.seed", seed)) for seed in (3, 3, 4))
    torch.testing.assert_close(weights(same), weights(again), rtol=0, atol=0)
    assert not torch.equal(weights(same)["embedding.weight"], weights(other)["embedding.weight"])
    first, once_more, another = (next(trainer.state.batches).tokens_BS for trainer in (same, again, other))
    assert torch.equal(first, once_more)
    assert not torch.equal(first, another)


def test_steps_equal_those_of_a_plain_loop(small_run) -> None:
    """The slow reference takes one sample at a time, and spells out each part of a step in plain torch."""
    trainer = Trainer(job(*small_run, "--optimizer.lr", 1e-2, "--training.max-norm", 0.5))
    reference = Trainer(job(*small_run))
    model, batches = reference.state.model, reference.state.batches
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), foreach=False,
    )  # fmt: skip
    for step in range(4):
        batch = next(batches)
        n_valid = (batch.labels_BS >= 0).sum()
        total = 0.0
        for row in range(len(batch.tokens_BS)):
            mask = model.config.attention.mask(batch.positions_BS[row : row + 1])
            inputs = (part[row : row + 1] for part in (batch.tokens_BS, batch.positions_BS))
            loss_sum, _ = model(*inputs, mask, batch.labels_BS[row : row + 1])
            (loss_sum / n_valid).backward()
            total += loss_sum.item() / int(n_valid)
        squares = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None])
        norm = squares.sum().sqrt()
        for p in model.parameters():
            assert p.grad is not None
            p.grad *= min(1.0, 0.5 / norm)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 5)
        optimizer.step()
        optimizer.zero_grad()
        stats = trainer.stepper.train_step()
        assert (stats.loss, stats.grad_norm) == (
            pytest.approx(total, rel=1e-5),
            pytest.approx(norm.item(), rel=1e-4),
        )
        torch.testing.assert_close(weights(trainer), weights(reference), rtol=1e-4, atol=1e-5)


def test_a_run_learns_and_reports_the_steps_that_are_due(small_run, tmp_path: Path) -> None:
    flags = ("--training.steps", 25, "--metrics.log-freq", 10, "--optimizer.lr", 1e-2)
    validation = ("--validation.enable", "--validation.freq", 10, "--validation.steps", 2)
    Trainer(job(*small_run, *flags, *validation), folder=tmp_path).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 10, 20, 25]
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 10, 20, 25]
    assert set(steps[0]) == {
        *("step", "time", "loss", "grad_norm", "lr", "n_tokens_seen", "tokens_per_second", "mfu"),
        *("peak_memory_gib", "data_wait_fraction", "hooks_fraction"),
    }
    assert [line["n_tokens_seen"] for line in steps] == [step * 4 * 64 for step in (1, 10, 20, 25)]
    assert all(0 <= line["data_wait_fraction"] < 1 for line in steps)
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert losses[0] == pytest.approx(math.log(512), abs=0.3)
    assert losses[-1] < losses[0] - 1


def test_validation_does_not_change_training(small_run, tmp_path: Path) -> None:
    curves = []
    for name, flags in (("with", ("--validation.enable", "--validation.freq", 2)), ("without", ())):
        folder = tmp_path / name
        folder.mkdir()
        Trainer(job(*small_run, *flags), folder=folder).run()
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        curves.append([line["loss"] for line in lines if "loss" in line])
    assert curves[0] == curves[1]


def test_the_validation_loss_is_the_mean_over_the_whole_split(small_run, tmp_path: Path) -> None:
    words = ("--validation.enable", "--validation.steps", -1, "--training.steps", 1)
    trainer = Trainer(job(*small_run, *words), folder=tmp_path)
    assert trainer.corpus.held_out is not None
    n = len(trainer.corpus.held_out)
    assert n % 4, "the last batch should be a short one"
    trainer.run()
    with torch.no_grad():
        loss, count = trainer.stepper.loss_of(trainer.corpus.held_out.batch(range(n), range(n)))
    assert trainer.validations[-1].loss == pytest.approx(float(loss / count), rel=1e-6)
    split = trainer.corpus.shards.validation
    per_byte = trainer.validations[-1].loss * split.n_tokens / split.n_bytes
    assert trainer.validations[-1].nats_per_byte == pytest.approx(per_byte)


def test_unusable_data_is_refused_before_the_model_is_built(small_run, monkeypatch) -> None:
    monkeypatch.setattr(state, "build_model", lambda *_, **__: pytest.fail("the model was built"))
    words = ("--validation.enable", "--training.seq-len", 2048, "--data.validation-fraction", 0.01)
    with pytest.raises(ConfigError, match=r"training\.seq_len = 2048"):
        Trainer(job(*small_run, *words))


@pytest.mark.parametrize("attention", ["flex", "varlen"])
@pytest.mark.parametrize("window", [None, 7])
def test_every_backend_gives_the_loss_curve_of_sdpa(small_run, attention: str, window: int | None) -> None:
    """Twenty steps in float32 over packed documents."""
    argv = [*(with_window(small_run, window) if window else small_run)]
    curves = []
    for kind in ("sdpa", attention):
        words = ("--model.attention", kind, "--training.steps", 20, "--optimizer.lr", 1e-2)
        trainer = Trainer(job(*argv, *words))
        assert trainer.state.model.config.attention.kind == kind
        curves.append([trainer.stepper.train_step().loss for _ in range(20)])
    assert curves[0][-1] < curves[0][0] - 1
    assert curves[1] == pytest.approx(curves[0], abs=1e-3)


@pytest.mark.parametrize(
    ("words", "compiled"),
    [
        ([], []),
        (["--compile.enable"], [8]),
        (["--compile.enable", "--model.attention", "varlen"], [8]),
        (["--compile.enable", "--model.attention", "flex"], [8]),
        (["--compile.enable", "--compile.backend", "aot_eager"], []),
    ],
    ids=str,
)
def test_only_a_compiled_run_has_its_own_kernel_for_cpus(small_run, monkeypatch, words, compiled) -> None:
    found = []
    monkeypatch.setattr(apply, "compile_kernel", found.append)
    monkeypatch.setitem(native._KERNELS, 8, object())  # of an earlier trainer
    Trainer(load_job([*small_run, *words]).config)
    assert found == compiled and not native._KERNELS
