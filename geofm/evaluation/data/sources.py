"""Channels of TorchGeo's data sets: their names in order, and their units.

The entries were checked against TorchGeo 0.10.1 by reading each data set. The channels of other
data sets are named by wrapping them in :class:`geofm.datamodules.NamedBandsDataModule`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from geofm.datasets import S1Unit
from geofm.sensors import BANDS, RGB_BANDS, SENTINEL1, SENTINEL2
from geofm.transforms import PICTURE_WHITE

#: Names of channels in order. None is a channel that is not a known band.
type ChannelNames = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Channels of a data set.

    Attributes:
        channels: Function that returns the names of a data set's channels, by key of the image.
        scale: Factor that converts values to DN (reflectance x 10,000), for all bands or by band.
        s1_unit: Unit of Sentinel-1, dB or linear power.
        note: Note for the report.
    """

    channels: Callable[[Any], Mapping[str, ChannelNames]]
    scale: float | Mapping[str, float] = 1.0
    s1_unit: S1Unit = 'dB'
    note: str = ''


def _own_names(dataset: Any) -> dict[str, ChannelNames]:
    """Return the data set's own ``bands``, with None for unknown bands."""
    return {'image': tuple(band if band in BANDS else None for band in dataset.bands)}


# Files are read in alphabetical order, so VH comes before VV. Level-2A has no B10.
_BEN_S1: ChannelNames = ('VH', 'VV')
_BEN_S2: ChannelNames = tuple(b for b in SENTINEL2.band_names if b != 'B10')
#: TorchGeo's keys of sensors equal those of geofm.
_BEN: dict[str, ChannelNames] = {
    SENTINEL1.name: _BEN_S1,
    SENTINEL2.name: _BEN_S2,
    'all': _BEN_S1 + _BEN_S2,
}


def _bigearthnet(dataset: Any) -> dict[str, ChannelNames]:
    return {'image': _BEN[dataset.bands]}


def _bigearthnet_v2(dataset: Any) -> dict[str, ChannelNames]:
    if dataset.bands == 'all':
        return {'image_s1': _BEN_S1, 'image_s2': _BEN_S2}
    return {'image': _BEN[dataset.bands]}


# Zhu et al., 2020: channels 5 and 6 of Sentinel-1 are the Lee-filtered intensities of VH and VV.
# The others are real and imaginary parts, and the covariance of both.
_SO2SAT = {'S1_B5': 'VH', 'S1_B6': 'VV'}


def _so2sat(dataset: Any) -> dict[str, ChannelNames]:
    # Sentinel-1 comes before Sentinel-2, each in the order of its file.
    names = [*dataset.s1_band_names, *dataset.s2_band_names]
    return {'image': tuple(_SO2SAT.get(n, n[3:] if n.startswith('S2_') else None) for n in names)}


_TREESATAI: dict[str, ChannelNames] = {
    SENTINEL1.name: ('VV', 'VH', None),
    SENTINEL2.name: (
        'B02',
        'B03',
        'B04',
        'B08',
        'B05',
        'B06',
        'B07',
        'B8A',
        'B11',
        'B12',
        'B01',
        'B09',
    ),
}


def _treesatai(dataset: Any) -> dict[str, ChannelNames]:
    return {f'image_{s}': _TREESATAI[s] for s in dataset.sensors if s in _TREESATAI}


def _picture(dataset: Any) -> dict[str, ChannelNames]:
    return {'image': RGB_BANDS}


_PICTURE = Source(
    _picture,
    scale=PICTURE_WHITE / 255,
    note='8-bit red, green and blue are treated as B04, B03 and B02, and white as reflectance 0.3',
)

#: Channels of TorchGeo's data sets, by class name.
SOURCES: dict[str, Source] = {
    'BigEarthNet': Source(_bigearthnet, note='Sentinel-1 is read in whole decibels'),
    'BigEarthNetV2': Source(_bigearthnet_v2),
    'CopernicusBenchBigEarthNetS1': Source(_own_names),
    'CopernicusBenchBigEarthNetS2': Source(_own_names),
    'CopernicusBenchCloudS2': Source(_own_names),
    'CopernicusBenchDFC2020S1': Source(_own_names),
    'CopernicusBenchDFC2020S2': Source(_own_names),
    'CopernicusBenchEuroSATS1': Source(_own_names),
    'CopernicusBenchEuroSATS2': Source(_own_names),
    'CopernicusBenchLCZS2': Source(_own_names, scale=10_000.0),
    'EuroSAT': Source(_own_names),
    'EuroSAT100': Source(_own_names),
    'EuroSATSpatial': Source(_own_names),
    'RESISC45': _PICTURE,
    'SEN12MS': Source(_own_names),
    'So2Sat': Source(
        _so2sat,
        scale=dict.fromkeys(SENTINEL2.band_names, 10_000.0),
        s1_unit='power',
        note='the Lee-filtered intensities of Sentinel-1 are used',
    ),
    'TreeSatAI': Source(_treesatai),
    'UCMerced': _PICTURE,
}
