import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geofm.sensors import (
    BANDS,
    BandError,
    band_indices,
    band_statistics,
    check_bands,
    sensor_channels,
    sensor_of,
)

some_bands = st.lists(st.sampled_from(BANDS), min_size=1, unique=True)


def test_canonical_order_is_that_of_the_files() -> None:
    s2 = ['B01', 'B02', 'B03', 'B04', 'B05', 'B06', 'B07', 'B08', 'B8A', 'B09', 'B10', 'B11', 'B12']
    assert list(BANDS) == ['VV', 'VH', *s2]


@given(some_bands)
def test_every_channel_belongs_to_its_sensor(bands: list[str]) -> None:
    channels = sensor_channels(bands)
    assert sorted(i for indices in channels.values() for i in indices) == list(range(len(bands)))
    for key, indices in channels.items():
        assert all(sensor_of(bands[i]).name == key for i in indices)
        assert indices


@given(some_bands)
def test_indices_find_bands_by_name(bands: list[str]) -> None:
    wanted = bands[::2]
    assert [bands[i] for i in band_indices(wanted, bands)] == wanted


@settings(deadline=None)  # torch.testing is imported at the first call.
@given(some_bands)
def test_statistics_follow_the_order_of_the_names(bands: list[str]) -> None:
    mean, std = band_statistics(bands)
    every_mean, every_std = band_statistics(BANDS)
    indices = [BANDS.index(band) for band in bands]
    torch.testing.assert_close(mean, every_mean[indices])
    torch.testing.assert_close(std, every_std[indices])
    assert (std > 0).all()


def test_errors_name_the_band() -> None:
    with pytest.raises(BandError, match='B13'):
        check_bands(['B02', 'B13'])
    with pytest.raises(BandError, match=r"missing bands \['B10'\]"):
        band_indices(['B09', 'B10'], ['B09', 'B11'])
    with pytest.raises(BandError, match='twice'):
        check_bands(['VV', 'VV'])
    with pytest.raises(BandError, match='no bands'):
        check_bands([])
    with pytest.raises(BandError, match='not the string'):
        check_bands('VV')
