import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geofm.evaluation.backbones import Adapter, absent_sensors
from geofm.sensors import BANDS, BandError, band_statistics
from geofm.transforms import Normalize


def batch_of(bands: tuple[str, ...], size: int = 32) -> dict[str, Any]:
    """Values that tell which band they are of."""
    mean, std = (s.view(-1, 1, 1) for s in band_statistics(BANDS))
    image = mean + std * torch.randn(2, len(BANDS), size, size)
    return {'image': image[:, [BANDS.index(band) for band in bands]]}


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, len(BANDS)))
def test_the_order_of_the_data_changes_no_bit(rng: random.Random, count: int) -> None:
    wanted = tuple(rng.sample(BANDS, count))
    shuffled = tuple(rng.sample(BANDS, len(BANDS)))
    torch.manual_seed(rng.randrange(1000))
    batch = batch_of(BANDS)
    other = {'image': batch['image'][:, [BANDS.index(band) for band in shuffled]]}
    prepared = Adapter(BANDS, wanted)(batch)['image']
    assert torch.equal(Adapter(shuffled, wanted)(other)['image'], prepared)
    assert torch.equal(
        prepared, Normalize(BANDS)(batch)['image'][:, [BANDS.index(band) for band in wanted]]
    )


def test_a_band_that_is_missing_is_an_error_unless_one_says_what_to_do() -> None:
    data = tuple(band for band in BANDS if band != 'B10')
    with pytest.raises(BandError, match=r"missing bands \['B10'\].*missing_bands"):
        Adapter(data, BANDS)
    batch, place = batch_of(data), BANDS.index('B10')
    mean = Adapter(data, BANDS, missing='mean')
    filled = mean(batch)['image']
    assert (filled[:, place] == 0).all()
    assert mean.lines == ["bands ['B10'] are not in the data: filled with their mean"]
    rest = [i for i in range(len(BANDS)) if i != place]
    assert torch.equal(filled[:, rest], Normalize(data)(batch)['image'])
    zero = Adapter(data, BANDS, missing='zero')(batch)['image']
    average, deviation = band_statistics(['B10'])
    torch.testing.assert_close(zero[:, place].unique(), -average / deviation)
    assert torch.equal(zero[:, rest], filled[:, rest])


def test_sides_are_brought_to_a_multiple_of_the_patch_and_that_is_said() -> None:
    adapter = Adapter(BANDS, BANDS, multiple=16)
    assert adapter(batch_of(BANDS, 120))['image'].shape[-2:] == (128, 128)
    assert adapter.lines == ['images of 120 x 120 px are resized to 128 x 128']
    untouched = Adapter(BANDS, BANDS, multiple=16)
    assert untouched(batch_of(BANDS, 64))['image'].shape[-2:] == (64, 64)
    assert untouched.lines == []


def test_the_data_s_own_statistics_are_used_where_they_are_given() -> None:
    batch = {'image': torch.full((1, 1, 16, 16), 30.0)}
    prepared = Adapter(['B02'], ['B02'], statistics={'B02': (10.0, 5.0)})(batch)['image']
    assert (prepared == 4).all()


def test_several_dates_are_refused() -> None:
    with pytest.raises(ValueError, match='one date at a time'):
        Adapter(BANDS, BANDS)({'image': torch.zeros(1, 2, 15, 16, 16)})


def test_a_sensor_is_absent_if_none_of_its_bands_is_there() -> None:
    assert absent_sensors(['B02'], BANDS) == ('s1',)
    assert absent_sensors(['VH'], BANDS) == ('s2',)
    assert absent_sensors(['VH', 'B01'], BANDS) == ()
    assert absent_sensors(['VH'], ['VV']) == ()


@pytest.mark.parametrize('channels', [2, 16])
def test_images_of_other_channels_than_the_data_said_are_refused(channels: int) -> None:
    adapter = Adapter(BANDS, ('B04', 'VV'))
    with pytest.raises(BandError, match=f'has {channels} channels, but 15 bands are expected'):
        adapter({'image': torch.zeros(1, channels, 16, 16)})
