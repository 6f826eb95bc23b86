"""The stateless permutation."""

from collections import Counter

import numpy as np
import pytest

from torchtitan_lite.data.order import permute, sample_at


def test_every_size_up_to_a_power_of_two_is_permuted_one_to_one():
    for n in range(1, 2**10 + 2):
        assert np.array_equal(np.sort(permute(np.arange(n), n, seed=n)), np.arange(n)), n


@pytest.mark.parametrize("n", [2**15, 2**16 + 1, 300_007, 2**20 - 1, 2**20, 1_234_567])
def test_large_sizes_are_permuted_one_to_one(n: int):
    assert len(np.unique(permute(np.arange(n), n, seed=5))) == n


@pytest.mark.parametrize("n", [2**40 + 123, 2**61 + 1])
def test_huge_sizes_are_permuted_without_a_collision_in_range(n: int):
    placed = permute(np.arange(n - 100_000, n), n, seed=1)
    assert len(np.unique(placed)) == 100_000
    assert placed.min() >= 0 and placed.max() < n


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_small_sizes_reach_every_permutation_about_equally_often(n: int):
    n_seeds, n_orders = 2400, {2: 2, 3: 6, 4: 24, 5: 120}[n]
    found = Counter(tuple(permute(np.arange(n), n, seed).tolist()) for seed in range(n_seeds))
    expected = n_seeds / n_orders
    assert len(found) == n_orders
    assert max(abs(count - expected) for count in found.values()) < 5 * expected**0.5


@pytest.mark.parametrize("n", [1000, 1024, 65_537, 1_000_000])
def test_a_permutation_looks_like_chance(n: int):
    placed = permute(np.arange(n), n, seed=3)
    assert abs(np.corrcoef(np.arange(n), placed)[0, 1]) < 4 / n**0.5
    # Neighbours land a third of the way apart on average.
    assert np.abs(np.diff(placed)).mean() / n == pytest.approx(1 / 3, abs=1.5 / n**0.5)
    # Any stretch of the order draws evenly from all parts of the data (chi-square, 19 degrees of freedom).
    stretch = np.bincount(placed[: n // 10] * 20 // n, minlength=20)
    assert ((stretch - n / 200) ** 2 / (n / 200)).sum() < 50
    # As many indices stay where they are as by chance: one.
    assert (placed == np.arange(n)).sum() < 8


def test_each_index_lands_everywhere_over_the_seeds():
    places = np.array([permute(np.arange(10), 10, seed) for seed in range(2000)])
    for index in range(10):
        counts = np.bincount(places[:, index], minlength=10)
        assert ((counts - 200) ** 2 / 200).sum() < 35, (index, counts)


def test_seeds_and_epochs_give_unrelated_orders():
    n = 500
    orders = [sample_at(np.arange(n) + epoch * n, n, seed) for seed in range(12) for epoch in range(12)]
    for i, one in enumerate(orders):
        for other in orders[i + 1 :]:
            assert (one == other).sum() < 12


def test_an_epoch_shows_every_sample_once():
    n = 137
    for epoch in (0, 1, 2, 10**6):
        assert sorted(sample_at(np.arange(n) + epoch * n, n, seed=9)) == list(range(n))


def test_a_place_does_not_depend_on_the_places_asked_with_it():
    n, places = 41, np.arange(500)
    together = sample_at(places, n, seed=2)
    assert [sample_at(g, n, seed=2) for g in range(500)] == together.tolist()
    assert np.array_equal(sample_at(places[::-7], n, seed=2), together[::-7])


def test_any_integer_is_a_seed():
    for seed in (0, -1, 2**63, 2**64 - 2, 10**30):
        assert sorted(permute(np.arange(30), 30, seed)) == list(range(30))


def test_the_order_is_the_one_that_runs_were_made_with():
    # Another order would make every resumed run repeat samples and skip others.
    assert permute(np.arange(10), 10, seed=0).tolist() == [3, 4, 2, 0, 9, 5, 1, 6, 8, 7]
    assert sample_at(10**15, 10**9, seed=2) == 592658933
