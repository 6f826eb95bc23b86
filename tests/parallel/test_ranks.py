"""The ranks that functions run on: what ranks.py promises the tests that use it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import parallel_cases as cases
import pytest
import ranks as ranks_module
import torch
from ranks import RankFailed

TESTS = Path(__file__).parents[1]


@pytest.mark.gpu
def test_a_rank_can_use_a_gpu(ranks) -> None:
    """Of a process that has looked for one, no fork can: torch must not look when it is imported."""
    assert ranks(1).run(cases.device_of_a_tensor_on_a_gpu) == ["cuda:0"]


def test_results_come_in_rank_order_from_one_process_group(ranks) -> None:
    assert ranks(2).run(cases.sum_over_ranks, 10) == [(0, 2, 21.0), (1, 2, 21.0)]


def test_every_run_has_processes_of_its_own(ranks) -> None:
    three = ranks(3)
    assert len({os.getpid(), *three.run(cases.process_id), *three.run(cases.process_id)}) == 7


def test_a_rank_computes_in_one_thread(ranks) -> None:
    assert ranks(2).run(cases.n_threads) == [1, 1]


def test_an_exception_of_a_rank_fails_the_test_with_its_traceback(ranks) -> None:
    with pytest.raises(RankFailed) as caught:
        ranks(2).run(cases.raise_on, 0, timeout=1000)  # the other rank is not waited for
    message = str(caught.value)
    assert message.startswith("parallel_cases.raise_on: rank 0 of 2 failed:\nTraceback")
    assert "in raise_on" in message and "ValueError: no number on rank 0" in message


def test_of_several_exceptions_the_first_is_shown(ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "_GRACE_SECONDS", 2)  # where other tests leave the ranks little time
    with pytest.raises(RankFailed, match="rank 1 of 3 failed") as caught:
        ranks(3).run(cases.raise_after, 1)
    assert "rank 1 raised" in str(caught.value)
    assert str(caught.value).endswith("(ranks that failed after it: 0, 2)")


def test_a_rank_that_dies_is_named_with_what_it_said_last(ranks) -> None:
    with pytest.raises(RankFailed, match="rank 2 of 3 failed:\nthe process died with exit code 7") as caught:
        ranks(3).run(cases.die_on, 2)
    assert "the last words" in str(caught.value)


def test_of_a_rank_that_crashes_one_sees_where(ranks) -> None:
    with pytest.raises(
        RankFailed, match="rank 0 of 1 failed:\nthe process died with exit code -11"
    ) as caught:
        ranks(1).run(cases.crash)
    assert "Fatal Python error: Segmentation fault" in str(caught.value)
    assert "in crash" in str(caught.value)


def test_a_rank_that_crashes_when_it_has_finished_fails_the_test(ranks) -> None:
    with pytest.raises(RankFailed, match="rank 0 of 2 had finished, and died with exit code 9"):
        ranks(2).run(cases.crash_at_the_end)


def test_ranks_that_have_not_finished_in_time_are_named_and_killed(
    ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = ranks_module._finished

    def finished(started: Sequence[Any], done: dict[int, Any], seconds: float) -> dict[int, Any]:
        """Time is up when rank 1 has finished and the others have begun."""
        if 1 not in done:
            return sound(started, done, seconds)
        processes(tmp_path, 3)
        return {}

    monkeypatch.setattr(ranks_module, "_finished", finished)
    with pytest.raises(RankFailed, match=r"hang_on: ranks 0, 2 of 3 had not finished after 60 seconds"):
        ranks(3).run(cases.hang_on, tmp_path, 0, 2)
    assert not any(alive(process) for process in processes(tmp_path, 3))


def test_a_rank_is_not_waited_for_longer_than_asked(ranks, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"rank 0 of 1 had not finished after 0\.5 seconds"):
        ranks(1).run(cases.hang_on, tmp_path, 0, timeout=0.5)


def test_an_interrupted_test_leaves_no_rank_behind(
    ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when pytest-timeout or Ctrl-C ends the test."""

    def interrupted(*_: object) -> None:
        processes(tmp_path, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks_module, "_finished", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ranks(2).run(cases.hang_on, tmp_path, 0)
    assert not any(alive(process) for process in processes(tmp_path, 2))


def test_a_result_that_cannot_be_sent_is_a_failure(ranks) -> None:
    with pytest.raises(RankFailed, match="unpicklable"):
        ranks(2).run(cases.unpicklable)


def test_warnings_are_errors_in_ranks(ranks) -> None:
    """Python ignores a DeprecationWarning by default; a rank does not."""
    with pytest.raises(RankFailed, match="DeprecationWarning: strange"):
        ranks(2).run(cases.warn, DeprecationWarning, "strange")


def test_warnings_that_the_tests_ignore_are_ignored_in_ranks(ranks) -> None:
    ranks(2).run(cases.warn, DeprecationWarning, "`torch.jit.script` is deprecated. Please switch.")


def test_tensors_come_back(ranks) -> None:
    for result in ranks(2).run(torch.arange, 3):
        assert torch.equal(result, torch.arange(3))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_rank_outlives_the_tests(tmp_path: Path, how: signal.Signals) -> None:
    """Finished or hanging, and whether the tests are interrupted or killed."""
    script = tmp_path / "session.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(TESTS), str(TESTS.parent)]}\n"
        "import pathlib, time\n"
        "import parallel_cases as cases, ranks\n"
        "if __name__ == '__main__':\n"
        # The parent never reads a result, so that its end resets the connection of a finished rank.
        "    ranks._finished = lambda *_: time.sleep(600)\n"
        f"    ranks.Ranks(3).run(cases.hang_on, pathlib.Path({str(tmp_path)!r}), 0, 2)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, script], env=environment) as session:
        of_ranks = processes(tmp_path, 3)
        (folder,) = tmp_path.glob("ranks-*")
        assert all(alive(process) for process in of_ranks)
        session.send_signal(how)
    wait_until(lambda: not any(alive(process) for process in of_ranks), "ranks still run")
    assert not folder.exists()


def processes(folder: Path, n_ranks: int) -> list[int]:
    """The process ids of all ranks, once each has written its own."""
    files = [folder / str(rank) for rank in range(n_ranks)]
    wait_until(lambda: all(file.exists() for file in files), "ranks have not begun")
    return [int(file.read_text()) for file in files]


def wait_until(is_so: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")  # where there is such a folder, it knows what has ended but is there
    return not stat.parents[1].is_dir() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
