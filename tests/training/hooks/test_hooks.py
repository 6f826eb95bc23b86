"""When hooks are called, with what, and what comes of one that fails or is slow."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import resume_cases
from hook_cases import DONE, Ready, json_lines, run_info, stats, validation

from torchtitan_lite.config.job import JobConfig, load_job
from torchtitan_lite.config.load import ConfigError, Problem
from torchtitan_lite.training import hooks as module
from torchtitan_lite.training.hooks import HookFailed, Hooks, Outcome, RunInfo, StepStats
from torchtitan_lite.training.trainer import Trainer

Calls = list[tuple[str, str, Any]]
SAVES = ("--checkpoint.enable", "--checkpoint.interval", "2")
VALIDATES = ("--validation.enable", "--validation.freq", "3", "--data.validation-fraction", "0.2")


class Noting:
    """A hook that notes its calls, and fails in one method if it is told to."""

    def __init__(self, calls: Calls, name: str = "a", fails_in: str = "") -> None:
        self.calls, self.name, self.fails_in = calls, name, fails_in

    def start(self, run: RunInfo) -> None:
        self._note("start", run.first_step)

    def step(self, stats: StepStats) -> None:
        self._note("step", stats.step)

    def validated(self, result: Any) -> None:
        self._note("validated", result.step)

    def saved(self, step: int) -> None:
        self._note("saved", step)

    def end(self, outcome: Outcome) -> None:
        self._note("end", outcome.kind)

    def _note(self, method: str, value: object) -> None:
        self.calls.append((self.name, method, value))
        if method == self.fails_in:
            raise ValueError("no more")


def trainer_with(*hooks: object, argv: list[str], folder: Path) -> Trainer:
    configs = [(f"hook {number}", Ready(hook)) for number, hook in enumerate(hooks, start=1)]
    folder.mkdir(exist_ok=True)
    job = load_job(argv).config
    return Trainer(job, folder=folder, hooks=[*job.hook_configs.items(), *configs])


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_run_calls_every_hook_in_order(mode: str, small_run, tmp_path: Path) -> None:
    calls: Calls = []
    argv = [*small_run, *SAVES, *VALIDATES, "--checkpoint.async-mode", mode]
    trainer_with(Noting(calls, "a"), Noting(calls, "b"), argv=argv, folder=tmp_path / "run").run()
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
    if mode == "async":  # all ranks know of a step when the next one is saved
        expected = [call for call in expected if call not in (("saved", 2), ("saved", 4))]
        expected.insert(expected.index(("step", 4)) + 1, ("saved", 2))
        expected.insert(-2, ("saved", 4))
    assert found == expected


def test_hooks_are_told_of_the_run_and_of_the_end_of_one_that_is_asked_to_stop(
    small_run, tmp_path: Path
) -> None:
    seen = []

    class Looking:
        def start(self, run: RunInfo) -> None:
            seen.append(run)

        def end(self, outcome: Outcome) -> None:
            seen.append(outcome)

    job = load_job([*small_run, *SAVES]).config
    asked = iter([False, False, True])
    hooks = [("looking", Ready(Looking()))]
    (tmp_path / "run").mkdir()
    trainer = Trainer(job, folder=tmp_path / "run", hooks=hooks, is_asked=lambda: next(asked))
    trainer.run()
    run, outcome = seen
    assert (run.folder, run.rank, run.world_size, run.first_step, run.n_steps) == (
        tmp_path / "run",
        0,
        1,
        1,
        5,
    )
    assert (run.job, run.model, run.device.type) == (job, trainer.state.model, "cpu")
    assert outcome == Outcome(kind="stopped")
    assert trainer.state.step == 2


@pytest.mark.parametrize("method", ["start", "step", "validated", "saved"])
def test_a_hook_that_raises_ends_the_run_with_its_name_and_the_others_hear_of_it(
    method: str, small_run, tmp_path: Path
) -> None:
    calls: Calls = []
    failing, other = Noting([], fails_in=method), Noting(calls)
    trainer = trainer_with(other, failing, argv=[*small_run, *SAVES, *VALIDATES], folder=tmp_path / "run")
    message = rf'hook "hook 2" failed in {method}\(\): ValueError: no more'
    with pytest.raises(HookFailed, match=message) as caught:
        trainer.run()
    assert isinstance(caught.value.__cause__, ValueError)
    assert calls[-1] == ("a", "end", "failed")
    is_started = method != "start"
    assert (("a", "end", "failed") in failing.calls) == is_started


def test_a_hook_that_fails_at_the_end_keeps_none_from_closing_its_files() -> None:
    calls: Calls = []
    hooks = Hooks([("first", Noting(calls, fails_in="end")), ("second", Noting(calls, "b"))], run_info())
    hooks.start()
    with pytest.raises(HookFailed, match=r'hook "first" failed in end\(\)'):
        hooks.end(DONE)
    assert calls[-1] == ("b", "end", "done")


def test_a_failure_at_the_end_of_a_run_that_has_failed_is_logged_alone(caplog) -> None:
    hooks = Hooks([("first", Noting([], fails_in="end"))], run_info())
    hooks.start()
    with caplog.at_level(logging.ERROR):
        hooks.end(Outcome(kind="failed", error=KeyError("before")))
    assert 'hook "first" failed in end(): ValueError: no more' in caplog.text


def test_a_hook_need_not_have_any_method() -> None:
    hooks = Hooks([("nothing", object())], run_info())
    hooks.start()
    hooks.step(stats(1))
    hooks.validated(validation(1, 1.0))
    hooks.saved(1)
    hooks.end(DONE)


def test_a_hook_without_use_for_this_rank_is_left_out() -> None:
    Hooks.build([("none", Ready(None))], run_info()).start()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ConfigError([Problem("hooks.x", 1, "is wrong", "use 2")]), ConfigError),
        (KeyError("x"), HookFailed),
    ],
    ids=["wrong input", "a bug"],
)
def test_wrong_input_that_is_found_as_a_hook_is_made_is_the_users(error: Exception, raised) -> None:
    class Failing:
        def build(self, run: RunInfo) -> object:
            raise error

    with pytest.raises(raised):
        Hooks.build([("failing", Failing())], run_info())


def test_output_that_nobody_reads_is_no_failure_of_a_hook() -> None:
    class Printing:
        def step(self, stats: StepStats) -> None:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Hooks([("printing", Printing())]).step(stats(1))


def test_a_failing_hook_of_a_run_leaves_its_name_in_the_folder(
    small_run, tmp_path: Path, monkeypatch
) -> None:
    ours = JobConfig.hook_configs.fget
    assert ours is not None
    mine = {"mine": Ready(Noting([], fails_in="step"))}
    monkeypatch.setattr(JobConfig, "hook_configs", property(lambda job: {**ours(job), **mine}))
    with pytest.raises(HookFailed):
        resume_cases.main(*small_run)
    assert json.loads((tmp_path / "run" / "exit.json").read_text()) == {
        "status": 1,
        "outcome": "failed",
        "step": 1,
        "message": 'hook "mine" failed in step(): ValueError: no more',
    }
    assert [line["step"] for line in json_lines(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_a_slow_hook_shows_in_the_time_of_the_step(small_run, tmp_path: Path, monkeypatch, capsys) -> None:
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
    trainer_with(Slow(), argv=argv, folder=tmp_path / "run").run()
    steps = [line for line in json_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    # Before the first step there is a validation, before each other one a step, and before the fourth both.
    seconds = [500, 1000, 1000, 1500]
    for line, slow in zip(steps, seconds, strict=True):
        total = 4 * 64 / line["tokens_per_second"]
        assert line["hooks_fraction"] * total == pytest.approx(slow)
        assert slow < total < slow + 400
    assert all("  hooks " in line for line in capsys.readouterr().out.splitlines() if " tokens/s " in line)


def test_the_time_of_our_own_hooks_counts_too(small_run, tmp_path: Path) -> None:
    argv = [*small_run, "--metrics.enable-tensorboard", "true", "--training.steps", "20"]
    trainer_with(argv=argv, folder=tmp_path / "run").run()
    lines = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert lines[0]["hooks_fraction"] == 0  # nothing is called before the first step
    assert all(0 < line["hooks_fraction"] < 1 for line in lines[1:])


def test_the_exit_status_of_a_failing_hook_is_1(run, small_run, tmp_path: Path) -> None:
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


def test_a_hook_that_ends_the_process_fails_and_a_signal_does_not() -> None:
    class Leaving:
        def __init__(self, code: object) -> None:
            self.code = code

        def step(self, stats: StepStats) -> None:
            raise SystemExit(self.code)

    for code in (0, 3, "no more"):
        with pytest.raises(HookFailed, match='hook "leaving" failed in step'):
            Hooks([("leaving", Leaving(code))]).step(stats(1))
    with pytest.raises(SystemExit, match="143"):
        Hooks([("leaving", Leaving(143))]).step(stats(1))


def test_an_object_without_any_method_of_a_hook_is_refused() -> None:
    with pytest.raises(
        HookFailed, match=r'hook "mine" failed in build\(\): TypeError: a hook has any of start'
    ):
        Hooks.build([("mine", Ready(object()))], run_info())


def test_a_reader_that_has_had_enough_is_no_failure_of_a_hook(caplog: pytest.LogCaptureFixture) -> None:
    class Printing:
        def end(self, outcome: Outcome) -> None:
            raise BrokenPipeError

    hooks = Hooks.build([("printing", Ready(Printing()))], run_info())
    hooks.start()
    hooks.end(Outcome(kind="failed", error=ValueError()))
    assert caplog.messages == []


def test_a_hook_that_fails_as_a_failed_run_saves_does_not_hide_why_it_failed(
    small_run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong:
        def step(self, stats: StepStats) -> None:
            if stats.step == 3:
                raise ValueError("the true cause")

        def saved(self, step: int) -> None:
            raise ValueError("another")

    argv = [*small_run, *SAVES, "--checkpoint.interval", "2", "--checkpoint.async-mode", "async"]
    with pytest.raises(HookFailed, match="the true cause"):
        trainer_with(Wrong(), argv=argv, folder=tmp_path / "run").run()
    assert any("failed in saved(): ValueError: another" in message for message in caplog.messages)


def test_no_hooks_are_none(small_run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    Trainer(load_job(small_run).config, folder=tmp_path / "run", hooks=[]).run()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
