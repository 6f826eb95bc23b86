"""The order of the batches, and the thread that prepares them."""

import itertools
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from torchtitan_lite.config.job import load_job
from torchtitan_lite.data import IGNORE, Batch, Loader, Samples, Split, in_order
from torchtitan_lite.data.order import sample_at
from torchtitan_lite.training.trainer import Trainer


@pytest.fixture(autouse=True)
def _threads_ended(monkeypatch) -> Iterator[None]:
    """Close every loader of a test, and check that all threads end."""
    made, init = [], Loader.__init__

    def keep(self: Loader, *given, **options) -> None:
        made.append(self)
        init(self, *given, **options)

    monkeypatch.setattr(Loader, "__init__", keep)
    yield
    for loader in made:
        loader.close()
    assert threads_end()


def threads_end() -> bool:
    """Whether every thread of a loader ends within a minute."""
    for thread in data_threads():
        thread.join(60)
    return not data_threads()


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("data")]


@pytest.fixture
def samples() -> Samples:
    """Thirty-seven samples with different first tokens."""
    tokens = np.arange(37 * 4)
    offsets = np.arange(0, len(tokens) + 1, 37)
    split = Split(
        name="train",
        n_bytes=0,
        unigram_entropy=0.0,
        tokens_T=tokens,
        offsets=offsets,
    )
    return Samples(split, 4)


def rows(batches: list[Batch]) -> list[int]:
    """The index of each row's sample in the split."""
    return [first // 4 for batch in batches for first in batch.tokens_BS[:, 0].tolist()]


def order(places: range | list[int], seed: int = 5) -> list[int]:
    return sample_at(np.array(places), 37, seed).tolist()


def global_order(samples: Samples, n_ranks: int, local: int, n_steps: int, **options) -> list[int]:
    """The rows of all ranks, rank after rank within each step."""
    loaders = [Loader(samples, 5, local, rank=rank, n_ranks=n_ranks, **options) for rank in range(n_ranks)]
    return rows([next(loader) for _ in range(n_steps) for loader in loaders])


@pytest.mark.parametrize(("n_ranks", "local"), [(1, 1), (1, 12), (2, 6), (3, 4), (4, 3), (12, 1), (2, 3)])
def test_ranks_and_batch_sizes_cut_one_and_the_same_order(samples: Samples, n_ranks: int, local: int):
    expected = order(range(120))
    n_steps = 120 // (n_ranks * local)
    for n_ahead in (1, 5):
        assert global_order(samples, n_ranks, local, n_steps, n_ahead=n_ahead) == expected


@pytest.mark.parametrize("consumed", [0, 6, 36, 37, 1000])
def test_a_loader_goes_on_where_another_stopped_on_other_ranks_too(samples: Samples, consumed: int):
    expected = order(range(consumed, consumed + 24))
    for n_ranks, local in ((1, 3), (4, 2), (2, 1)):
        n_steps = 24 // (n_ranks * local)
        assert global_order(samples, n_ranks, local, n_steps, consumed_samples=consumed) == expected


def test_consumed_samples_counts_all_ranks(samples: Samples):
    loader = Loader(samples, 3, 2, rank=1, n_ranks=4)
    for n in range(1, 9):
        next(loader)
        assert loader.consumed_samples == 8 * n


def test_sample_ids_are_places_in_the_global_order(samples: Samples):
    loader = Loader(samples, 3, 4, rank=1, n_ranks=2, consumed_samples=80)
    batch = next(loader)
    assert batch.sample_ids == [84, 85, 86, 87]
    assert rows([batch]) == order(batch.sample_ids, seed=3)


class Watched(Samples):
    """Samples that note which batches are asked for, and fail for one of them."""

    def __init__(self, samples: Samples, torn: int = -1) -> None:
        super().__init__(samples.split, samples.seq_len)
        self.torn, self.asked, self.changed = torn, [], threading.Condition()

    def batch(self, indices, sample_ids) -> Batch:
        with self.changed:
            self.asked.append(sample_ids[0])
            self.changed.notify()
        if self.torn in sample_ids:
            raise OSError("the disk is gone")
        return super().batch(indices, sample_ids)

    def wait_for(self, n_batches: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= n_batches, timeout=60)


def test_as_many_batches_are_prepared_ahead_as_asked_for_and_count_when_they_are_taken(samples: Samples):
    watched = Watched(samples)
    loader = Loader(watched, 5, 2, n_ahead=3)
    assert not watched.asked
    for n_taken in range(1, 5):
        assert next(loader).sample_ids == [2 * n_taken - 2, 2 * n_taken - 1]
        watched.wait_for(n_taken + 3)
        assert watched.asked == list(range(0, 2 * (n_taken + 3), 2))
        assert loader.consumed_samples == 2 * n_taken
    loader.close()
    assert next(loader).sample_ids == [8, 9]
    loader.consumed_samples = 4
    assert next(loader).sample_ids == [4, 5]


def test_an_exception_is_raised_by_the_next_that_would_have_returned_the_batch(samples: Samples):
    watched = Watched(samples, torn=5)
    loader = Loader(watched, 5, 2, n_ahead=4)
    assert [next(loader).sample_ids[0] for _ in range(2)] == [0, 2]
    watched.wait_for(4)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            next(loader)
        assert loader.consumed_samples == 4


def test_closing_does_not_wait_for_a_disk_that_hangs(samples: Samples):
    answers = threading.Event()

    class Hanging(Samples):
        def batch(self, indices, sample_ids) -> Batch:
            if sample_ids[0]:
                answers.wait(60)
            return super().batch(indices, sample_ids)

    loader = Loader(Hanging(samples.split, 4), 5, 2)
    next(loader)
    loader.close()
    assert data_threads()  # which still waits for the disk
    answers.set()


@pytest.mark.parametrize("pin", [False, True])
def test_the_thread_pins_the_batches_if_asked(samples: Samples, pin: bool, monkeypatch):
    pinned: list[torch.Tensor] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        assert threading.current_thread().name.startswith("data")
        pinned.append(tensor.clone())
        return pinned[-1]

    gpus: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda gpu: gpus.append((threading.current_thread().name[:4], gpu))
    )
    batch = next(Loader(samples, 5, 2, pin=pin))
    assert gpus == [("data", 3)] * pin
    assert rows([batch]) == order(range(2))
    for tensor in (batch.tokens_BS, batch.positions_BS, batch.labels_BS):
        assert any(tensor is one for one in pinned) == pin


