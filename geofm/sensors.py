"""What a channel is: the one place that knows sensors, bands, units and statistics.

Everywhere else a band is known by its name. Position in a tensor is a matter of the list of
names that travels with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geofm.suggestions import did_you_mean


class BandError(ValueError):
    """A band name is unknown, missing or given twice."""


@dataclass(frozen=True, slots=True)
class Band:
    """One channel of a sensor.

    Attributes:
        name: Name as in SEN12MS-CR-TS and TorchGeo, e.g. ``'VV'`` or ``'B8A'``.
        mean: Mean over SEN12MS-CR-TS, in the unit of the sensor.
        std: Standard deviation over SEN12MS-CR-TS, in the unit of the sensor.
    """

    name: str
    mean: float
    std: float


@dataclass(frozen=True, slots=True)
class Sensor:
    """An instrument and its bands, in the order in which files hold them.

    Attributes:
        name: Key of the sensor, ``'s1'`` or ``'s2'``.
        title: Name for people.
        unit: Unit of the pixel values.
        bands: Bands in file order.
        limits: Lowest and highest value that a pixel with data can have, in the unit of the
            sensor. What lies beyond is fill or damage, not data.
        measures_zero: Whether 0 in a single band is a measurement. 0 in all bands is always fill.
    """

    name: str
    title: str
    unit: str
    bands: tuple[Band, ...]
    limits: tuple[float, float]
    measures_zero: bool

    @property
    def band_names(self) -> tuple[str, ...]:
        """Names of the bands, in file order."""
        return tuple(band.name for band in self.bands)


# Means and standard deviations of SEN12MS-CR-TS (Ebel et al., 2022), S1 in dB, S2 in DN
# (top-of-atmosphere reflectance x 10,000).
SENTINEL1 = Sensor(
    's1',
    'Sentinel-1 GRD',
    'dB',
    (Band('VV', -11.4, 4.60), Band('VH', -19.2, 6.30)),
    # Thermal noise lies near -30 dB and corner reflectors near 30 dB; processors clip low power to
    # as little as 1e-10.
    limits=(-100.0, 100.0),
    measures_zero=False,
)
SENTINEL2 = Sensor(
    's2',
    'Sentinel-2 Level-1C',
    'DN',
    (
        Band('B01', 3036.0, 2323.0),
        Band('B02', 2842.0, 2350.0),
        Band('B03', 2683.0, 2206.0),
        Band('B04', 2866.0, 2378.0),
        Band('B05', 3013.0, 2328.0),
        Band('B06', 3429.0, 2206.0),
        Band('B07', 3684.0, 2217.0),
        Band('B08', 3556.0, 2145.0),
        Band('B8A', 3840.0, 2200.0),
        Band('B09', 1689.0, 1551.0),
        Band('B10', 312.0, 694.0),
        Band('B11', 2733.0, 1365.0),
        Band('B12', 2098.0, 1159.0),
    ),
    # With the offset of processing baseline 04.00 taken off, dark pixels go down to -1,000.
    limits=(-1000.0, 65535.0),
    measures_zero=True,
)

#: Sensors by key, in the order in which their channels are stacked (S1 first, as in TorchGeo).
SENSORS: dict[str, Sensor] = {sensor.name: sensor for sensor in (SENTINEL1, SENTINEL2)}

#: All band names in canonical order: VV, VH, B01 ... B08, B8A, B09 ... B12.
BANDS: tuple[str, ...] = tuple(name for sensor in SENSORS.values() for name in sensor.band_names)

#: Bands of a true-colour picture.
RGB_BANDS: tuple[str, ...] = ('B04', 'B03', 'B02')

_BAND: dict[str, tuple[Sensor, Band]] = {
    band.name: (sensor, band) for sensor in SENSORS.values() for band in sensor.bands
}


def check_bands(bands: Sequence[str]) -> tuple[str, ...]:
    """Check a list of band names.

    Args:
        bands: Band names, in any order.

    Returns:
        The names as a tuple, in the order given.

    Raises:
        BandError: If the list is empty, or a name is unknown or given twice.
    """
    if isinstance(bands, str):
        raise BandError(f"bands must be a list of names, not the string '{bands}'")
    unknown = [band for band in bands if band not in _BAND]
    if unknown:
        guess = did_you_mean(str(unknown[0]), BANDS)
        raise BandError(f'unknown bands {unknown}: known are {list(BANDS)}{guess}')
    if not bands:
        raise BandError(f'no bands given: choose from {list(BANDS)}')
    twice = sorted({band for band in bands if list(bands).count(band) > 1})
    if twice:
        raise BandError(f'bands given twice: {twice}')
    return tuple(bands)


def sensor_of(band: str) -> Sensor:
    """Sensor that a band belongs to.

    Args:
        band: Name of the band.

    Returns:
        The sensor.

    Raises:
        BandError: If the name is unknown.
    """
    check_bands((band,))
    return _BAND[band][0]


def sensor_channels(bands: Sequence[str]) -> dict[str, list[int]]:
    """Channels of each sensor in a tensor whose channels are *bands*.

    Args:
        bands: Names of the channels, in the order of the tensor.

    Returns:
        For each sensor that is present, in canonical order, the indices of its channels in the
        order given.

    Raises:
        BandError: If the list is empty, or a name is unknown or given twice.
    """
    bands = check_bands(bands)
    channels = {
        key: [i for i, band in enumerate(bands) if _BAND[band][0] is sensor]
        for key, sensor in SENSORS.items()
    }
    return {key: indices for key, indices in channels.items() if indices}


def band_indices(wanted: Sequence[str], available: Sequence[str]) -> list[int]:
    """Positions of the wanted bands among those available.

    Args:
        wanted: Names of the bands to find, in the order to return.
        available: Names of the channels at hand, in their order.

    Returns:
        One index into *available* for each wanted band.

    Raises:
        BandError: If a wanted band is not available.
    """
    available = list(available)
    missing = [band for band in wanted if band not in available]
    if missing:
        raise BandError(f'missing bands {missing}: the data have {available}')
    return [available.index(band) for band in wanted]


def check_channels(image: Tensor, bands: Sequence[str]) -> None:
    """Check that an image has one channel for each of its bands.

    Args:
        image: Image or batch of images, of shape (..., C, H, W).
        bands: Names that its channels should have.

    Raises:
        BandError: If the number of channels is not that of the bands.
    """
    if image.ndim < 3 or image.shape[-3] != len(bands):
        channels = image.shape[-3] if image.ndim >= 3 else 'no'
        raise BandError(
            f'image of shape {tuple(image.shape)} has {channels} channels, but {len(bands)} bands '
            f'are expected: {list(bands)}'
        )


def band_statistics(bands: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of bands over SEN12MS-CR-TS.

    Args:
        bands: Names of the bands.

    Returns:
        Mean and standard deviation, float32 tensors of shape (C,), in dB for Sentinel-1 and DN
        for Sentinel-2.

    Raises:
        BandError: If the list is empty, or a name is unknown or given twice.
    """
    chosen = [_BAND[band][1] for band in check_bands(bands)]
    return torch.tensor([band.mean for band in chosen]), torch.tensor([band.std for band in chosen])
