import tracemalloc
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geofm.datamodules import sampling
from geofm.datamodules.sampling import ResumableSampler, Shuffle


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, 'MOST_LISTED', 0)


@pytest.mark.usefixtures('unlisted')
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**64), epoch=st.integers(0, 1000))
def test_each_sample_once(n: int, seed: int, epoch: int) -> None:
    found = Shuffle(n, seed, epoch).at(np.arange(n))
    assert np.array_equal(np.sort(found), np.arange(n))


@pytest.mark.usefixtures('unlisted')
def test_order_looks_random() -> None:
    """Statistics of neighbours, drift and fixed points over seeds and epochs."""
    n = 4000
    found = np.stack([Shuffle(n, *divmod(i, 10)).at(np.arange(n)) for i in range(100)])
    deviations = np.sqrt(len(found) * n)
    centred = (found - (n - 1) / 2) / np.sqrt((n**2 - 1) / 12)
    # Correlations of positions, neighbours, neighbouring epochs and neighbouring seeds, in sigmas.
    assert abs((centred * np.sort(centred[0])).sum()) / deviations < 4
    assert abs((centred[:, 1:] * centred[:, :-1]).sum()) / deviations < 4
    assert abs((centred[1:] * centred[:-1]).sum()) / deviations < 4
    assert abs((centred[10:] * centred[:-10]).sum()) / deviations < 4
    # One fixed point is expected per permutation, with variance 1.
    assert abs((found == np.arange(n)).sum() - len(found)) < 4 * np.sqrt(len(found))
    # All samples are equally likely in the first tenth: chi-square over 20 strata.
    counts = np.histogram(found[:, : n // 10], 20, (0, n))[0]
    expected = counts.sum() / 20
    assert ((counts - expected) ** 2 / expected).sum() < 44  # 99.9 % of 19 degrees of freedom.


def test_small_data_sets_use_the_permutation_of_numpy() -> None:
    want = np.random.default_rng([3, 5]).permutation(100)
    assert np.array_equal(Shuffle(100, 3, 5).at(np.arange(100)), want)


class Billion:
    def __len__(self) -> int:
        return 10**9


def test_a_billion_samples_take_no_memory() -> None:
    tracemalloc.start()
    try:
        ranks = []
        for rank in range(2):
            sampler = ResumableSampler(Billion(), 1, num_replicas=2, rank=rank)
            sampler.load_state_dict({'seed': 1, 'epoch': 2, 'start': 6 * 10**8})
            ranks.append(list(islice(sampler, 50)))
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()
    alone = ResumableSampler(Billion(), 1, num_replicas=1, rank=0)
    alone.load_state_dict({'seed': 1, 'epoch': 2, 'start': 6 * 10**8})
    assert list(islice(alone, 100)) == [n for pair in zip(*ranks, strict=True) for n in pair]
    assert len(set(islice(alone, 30_000))) == 30_000