def test_a_run_prepares_the_micro_batches_of_a_step_and_ends_the_thread(small_run: list[str], monkeypatch):
    trainer = Trainer(load_job([*small_run, "--training.global-batch-size", "12"]).config)
    batches = trainer.state.batches
    assert (batches.n_ahead, batches.pin) == (3, False)
    monkeypatch.setattr(trainer.stepper, "train_step", lambda flags: next(batches) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert threads_end()


PROGRAM = """
import numpy as np
from torchtitan_lite.data import Loader, Samples, Split

tokens, offsets = np.arange(64), np.array([0, 64])
split = Split(name="train", n_bytes=0, unigram_entropy=0.0, tokens_T=tokens, offsets=offsets)
loader = Loader(Samples(split, 4), 5, 2, n_ahead=1000)
next(loader)
raise ValueError("failed")
"""


def test_a_program_that_fails_and_closes_nothing_ends(run: Callable):
    ended = run("-c", PROGRAM)
    assert ended.returncode == 1
    assert ended.stderr.count("Traceback") == 1 and ended.stderr.endswith("ValueError: failed\n")


def test_the_seed_changes_the_order_and_each_epoch_has_its_own(samples: Samples):
    one, other = (rows([next(Loader(samples, seed, 37))]) for seed in (1, 2))
    assert sorted(one) == sorted(other) == list(range(37)) and one != other
    loader = Loader(samples, 1, 37)
    epochs = [rows([next(loader)]) for _ in range(3)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_held_out_batches_come_in_order_and_none_is_left_out(samples: Samples):
    batches = list(in_order(samples, 8))
    assert [len(batch.tokens_BS) for batch in batches] == [8, 8, 8, 8, 5]
    assert rows(batches) == list(range(37))
    assert [i for batch in batches for i in batch.sample_ids] == list(range(37))


@pytest.mark.parametrize(("n_batches", "n_samples"), [(0, 0), (1, 8), (4, 32), (5, 37), (99, 37), (-1, 37)])
def test_a_fixed_number_of_held_out_batches_is_the_same_samples_each_time(
    samples: Samples, n_batches: int, n_samples: int
):
    for _ in range(2):
        found = rows(list(in_order(samples, 8, n_batches)))
        assert len(found) == n_samples
        # Spread evenly over the whole split: the distances of neighbours differ by at most one.
        assert {b - a for a, b in itertools.pairwise([*found, 37])} <= {
            37 // max(n_samples, 1),
            -(-37 // max(n_samples, 1)),
        }


@pytest.mark.parametrize(("n_ranks", "local"), [(2, 4), (3, 4), (4, 8), (5, 3)])
def test_ranks_share_the_held_out_samples_and_stay_in_step(samples: Samples, n_ranks: int, local: int):
    shares = [list(in_order(samples, local, rank=rank, n_ranks=n_ranks)) for rank in range(n_ranks)]
    assert len({len(share) for share in shares}) == 1
    seen = [i for share in shares for batch in share for i in batch.sample_ids]
    assert sorted(seen) == list(range(37))
    for batch in itertools.chain(*shares):
        assert len(batch.tokens_BS) >= 1
        assert batch.sample_ids or (batch.labels_BS == IGNORE).all()
    n_labels = sum((batch.labels_BS != IGNORE).sum().item() for share in shares for batch in share)
    whole = sum((batch.labels_BS != IGNORE).sum().item() for batch in in_order(samples, 8))
    assert n_labels == whole > 0
