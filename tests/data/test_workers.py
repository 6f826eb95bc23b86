"""Processes that prepare batches ahead: the same batches, whatever is sent to them, and none left behind."""

import atexit
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import programs
import pytest
import torch

from torchtitan_lite.data import Batch, Loader, Samples, Shards, Text, load_tokenizer, prepare

pytestmark = [
    pytest.mark.timeout(120),
    # Torch's, on a machine of fewer cores.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]
SENT = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Batches that are larger than what a pipe holds.
SEQ_LEN, LOCAL = 1024, 8


def build(folder: Path) -> Shards:
    rng = random.Random(3)
    (folder / "text.txt").write_text("\n".join("".join(rng.choices("abc def", k=60)) for _ in range(1500)))
    config = Text(path=str(folder / "text.txt"), cache_dir=str(folder / "cache"))
    return prepare(config, load_tokenizer("bytes"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Some 90 kB of text, on disk."""
    return build(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def samples(shards: Shards) -> Samples:
    return Samples(shards.train, SEQ_LEN)


@pytest.fixture
def load(samples: Samples) -> Iterator[Callable[..., Loader]]:
    """Makes loaders, which are closed at the end."""
    loaders = []

    def make(n_workers: int, consumed_samples: int = 0, rank: int = 0, n_ranks: int = 1) -> Loader:
        loaders.append(
            Loader(samples, 7, LOCAL // n_ranks, rank, n_ranks, consumed_samples, n_workers=n_workers)
        )
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def same(one: Batch, other: Batch) -> bool:
    pairs = (
        (getattr(one, name), getattr(other, name)) for name in ("tokens_BS", "positions_BS", "labels_BS")
    )
    alike = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
    return alike and one.sample_ids == other.sample_ids


def take(loader: Loader, n: int) -> list[Batch]:
    return [next(loader) for _ in range(n)]


def pids() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid}


def gone(pid: int) -> bool:
    """Whether there is no such process; one that nobody has waited for is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_workers_make_the_batches_that_the_process_makes_itself(load: Callable[..., Loader]) -> None:
    random_state, alone = torch.get_rng_state(), take(load(0), 12)
    loader = load(2)
    assert all(map(same, take(loader, 12), alone))
    # What was handed out, and not what lies ready.
    assert loader.consumed_samples == 12 * LOCAL
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_run_goes_on_with_other_workers_and_ranks(load: Callable[..., Loader]) -> None:
    alone = take(load(0), 7)
    one, other = load(1, 3 * LOCAL, rank=0, n_ranks=2), load(0, 3 * LOCAL, rank=1, n_ranks=2)
    for expected in alone[3:6]:
        first, second = next(one), next(other)
        assert torch.equal(torch.cat([first.tokens_BS, second.tokens_BS]), expected.tokens_BS)
        assert first.sample_ids + second.sample_ids == expected.sample_ids
    assert one.consumed_samples == other.consumed_samples == 6 * LOCAL
    one.close()
    assert next(one).sample_ids == alone[6].sample_ids[: LOCAL // 2]


def test_workers_are_deaf_to_signals_and_close_leaves_none(
    load: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Torch waits so long for each worker that does not end by itself; its own value is five seconds.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 30.0)
    heard: list[int] = []
    before = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in SENT}
    mask, strangers = signal.pthread_sigmask(signal.SIG_BLOCK, ()), pids()
    try:
        alone, loader = load(0), load(2)
        assert same(next(loader), next(alone))
        workers = pids() - strangers
        assert len(workers) == 2
        for number in SENT:
            for pid in workers:
                os.kill(pid, number)
            # More than was prepared ahead of the signal.
            assert all(map(same, take(loader, 12), take(alone, 12)))
            os.kill(os.getpid(), number)
        assert heard == list(SENT)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
        start = time.monotonic()
        loader.close()
        assert time.monotonic() - start < 30 and all(map(gone, workers))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Torn(Samples):
    """Samples of which one cannot be read."""

    def batch(self, indices, sample_ids) -> Batch:
        if 16 in sample_ids:
            raise OSError("the disk is gone")
        return super().batch(indices, sample_ids)


def test_an_exception_in_a_worker_reaches_next(shards: Shards) -> None:
    strangers = pids()
    loader = Loader(Torn(shards.train, SEQ_LEN), 7, LOCAL, n_workers=1)
    take(loader, 2)
    with pytest.raises(OSError, match="the disk is gone"):
        next(loader)
    loader.close()
    assert pids() == strangers


class Leaving(Samples):
    """Its worker makes the file `at.exit` in its working folder when its interpreter ends."""

    def batch(self, indices, sample_ids) -> Batch:
        atexit.register(Path("at.exit").touch)
        return super().batch(indices, sample_ids)


def test_a_worker_ends_without_the_interpreters_end(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    strangers = pids()
    loader = Loader(Leaving(shards.train, SEQ_LEN), 7, LOCAL, n_workers=1)
    take(loader, 1)
    (worker,) = (child for child in multiprocessing.active_children() if child.pid not in strangers)
    loader.close()
    assert worker.exitcode == 0
    assert not Path("at.exit").exists()


# Also a start by path, of which spawned processes import the file again.
SCRIPT = """\
import sys, warnings
warnings.simplefilter("error")
from multiprocessing import active_children
from pathlib import Path

if __name__ == "__main__":
    from test_workers import LOCAL, SEQ_LEN, Loader, Samples, build
    loader = Loader(Samples(build(Path(sys.argv[1])).train, SEQ_LEN), 7, LOCAL, n_workers=2)
    next(loader)
    print(*(child.pid for child in active_children()), flush=True)
    sys.stdin.readline()
    next(loader)
    raise ValueError("failed")
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a script in a process group of its own; it waits for a line when its workers run."""
    started = []

    def start() -> subprocess.Popen[str]:
        (tmp_path / "script.py").write_text(SCRIPT)
        paths = [Path(__file__).parents[2], Path(__file__).parent]
        variables = programs.environment(PYTHONPATH=":".join(map(str, paths)))
        started.append(
            programs.Program(
                [tmp_path / "script.py", tmp_path],
                cwd=tmp_path,
                env=variables,
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_killed_run_leaves_no_worker(start: Callable[[], subprocess.Popen[str]]) -> None:
    process = start()
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2 and not any(map(gone, workers))
    process.kill()
    assert wait_for(lambda: all(map(gone, workers)), 4)


def test_a_run_that_fails_and_closes_nothing_ends_and_leaves_no_worker(
    start: Callable[[], subprocess.Popen[str]],
) -> None:
    process = start()
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    _, errors = process.communicate("\n", timeout=30)
    # Its own traceback alone.
    assert errors.count("Traceback") == 1 and "failed" in errors.splitlines()[-1], errors
    assert process.returncode == 1
    assert len(workers) == 2 and wait_for(lambda: all(map(gone, workers)), 1)


def test_a_pickled_split_names_its_files(shards: Shards) -> None:
    pickled = pickle.dumps(shards)
    assert len(pickled) < 2000 < shards.train.tokens_T.nbytes
    again = pickle.loads(pickled)
    for one, other in ((shards.train, again.train), (shards.validation, again.validation)):
        assert one.tokens_T.dtype == other.tokens_T.dtype
        assert (one.tokens_T == other.tokens_T).all() and (one.offsets == other.offsets).all()
        assert (one.name, one.n_tokens, one.n_bytes) == (other.name, other.n_tokens, other.n_bytes)
    assert not again.train.tokens_T.flags.writeable


def test_an_empty_split_and_a_part_of_a_file_can_be_pickled(tmp_path: Path, shards: Shards) -> None:
    part = pickle.loads(pickle.dumps(replace(shards.train, tokens_T=shards.train.tokens_T[5:9])))
    assert part.tokens_T.tolist() == shards.train.tokens_T[5:9].tolist()
    empty = replace(shards.validation, tokens_T=shards.train.tokens_T[:0])
    assert len(pickle.loads(pickle.dumps(empty)).tokens_T) == 0
