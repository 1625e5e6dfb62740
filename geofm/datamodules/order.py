"""Shuffled order of the samples of an epoch, computed without storing a list of samples."""

import math

import numpy as np
import numpy.typing as npt

#: Maximum number of samples of data sets that are shuffled with a list of samples.
MOST_LISTED = 2**20

#: Rounds of the Feistel network. Four suffice for a pseudo-random permutation (Luby and Rackoff,
#: 1988). More compensate for simple round functions.
_ROUNDS = 8

type Numbers = npt.NDArray[np.int64]


class Shuffle:
    """Pseudo-random permutation of 0 to n - 1 that only depends on seed and epoch.

    Up to :data:`MOST_LISTED` samples, it is NumPy's permutation. For more, it is a Feistel network
    with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Each
    entry is computed independently, so that an epoch of a billion samples takes no memory and can
    start at any sample without delay.
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
        # Numbers are written as two digits in this base, so that base² is n or slightly more.
        self._base = np.uint64(math.isqrt(max(n - 1, 0)) + 1)

    def at(self, positions: Numbers) -> Numbers:
        """Return the indices of the samples at the given positions of the epoch.

        Args:
            positions: Positions, 0 to n - 1, int64 (K,).

        Returns:
            Indices of the samples, int64 (K,).
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
    """Mix the bits of words with SplitMix64's finaliser, halved so that sums do not overflow."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (words ^ (words >> np.uint64(31))) >> np.uint64(1)
