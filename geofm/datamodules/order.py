"""The order of an epoch, of any number of samples, without a list of them."""

import math

import numpy as np
import numpy.typing as npt

#: Data sets with more samples than this are shuffled without a list of their samples.
MOST_LISTED = 2**20

#: Rounds of the Feistel network. Four suffice for a pseudo-random permutation (Luby and Rackoff,
#: 1988); the rest makes up for round functions that are simple.
_ROUNDS = 8

type Numbers = npt.NDArray[np.int64]


class Shuffle:
    """A pseudo-random permutation of 0 to n - 1 that depends on seed and epoch alone.

    Up to :data:`MOST_LISTED` samples, it is NumPy's shuffle. Beyond, it is a Feistel network with
    cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Each entry is
    computed on its own, so that an epoch of a billion samples needs no memory and starts at any
    sample at once.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        """Initialize a new Shuffle instance.

        Args:
            n: Number of samples.
            seed: Seed of the run.
            epoch: The epoch.
        """
        self.n = n
        rng = np.random.default_rng([seed, epoch])
        self._listed = rng.permutation(n) if n <= MOST_LISTED else None
        self._keys = rng.integers(2**64, size=_ROUNDS, dtype=np.uint64)
        # Numbers are pairs of digits to this base: n or little more of them.
        self._base = np.uint64(math.isqrt(max(n - 1, 0)) + 1)

    def at(self, positions: Numbers) -> Numbers:
        """Samples at positions of the epoch.

        Args:
            positions: Positions, 0 to n - 1, int64 (K,).

        Returns:
            Numbers of samples, int64 (K,).
        """
        if self._listed is not None:
            return self._listed[positions]
        found = self._permuted(positions.astype(np.uint64))
        while (outside := np.flatnonzero(found >= self.n)).size:
            found[outside] = self._permuted(found[outside])
        return found.astype(np.int64)

    def _permuted(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Permute 0 to base² - 1."""
        left, right = np.divmod(numbers, self._base)
        for key in self._keys:
            left, right = right, (left + _mixed(right ^ key)) % self._base
        return left * self._base + right


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix the bits of words, halved so that sums do not overflow (SplitMix64's finaliser)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (words ^ (words >> np.uint64(31))) >> np.uint64(1)
