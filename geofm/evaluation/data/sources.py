"""Which channels TorchGeo's data sets yield: names in their order, and units.

The ONE place that knows. Checked against TorchGeo 0.10.1 by reading each data set. Anything that is
not listed here is named by wrapping it in :class:`geofm.datamodules.NamedBandsDataModule`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from geofm.datasets import S1Unit
from geofm.sensors import BANDS, RGB_BANDS, SENTINEL1, SENTINEL2
from geofm.transforms import PICTURE_WHITE

#: Names of channels in their order; None is a channel that is not a band we know.
type ChannelNames = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """What a data set yields.

    Attributes:
        channels: From a data set to the names of its channels, for each image by its key.
        scale: Factor that brings values to DN (reflectance x 10,000), for all or by name.
        s1_unit: Whether Sentinel-1 comes in dB or as linear power.
        note: What a user should know of it.
    """

    channels: Callable[[Any], Mapping[str, ChannelNames]]
    scale: float | Mapping[str, float] = 1.0
    s1_unit: S1Unit = 'dB'
    note: str = ''


def _own_names(dataset: Any) -> dict[str, ChannelNames]:
    """Names of the data set's own ``bands``, where they are this project's too."""
    return {'image': tuple(band if band in BANDS else None for band in dataset.bands)}


# Files are read in the order of their names, so VH comes before VV. Level-2A: no B10.
_BEN_S1: ChannelNames = ('VH', 'VV')
_BEN_S2: ChannelNames = tuple(b for b in SENTINEL2.band_names if b != 'B10')
#: TorchGeo's names of sensors are ours.
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


# Zhu et al., 2020: channels 5 and 6 of Sentinel-1 are the Lee-filtered intensities of VH and VV;
# the others are real and imaginary parts, and the covariance of both.
_SO2SAT = {'S1_B5': 'VH', 'S1_B6': 'VV'}


def _so2sat(dataset: Any) -> dict[str, ChannelNames]:
    # The data set sorts Sentinel-1 before Sentinel-2, each in the order of its file.
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
    note='red, green and blue of 8 bits are taken for B04, B03, B02, and white for reflectance 0.3',
)

#: What is known of TorchGeo's data sets, by the name of the class.
SOURCES: dict[str, Source] = {
    'BigEarthNet': Source(_bigearthnet, note='Sentinel-1 is read as whole decibels'),
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
        note='of Sentinel-1 the Lee-filtered intensities are used',
    ),
    'TreeSatAI': Source(_treesatai),
    'UCMerced': _PICTURE,
}
