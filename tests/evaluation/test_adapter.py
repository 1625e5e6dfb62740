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
    """A batch whose values identify their band."""
    mean, std = (s.view(-1, 1, 1) for s in band_statistics(BANDS))
    image = mean + std * torch.randn(2, len(BANDS), size, size)
    return {'image': image[:, [BANDS.index(band) for band in bands]]}


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, len(BANDS)))
def test_band_order_does_not_change_the_input(rng: random.Random, count: int) -> None:
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


def test_a_missing_band_is_an_error_unless_it_is_filled() -> None:
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


def test_images_are_resized_to_multiples_of_the_patch_size() -> None:
    adapter = Adapter(BANDS, BANDS, multiple=16)
    assert adapter(batch_of(BANDS, 120))['image'].shape[-2:] == (128, 128)
    assert adapter.lines == ['images of 120 x 120 px are resized to 128 x 128']
    untouched = Adapter(BANDS, BANDS, multiple=16)
    assert untouched(batch_of(BANDS, 64))['image'].shape[-2:] == (64, 64)
    assert untouched.lines == []


def test_given_statistics_are_used() -> None:
    batch = {'image': torch.full((1, 1, 16, 16), 30.0)}
    prepared = Adapter(['B02'], ['B02'], statistics={'B02': (10.0, 5.0)})(batch)['image']
    assert (prepared == 4).all()


def test_time_series_are_an_error() -> None:
    with pytest.raises(ValueError, match='of a single date'):
        Adapter(BANDS, BANDS)({'image': torch.zeros(1, 2, 15, 16, 16)})


def test_a_sensor_without_any_band_is_absent() -> None:
    assert absent_sensors(['B02'], BANDS) == ('s1',)
    assert absent_sensors(['VH'], BANDS) == ('s2',)
    assert absent_sensors(['VH', 'B01'], BANDS) == ()
    assert absent_sensors(['VH'], ['VV']) == ()


@pytest.mark.parametrize('channels', [2, 16])
def test_a_wrong_number_of_channels_is_an_error(channels: int) -> None:
    adapter = Adapter(BANDS, ('B04', 'VV'))
    with pytest.raises(BandError, match=f'has {channels} channels, but 15 bands are expected'):
        adapter({'image': torch.zeros(1, channels, 16, 16)})
