"""The stateless permutation."""

from collections import Counter

import numpy as np
import pytest

from torchtitan_lite.data.order import sample_at


def epoch(n: int, seed: int, number: int = 0) -> np.ndarray:
    """The order of one epoch."""
    return sample_at(np.arange(n) + number * n, n, seed)


def test_every_size_up_to_a_power_of_two_is_permuted_one_to_one():
    for n in range(1, 2**10 + 2):
        assert np.array_equal(np.sort(epoch(n, seed=n)), np.arange(n)), n


@pytest.mark.parametrize("n", [2**15, 2**16 + 1, 300_007, 2**20 - 1, 2**20, 1_234_567])
def test_large_sizes_are_permuted_one_to_one(n: int):
    assert len(np.unique(epoch(n, seed=5))) == n


@pytest.mark.parametrize("n", [2**40 + 123, 2**61 + 1])
def test_huge_sizes_are_permuted_without_a_collision_in_range(n: int):
    placed = sample_at(np.arange(n - 100_000, n), n, seed=1)
    assert len(np.unique(placed)) == 100_000
    assert placed.min() >= 0 and placed.max() < n


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_small_sizes_reach_every_permutation_about_equally_often(n: int):
    n_seeds, n_orders = 2400, {2: 2, 3: 6, 4: 24, 5: 120}[n]
    found = Counter(tuple(epoch(n, seed).tolist()) for seed in range(n_seeds))
    expected = n_seeds / n_orders
    assert len(found) == n_orders
    assert max(abs(count - expected) for count in found.values()) < 5 * expected**0.5


@pytest.mark.parametrize("n", [1000, 1024, 65_537, 1_000_000])
def test_a_permutation_looks_like_chance(n: int):
    placed = epoch(n, seed=3)
    assert abs(np.corrcoef(np.arange(n), placed)[0, 1]) < 4 / n**0.5
    # Neighbours land a third of the way apart on average.
    assert np.abs(np.diff(placed)).mean() / n == pytest.approx(1 / 3, abs=1.5 / n**0.5)
    # Any stretch of the order draws evenly from all parts of the data (chi-square, 19 degrees of freedom).
    stretch = np.bincount(placed[: n // 10] * 20 // n, minlength=20)
    assert ((stretch - n / 200) ** 2 / (n / 200)).sum() < 50
    # About one index stays where it is.
    assert (placed == np.arange(n)).sum() < 8


def test_each_index_lands_everywhere_over_the_seeds():
    places = np.array([epoch(10, seed) for seed in range(2000)])
    for index in range(10):
        counts = np.bincount(places[:, index], minlength=10)
        assert ((counts - 200) ** 2 / 200).sum() < 35, (index, counts)


def test_seeds_and_epochs_give_unrelated_orders():
    orders = [epoch(500, seed, number) for seed in range(12) for number in range(12)]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            assert (one == other).sum() < 12


def test_an_epoch_shows_every_sample_once():
    for number in (0, 1, 2, 10**6):
        assert sorted(epoch(137, 9, number)) == list(range(137))


def test_a_place_does_not_depend_on_the_places_asked_with_it():
    n, places = 41, np.arange(500)
    together = sample_at(places, n, seed=2)
    assert [sample_at(places[i : i + 1], n, seed=2)[0] for i in range(500)] == together.tolist()
    assert np.array_equal(sample_at(places[::-7], n, seed=2), together[::-7])


def test_any_integer_is_a_seed():
    for seed in (0, -1, 2**63, 2**64 - 2, 10**30):
        assert sorted(epoch(30, seed)) == list(range(30))


def test_the_order_is_the_one_that_runs_were_made_with():
    # With another order a resumed run would repeat some samples and skip others.
    assert epoch(10, seed=0).tolist() == [8, 9, 7, 3, 6, 4, 2, 5, 0, 1]
    assert sample_at(np.array([10**15]), 10**9, seed=2).tolist() == [592658933]
