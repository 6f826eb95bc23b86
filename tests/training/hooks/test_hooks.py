"""When hooks are called and with what; hooks that fail or are slow."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hook_cases import DONE, Ready, json_lines, run_info, stats, validation

from torchtitan_lite.config.job import JobConfig, load_job
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.training import hooks as module
from torchtitan_lite.training.hooks import HookFailed, Hooks, Outcome, RunInfo, StepStats
from torchtitan_lite.training.trainer import Trainer

Calls = list[tuple[str, str, Any]]
SAVES = ("--checkpoint.enable", "--checkpoint.interval", "2")
VALIDATES = ("--validation.enable", "--validation.freq", "3", "--data.validation-fraction", "0.2")


class Recorder:
    """A hook that records its calls, and fails in one method if it is told to."""

    def __init__(self, calls: Calls, name: str = "a", fails_in: str = "") -> None:
        self.calls, self.name, self.fails_in = calls, name, fails_in

    def start(self, run: RunInfo) -> None:
        self._record("start", run.first_step)

    def step(self, stats: StepStats) -> None:
        self._record("step", stats.step)

    def validated(self, result: Any) -> None:
        self._record("validated", result.step)

    def saved(self, step: int) -> None:
        self._record("saved", step)

    def end(self, outcome: Outcome) -> None:
        self._record("end", outcome.kind)

    def _record(self, method: str, value: object) -> None:
        self.calls.append((self.name, method, value))
        if method == self.fails_in:
            raise ValueError("no more")


TrainerWith = Callable[..., Trainer]


@pytest.fixture
def trainer_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainerWith:
    """`trainer_with(hook, another, argv=[...])`: the hooks are called after our own."""
    ours = JobConfig.hook_configs.fget
    assert ours is not None

    def build(*hooks: object, argv: list[str], **options: Any) -> Trainer:
        others = {f"hook {number}": Ready(hook) for number, hook in enumerate(hooks, start=1)}
        monkeypatch.setattr(JobConfig, "hook_configs", property(lambda job: {**ours(job), **others}))
        (tmp_path / "run").mkdir(exist_ok=True)
        return Trainer(load_job(argv).config, folder=tmp_path / "run", **options)

    return build


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_run_calls_its_hooks_in_order(mode: str, small_run, trainer_with: TrainerWith) -> None:
    calls: Calls = []
    argv = [*small_run, *SAVES, *VALIDATES, "--checkpoint.async-mode", mode]
    trainer_with(Recorder(calls, "a"), Recorder(calls, "b"), argv=argv).run()
    assert calls[::2] == [("a", *call) for _, *call in calls[1::2]]
    assert {name for name, *_ in calls[1::2]} == {"b"}
    found = [(method, value) for name, method, value in calls if name == "a"]
    expected = [
        ("start", 1),
        ("validated", 0),
        ("step", 1),
        ("step", 2),
        ("saved", 2),
        ("step", 3),
        ("validated", 3),
        ("step", 4),
        ("saved", 4),
        ("step", 5),
        ("validated", 5),
        ("saved", 5),
        ("end", "done"),
    ]
    if mode == "async":  # ranks exchange that a step is saved when they save the next one
        expected = [call for call in expected if call not in (("saved", 2), ("saved", 4))]
        expected.insert(expected.index(("step", 4)) + 1, ("saved", 2))
        expected.insert(-2, ("saved", 4))
    assert found == expected


def test_hooks_learn_about_the_run_and_that_it_was_asked_to_stop(
    small_run, tmp_path: Path, trainer_with: TrainerWith
) -> None:
    seen = []

    class Looking:
        def start(self, run: RunInfo) -> None:
            seen.append(run)

        def end(self, outcome: Outcome) -> None:
            seen.append(outcome)

    asked = iter([False, False, True])
    trainer = trainer_with(Looking(), argv=[*small_run, *SAVES], is_asked=lambda: next(asked))
    trainer.run()
    run, outcome = seen
    assert (run.folder, run.rank, run.world_size) == (tmp_path / "run", 0, 1)
    assert (run.first_step, run.n_steps) == (1, 5)
    assert (run.job, run.model, run.device.type) == (trainer.job, trainer.state.model, "cpu")
    assert outcome == Outcome(kind="stopped")
    assert trainer.state.step == 2


@pytest.mark.parametrize("method", ["start", "step", "validated", "saved"])
def test_a_hook_that_raises_ends_the_run_with_its_name_and_the_other_hooks_are_ended(
    method: str, small_run, trainer_with: TrainerWith
) -> None:
    calls: Calls = []
    failing, other = Recorder([], fails_in=method), Recorder(calls)
    trainer = trainer_with(other, failing, argv=[*small_run, *SAVES, *VALIDATES])
    message = rf'hook "hook 2" failed in {method}\(\): ValueError: no more'
    with pytest.raises(HookFailed, match=message) as caught:
        trainer.run()
    assert isinstance(caught.value.__cause__, ValueError)
    assert calls[-1] == ("a", "end", "failed")
    is_started = method != "start"
    assert (("a", "end", "failed") in failing.calls) == is_started


def test_all_hooks_are_ended_although_one_fails_in_end() -> None:
    calls: Calls = []
    hooks = Hooks(
        {"first": Ready(Recorder(calls, fails_in="end")), "second": Ready(Recorder(calls, "b"))}, run_info()
    )
    hooks.start()
    with pytest.raises(HookFailed, match=r'hook "first" failed in end\(\)'):
        hooks.end(DONE)
    assert calls[-1] == ("b", "end", "done")


def test_a_hook_that_fails_in_end_after_the_run_has_failed_is_only_logged(caplog) -> None:
    hooks = Hooks({"first": Ready(Recorder([], fails_in="end"))}, run_info())
    hooks.start()
    with caplog.at_level(logging.ERROR):
        hooks.end(Outcome(kind="failed", error=KeyError("before")))
    assert 'hook "first" failed in end(): ValueError: no more' in caplog.text


def test_a_hook_need_not_have_every_method() -> None:
    class Ending:
        def end(self, outcome: Outcome) -> None: ...

    hooks = Hooks({"ending": Ready(Ending())}, run_info())
    hooks.start()
    hooks.step(stats(1))
    hooks.validated(validation(1, 1.0))
    hooks.saved(1)
    hooks.end(DONE)


def test_a_rank_need_not_have_a_hook() -> None:
    Hooks({"none": Ready(None)}, run_info()).start()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ConfigError([Problem("hooks.x", 1, "is wrong", "use 2")]), ConfigError),
        (KeyError("x"), HookFailed),
    ],
    ids=["wrong input", "a bug"],
)
def test_wrong_input_found_while_a_hook_is_built_is_an_error_of_the_user(error: Exception, raised) -> None:
    class Failing:
        def build(self, run: RunInfo) -> object:
            raise error

    with pytest.raises(raised):
        Hooks({"failing": Failing()}, run_info())


def test_a_pipe_of_a_hook_that_breaks_is_a_failure_of_the_hook() -> None:
    class Sending:
        def step(self, stats: StepStats) -> None:
            raise BrokenPipeError

    with pytest.raises(HookFailed, match=r'hook "sending" failed in step\(\): BrokenPipeError'):
        Hooks({"sending": Ready(Sending())}).step(stats(1))


def test_a_slow_hook_shows_in_the_time_of_the_step(
    small_run, tmp_path: Path, monkeypatch, capsys, trainer_with: TrainerWith
) -> None:
    now = 0.0

    class Slow:
        def step(self, stats: StepStats) -> None:
            nonlocal now
            now += 1000.0

        def validated(self, result: Any) -> None:
            nonlocal now
            now += 500.0

    monkeypatch.setattr(module, "perf_counter", lambda: now)
    argv = [*small_run, *VALIDATES, "--training.steps", "4"]
    trainer_with(Slow(), argv=argv).run()
    steps = [line for line in json_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    # Hooks that ran before each step: a validation; a step; a step; a step and a validation.
    seconds = [500, 1000, 1000, 1500]
    for line, slow in zip(steps, seconds, strict=True):
        total = 4 * 64 / line["tokens_per_second"]
        assert line["hooks_fraction"] * total == pytest.approx(slow)
        assert slow < total < slow + 400
    assert all("  hooks " in line for line in capsys.readouterr().out.splitlines() if " tokens/s " in line)


def test_the_time_of_our_own_hooks_counts_too(small_run, tmp_path: Path, trainer_with: TrainerWith) -> None:
    argv = [*small_run, "--metrics.enable-tensorboard", "true", "--training.steps", "20"]
    trainer_with(argv=argv).run()
    lines = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["hooks_fraction"] == 0  # no hook is timed before the first step
    assert all(0 < line["hooks_fraction"] < 1 for line in lines[1:])


def test_a_failing_hook_ends_the_program_with_its_name_and_status_1(run, small_run, tmp_path: Path) -> None:
    (tmp_path / "failing_hook.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import Literal\n"
        "from torchtitan_lite.registry import hooks\n"
        "@hooks.register\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine:\n"
        "    name: Literal['mine'] = 'mine'\n"
        "    def build(self, run): return self\n"
        "    def step(self, stats): raise ValueError('no more')\n"
    )
    (tmp_path / "run.toml").write_text('job.plugins = ["failing_hook"]\n')
    done = run("-m", "torchtitan_lite.train", *small_run, "--config", tmp_path / "run.toml")
    assert done.returncode == 1
    assert 'HookFailed: hook "mine" failed in step(): ValueError: no more' in done.stderr
    assert "ValueError: no more\n\nThe above exception was the direct cause" in done.stderr
    assert json.loads((tmp_path / "run" / "exit.json").read_text()) == {
        "status": 1,
        "outcome": "failed",
        "step": 1,
        "message": 'hook "mine" failed in step(): ValueError: no more',
    }
    assert [line["step"] for line in json_lines(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_a_hook_that_exits_has_failed_unless_a_signal_is_the_reason() -> None:
    class Leaving:
        def __init__(self, code: object) -> None:
            self.code = code

        def step(self, stats: StepStats) -> None:
            raise SystemExit(self.code)

    for code in (0, 3, "no more"):
        with pytest.raises(HookFailed, match='hook "leaving" failed in step'):
            Hooks({"leaving": Ready(Leaving(code))}).step(stats(1))
    with pytest.raises(SystemExit, match="143"):
        Hooks({"leaving": Ready(Leaving(143))}).step(stats(1))


def test_an_object_without_any_method_of_a_hook_is_refused() -> None:
    with pytest.raises(
        HookFailed, match=r'hook "mine" failed in build\(\): TypeError: a hook has any of start'
    ):
        Hooks({"mine": Ready(object())}, run_info())


def test_a_hook_that_fails_in_the_last_save_of_a_failed_run_does_not_hide_the_first_error(
    small_run, trainer_with: TrainerWith, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong:
        def step(self, stats: StepStats) -> None:
            if stats.step == 3:
                raise ValueError("the true cause")

        def saved(self, step: int) -> None:
            raise ValueError("another")

    argv = [*small_run, *SAVES, "--checkpoint.interval", "2", "--checkpoint.async-mode", "async"]
    with pytest.raises(HookFailed, match="the true cause"):
        trainer_with(Wrong(), argv=argv).run()
    assert any("failed in saved(): ValueError: another" in message for message in caplog.messages)
