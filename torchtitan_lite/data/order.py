"""The order of the samples: a pure function of the seed and the global sample index. Nothing is stored.

A Feistel network permutes the smallest power of two that holds all n samples. An index that lands at n or
beyond is permuted again until it lands below n ("cycle walking"): the map stays a bijection of range(n).
Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, https://eprint.iacr.org/2001/012
"""

import numpy as np

_N_ROUNDS = 8
_MASK = (1 << 64) - 1
# https://prng.di.unimi.it/splitmix64.c
_GOLDEN, _MIX1, _MIX2 = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def sample_at(places: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Return the index (below n) of the sample at each of the `places` in the endless order, [...] int64.

    Every n places are an epoch, and each epoch has a permutation of its own.
    """
    assert 0 < n < 1 << 62
    epoch, index = np.divmod(places.astype(np.uint64), np.uint64(n))
    key = _mix(_mix(np.array([seed & _MASK], np.uint64)) + epoch)
    n_bits = max(2, (n - 1).bit_length())
    placed = _feistel(index, n_bits, key)
    while (beyond := placed >= n).any():
        placed[beyond] = _feistel(placed[beyond], n_bits, key[beyond])
    return placed.astype(np.int64)


def _feistel(index: np.ndarray, n_bits: int, key: np.ndarray) -> np.ndarray:
    # The halves swap places and widths each round; an even number of rounds brings the widths back.
    n_right, n_left = n_bits // 2, n_bits - n_bits // 2
    left, right = index >> np.uint64(n_right), index & np.uint64((1 << n_right) - 1)
    for turn in range(_N_ROUNDS):
        mixed = _mix(right + _mix(key + np.uint64(turn)))
        left, right = right, left ^ (mixed >> np.uint64(64 - n_left))
        n_left, n_right = n_right, n_left
    return left << np.uint64(n_right) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the output function of splitmix64 to `x`, modulo 2**64."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))
