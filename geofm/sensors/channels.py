"""Checking, finding and grouping the channels of a tensor by band name."""

from collections.abc import Sequence

import torch
from torch import Tensor

from geofm.sensors.builtin import SENTINEL1, SENTINEL2
from geofm.sensors.registry import CHANNELS, SENSORS, canonical_order
from geofm.sensors.sensor import Sensor
from geofm.suggestions import did_you_mean

#: Bands of Sentinel-1 and Sentinel-2 Level-1C in canonical order: VV, VH, B01 ... B08, B8A,
#: B09 ... B12. These are the bands of SEN12MS-CR-TS, not all registered bands.
BANDS: tuple[str, ...] = (*SENTINEL1.band_names, *SENTINEL2.band_names)

#: Bands of a true-colour image of Sentinel-2 Level-1C.
RGB_BANDS: tuple[str, ...] = ('B04', 'B03', 'B02')

#: Maximum number of bands of a qualified sensor that are listed in full in a message.
_LISTED = 4


class BandError(ValueError):
    """A band name is unknown, missing or duplicated."""


def check_bands(bands: Sequence[str]) -> tuple[str, ...]:
    """Check a list of band names.

    Args:
        bands: Band names, see :attr:`~geofm.sensors.Sensor.band_names`, in any order. Names with
            the sensor in front, such as ``'s2.B02'``, are also accepted.

    Returns:
        Canonical names in the given order.

    Raises:
        BandError: If the list is empty, or a name is unknown or given twice.
    """
    if isinstance(bands, str):
        raise BandError(f"bands must be a list of names, not the string '{bands}'")
    if not bands:
        raise BandError(f'no bands given: choose from {_listing()}')
    found = [band if band in CHANNELS else _canonical(band) for band in bands]
    unknown = [band for band, name in zip(bands, found, strict=True) if name is None]
    if unknown:
        raise BandError(
            f'unknown bands {unknown}: known are {_listing()}{_suggestion(str(unknown[0]))}'
        )
    names = [name for name in found if name is not None]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BandError(f'bands given twice: {twice}')
    return tuple(names)


def _canonical(band: object) -> str | None:
    """Return the channel of a band name with the sensor in front, e.g. 's2.B02'."""
    key, dot, short = str(band).partition('.')
    if not dot or key not in SENSORS or short not in SENSORS[key].short_names:
        return None
    return SENSORS[key].channel(short)


def _listing() -> str:
    """List the known bands. Long lists of qualified bands are shortened."""
    parts = []
    for known in SENSORS.values():
        names = list(known.band_names)
        if known.qualified and len(names) > _LISTED:
            names = [names[0], '...', names[-1]]
        parts.append(', '.join(names))
    return ', '.join(parts)


def _suggestion(band: str) -> str:
    """Suggest similar bands, to append to a message about an unknown band."""
    qualified = [f'{key}.{band}' for key, known in SENSORS.items() if band in known.short_names]
    if qualified:
        return f'; did you mean {" or ".join(map(repr, qualified))}?'
    return did_you_mean(band, CHANNELS)


def bands_of(sensors: Sequence[str]) -> tuple[str, ...]:
    """Return all bands of the given sensors.

    Args:
        sensors: Keys of the sensors, in any order.

    Returns:
        Names of the bands, in canonical order.

    Raises:
        SensorError: If a sensor is unknown, or there is none.
    """
    return tuple(name for key in canonical_order(sensors) for name in SENSORS[key].band_names)


def canonical_bands(bands: Sequence[str]) -> tuple[str, ...]:
    """Sort bands canonically.

    Args:
        bands: Band names, in any order.

    Returns:
        Canonical names, ordered by the registration of their sensors, and by file order within a
        sensor.

    Raises:
        BandError: If the list is empty, or a name is unknown or given twice.
    """
    wanted = set(check_bands(bands))
    return tuple(name for name in CHANNELS if name in wanted)


def sensor_of(band: str) -> Sensor:
    """Return the sensor of a band.

    Args:
        band: Name of the band.

    Returns:
        The sensor.

    Raises:
        BandError: If the name is unknown.
    """
    (name,) = check_bands((band,))
    return CHANNELS[name][0]


def sensor_channels(bands: Sequence[str]) -> dict[str, list[int]]:
    """Group the channels of a tensor by sensor.

    Args:
        bands: Names of the channels of the tensor, in their order.

    Returns:
        Indices of the channels of each sensor, in the given order. Sensors are in canonical order.

    Raises:
        BandError: If the list is empty, or a name is unknown or given twice.
    """
    owners = [CHANNELS[band][0].name for band in check_bands(bands)]
    return {
        key: [i for i, owner in enumerate(owners) if owner == key]
        for key in SENSORS
        if key in owners
    }


def band_indices(wanted: Sequence[str], available: Sequence[str]) -> list[int]:
    """Return the indices of bands.

    Args:
        wanted: Names of the bands to find.
        available: Names of the available channels, in their order.

    Returns:
        Index in *available* of each band in *wanted*.

    Raises:
        BandError: If a band is not available.
    """
    available = list(available)
    missing = [band for band in wanted if band not in available]
    if missing:
        raise BandError(f'missing bands {missing}: the data have {available}')
    return [available.index(band) for band in wanted]


def check_channels(image: Tensor, bands: Sequence[str]) -> None:
    """Check that an image has one channel per band.

    Args:
        image: Image or batch of images, shape (..., C, H, W).
        bands: Names of the channels.

    Raises:
        BandError: If the number of channels is not the number of bands.
    """
    if image.ndim < 3 or image.shape[-3] != len(bands):
        channels = image.shape[-3] if image.ndim >= 3 else 'no'
        raise BandError(
            f'image of shape {tuple(image.shape)} has {channels} channels, but {len(bands)} bands '
            f'are expected: {list(bands)}'
        )


def band_statistics(bands: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation of bands from the definitions of their sensors.

    Args:
        bands: Names of the bands.

    Returns:
        Mean and standard deviation, float32 tensors of shape (C,), in the units of the sensors.

    Raises:
        BandError: If the list is empty, or a name is unknown or given twice.
    """
    chosen = [CHANNELS[band][1] for band in check_bands(bands)]
    return torch.tensor([band.mean for band in chosen]), torch.tensor([band.std for band in chosen])
