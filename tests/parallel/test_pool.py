"""The pool of ranks itself: what it promises the tests that use it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import parallel_cases as cases
import pytest
import torch
from ranks import Pool, RankFailed

TESTS = Path(__file__).parents[1]


@pytest.fixture
def pool(ranks) -> Pool:
    return ranks(2)


def test_results_come_in_rank_order_from_one_process_group(pool: Pool) -> None:
    assert pool.run(cases.sum_over_ranks, 10) == [(0, 2, 21.0), (1, 2, 21.0)]


def test_a_pool_is_used_again_and_every_size_has_its_own(ranks) -> None:
    first = ranks(2).run(cases.process_id)
    assert ranks(2).run(cases.process_id) == first
    assert len({os.getpid(), *first, *ranks(3).run(cases.process_id)}) == 6


def test_every_task_has_a_process_group_of_its_own(pool: Pool) -> None:
    results = [pool.run(cases.sum_over_ranks, value)[0][2] for value in range(5)]
    assert results == [1, 3, 5, 7, 9]


def test_a_rank_keeps_no_thread_of_a_mesh(pool: Pool) -> None:
    before = pool.run(cases.n_threads_of_groups)
    for _ in range(3):
        pool.run(cases.split_a_weight)
    assert pool.run(cases.n_threads_of_groups) == before


def test_ranks_that_keep_many_threads_are_not_used_again(pool: Pool) -> None:
    before = pool.run(cases.keep_threads, 0)
    assert pool.run(cases.keep_threads, 20) == before
    assert set(pool.run(cases.process_id)).isdisjoint(before)


def test_a_rank_computes_in_one_thread(pool: Pool) -> None:
    assert pool.run(cases.n_threads) == [1, 1]


def test_an_exception_of_a_rank_fails_the_test_with_its_traceback(pool: Pool) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        pool.run(cases.raise_on, 0)
    message = str(caught.value)
    assert message.startswith("parallel_cases.raise_on: rank 0 of 2 failed:\nTraceback")
    assert "in raise_on" in message and "ValueError: no number on rank 0" in message
    assert time.monotonic() - start < 20, "the other rank was waited for"


def test_of_several_exceptions_the_first_is_shown(ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ranks._GRACE_SECONDS", 2)  # where other tests leave the ranks little time
    with pytest.raises(RankFailed, match="rank 1 of 3 failed") as caught:
        ranks(3).run(cases.raise_after, 1)
    assert "rank 1 raised" in str(caught.value)
    assert str(caught.value).endswith("(ranks that failed after it: 0, 2)")


def test_a_rank_that_dies_is_named_with_what_it_said_last(ranks) -> None:
    with pytest.raises(RankFailed, match="rank 2 of 3 failed:\nthe process died with exit code 7") as caught:
        ranks(3).run(cases.die_on, 2)
    assert "the last words" in str(caught.value)


def test_ranks_that_have_not_finished_in_time_are_named_and_killed(ranks) -> None:
    processes = ranks(3).run(cases.process_id)
    with pytest.raises(RankFailed, match=r"hang_on: ranks 0, 2 of 3 had not finished after 0\.5 seconds"):
        ranks(3).run(cases.hang_on, 0, 2, timeout=0.5)
    assert not any(alive(process) for process in processes)


def test_after_a_failure_the_pool_is_started_anew(pool: Pool) -> None:
    before = pool.run(cases.process_id)
    with pytest.raises(RankFailed):
        pool.run(cases.raise_on, 1)
    assert not any(alive(process) for process in before)
    assert pool.run(cases.sum_over_ranks, 10) == [(0, 2, 21.0), (1, 2, 21.0)]
    assert set(pool.run(cases.process_id)).isdisjoint(before)


def test_an_interrupted_test_leaves_no_task_behind(pool: Pool) -> None:
    """As when pytest-timeout or Ctrl-C ends the test."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = pool.run(cases.process_id)
    handler = signal.signal(signal.SIGALRM, interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.run(cases.hang_on, 0)
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)
    assert not any(alive(process) for process in before)
    assert pool.run(cases.sum_over_ranks, 10) == [(0, 2, 21.0), (1, 2, 21.0)]


def test_a_result_that_cannot_be_sent_is_a_failure(pool: Pool) -> None:
    with pytest.raises(RankFailed, match="unpicklable"):
        pool.run(cases.unpicklable)


def test_warnings_are_errors_in_ranks(pool: Pool) -> None:
    """Python ignores a DeprecationWarning by default; a rank does not."""
    with pytest.raises(RankFailed, match="DeprecationWarning: strange"):
        pool.run(cases.warn, DeprecationWarning, "strange")


def test_warnings_that_the_tests_ignore_are_ignored_in_ranks(pool: Pool) -> None:
    pool.run(cases.warn, DeprecationWarning, "`torch.jit.script` is deprecated. Please switch.")


def test_tensors_come_back(pool: Pool) -> None:
    for result in pool.run(torch.arange, 3):
        assert torch.equal(result, torch.arange(3))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_rank_outlives_the_tests(tmp_path: Path, how: signal.Signals) -> None:
    """Idle or hanging, and whether the tests are interrupted or killed."""
    script = tmp_path / "session.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(TESTS), str(TESTS.parent)]}\n"
        "import parallel_cases as cases, ranks\n"
        "if __name__ == '__main__':\n"
        "    pools = ranks.Pools()\n"
        "    print(*pools(2).run(cases.process_id), *pools(1).run(cases.process_id), flush=True)\n"
        "    print(*(pools(n)._folder.name for n in (1, 2)), flush=True)\n"
        "    pools(2).run(cases.hang_on, 0)\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as session:
        assert session.stdout is not None
        processes = [int(word) for word in session.stdout.readline().split()]
        folders = [Path(word) for word in session.stdout.readline().split()]
        assert len(processes) == 3 and all(alive(process) for process in processes)
        assert len(folders) == 2 and all(folder.is_dir() for folder in folders)
        session.send_signal(how)
    deadline = time.monotonic() + 20
    while any(alive(process) for process in processes):
        assert time.monotonic() < deadline, "ranks still run"
        time.sleep(0.05)
    assert not any(folder.exists() for folder in folders)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")  # where there is such a folder, it knows what has ended but is there
    return not stat.parents[1].is_dir() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
