"""Percentile stretches, against values whose percentiles are known."""

import numpy as np

from geofm.datasets.plot import NO_DATA
from geofm.datasets.plot import stretch as sample_picture
from geofm.stretch import PICTURE, SCALE, stretch, value_range

#: 0 to 100 in random order: the p-th percentile is p.
RAMP = np.random.default_rng(0).permutation(101).astype(np.float32)


def test_percentiles_of_finite_values() -> None:
    assert value_range(np.append(RAMP, [np.nan, np.inf]), PICTURE) == PICTURE
    assert value_range(RAMP, SCALE) == SCALE
    assert value_range(np.full(3, np.nan), SCALE) == (0, 1)


def test_valid_pixels_are_stretched_by_channel() -> None:
    channels = np.stack([RAMP, 10 * RAMP - 500])[:, None]
    valid = RAMP[None] > 0
    channels[:, ~valid] = 1e6
    expected = np.clip((RAMP[None] - 2.98) / (98.02 - 2.98), 0, 1)
    for brightness in stretch(channels, valid):
        np.testing.assert_allclose(brightness[valid], expected[valid], atol=1e-5)
        assert (brightness[~valid] == 0).all()
    picture = sample_picture(channels, valid)
    assert picture.shape == (1, 101, 2)
    assert (picture[~valid] == NO_DATA).all()


def test_a_constant_channel_is_black() -> None:
    assert (stretch(np.ones((1, 2, 2), np.float32), np.ones((2, 2), bool)) == 0).all()
