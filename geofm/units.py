"""Detecting values that are not in the unit of their sensor."""

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from geofm.printing import warn
from geofm.sensors import SENSORS, Sensor, sensor_channels

#: Value that reflectance rarely exceeds, and DN rarely fall below.
_REFLECTANCE = 2.0

#: Lowest DN as a fraction of the offset of a processing baseline, since noise in dark water brings
#: some DN slightly below the offset.
_DARKEST = 0.95

#: Lowest value of linear power, whose noise correction may make it slightly negative. dB are lower.
_LEAST_POWER = -0.1

#: Number of images from which the darkest values are meaningful.
_FEW = 4

#: Maximum number of pixels of an image that are checked.
_SOME = 20_000


_BASELINE = re.compile(r'(?<![A-Za-z0-9])N(\d{2})(\d{2})(?![A-Za-z0-9])')


class UnitWarning(UserWarning):
    """Values seem to be in another unit than that of their sensor."""


class WrongUnit(StrEnum):
    """Unit that values seem to be in, and how to convert them to the unit of their sensor."""

    RAW = (
        'look like raw digital numbers, not dB: calibrate the product to sigma0 or gamma0 in dB '
        'first'
    )
    POWER = 'look like linear power, not dB: convert them with 10 * log10(power)'
    DECIBEL = 'look like dB, not linear power: convert them with 10 ** (dB / 10)'
    REFLECTANCE = 'look like reflectance, not DN: multiply them by 10,000'
    OFFSET = (
        'seem to include the offset of processing baseline 04.00: subtract 1,000 from DN of '
        'products since January 2022'
    )
    FRACTION = 'look like fractions of 1, not 8-bit brightness: multiply them by 255'
    BEYOND = 'are beyond the range of the sensor: check the scale that they are multiplied by'

    def advice(self, sensor: Sensor) -> str:
        """Return the message, with the scale and offset of a sensor.

        Args:
            sensor: The sensor.

        Returns:
            What the values look like, and how to convert them.
        """
        if self is WrongUnit.REFLECTANCE:
            plus = f' and add {-sensor.offset / sensor.scale:,.0f}' if sensor.offset else ''
            return f'look like reflectance, not DN: multiply them by {1 / sensor.scale:,.0f}{plus}'
        return str(self)


def wrong_unit(values: npt.NDArray[Any], sensor: Sensor) -> WrongUnit | None:
    """Detect from valid values whether they are in another unit than that of the sensor.

    Args:
        values: Valid values of all available bands of the sensor, of any shape. The more, the
            better, since a few may be all water or desert. Values above
            :attr:`~geofm.sensors.Sensor.limits` may be included.
        sensor: The sensor.

    Returns:
        The unit that the values seem to be in; None if they look right.
    """
    if values.size == 0:
        return None
    # Fractions and not extremes, since a few pixels may be damaged or noisy.
    if sensor.unit == 'dB':
        # After noise correction, power may be slightly negative.
        if _fraction(values <= 0) >= 0.5 or _fraction(values < _LEAST_POWER) > 0.01:
            return None
        return WrongUnit.RAW if _fraction(values > sensor.limits[1]) > 0.01 else WrongUnit.POWER
    if sensor.unit == 'power':
        return WrongUnit.DECIBEL if _fraction(values < _LEAST_POWER) > 0.5 else None
    if sensor.quantity == 'image':
        is_fraction = _fraction(values > 0) > 0.01 and _fraction(values > 1) <= 0.01
        if is_fraction and (values != np.round(values)).any():
            return WrongUnit.FRACTION
    is_dn = sensor.quantity == 'reflectance' and sensor.unit == 'DN'
    if is_dn and _fraction(values >= _REFLECTANCE) <= 0.01:
        return WrongUnit.REFLECTANCE
    if _fraction(values > sensor.limits[1]) > 0.5:
        return WrongUnit.BEYOND
    darkest = _DARKEST * sensor.baseline_offset if is_dn else 0.0
    return WrongUnit.OFFSET if darkest > 0 and _fraction(values < darkest) <= 0.05 else None


def _fraction(where: npt.NDArray[np.bool_]) -> float:
    """Return the fraction of values that are True. Counting is faster than a percentile."""
    return np.count_nonzero(where) / where.size


def some_values(image: npt.NDArray[Any], sensor: Sensor) -> npt.NDArray[np.float32]:
    """Select a subset of the valid values of an image, to detect their unit.

    Args:
        image: Values of bands of the sensor (..., C, H, W), in any unit.
        sensor: The sensor.

    Returns:
        Values of pixels that are finite, not fill, and not below the limits of the sensor.
    """
    values = np.moveaxis(image, -3, 0)
    pixels = values.reshape(len(values), -1)
    pixels = pixels[:, :: max(1, pixels.shape[1] // _SOME)]
    with np.errstate(over='ignore'):
        pixels = pixels.astype(np.float32)
    known = np.isfinite(pixels).all(axis=0)
    if sensor.fills_zero:
        known &= (pixels != 0).any(axis=0)
    known &= (pixels >= sensor.limits[0]).all(axis=0)
    # Indexing costs more than the rest.
    found: npt.NDArray[np.float32] = pixels if known.all() else pixels[:, known]
    return found.ravel()


def warn_of_unit(values: npt.NDArray[Any], sensor: Sensor, source: str) -> bool:
    """Warn if values seem to be in another unit than that of the sensor.

    Args:
        values: Valid values, as for :func:`wrong_unit`.
        sensor: The sensor.
        source: File or data set of the values.

    Returns:
        Whether a warning was issued.
    """
    looks_like = wrong_unit(values, sensor)
    if looks_like is not None:
        low, high = np.percentile(values, (5, 99))
        warn(
            f'{source}: values of {sensor.title} (mostly {low:.4g} to {high:.4g}) '
            f'{looks_like.advice(sensor)}',
            UnitWarning,
        )
    return looks_like is not None


class UnitWatch:
    """Check of the units of the first images of a data set, with one warning per sensor.

    The values of all images seen so far are checked together, since a single image may be all
    cloud or all city.
    """

    def __init__(self, bands: Sequence[str], source: str, images: int = 256) -> None:
        """Initialize a new UnitWatch instance.

        Args:
            bands: Names of the channels, in the order of the images.
            source: Name of the data set, for the warning.
            images: Number of images to check.

        Raises:
            BandError: If a band is unknown or given twice.
        """
        self._channels = sensor_channels(bands)
        self._source = source
        self._images, self._looked_at = images, 0
        self._seen: dict[str, list[npt.NDArray[np.float32]]] = {key: [] for key in self._channels}

    @property
    def is_done(self) -> bool:
        """Whether no further images need to be checked."""
        return self._looked_at >= self._images or not self._seen

    def look(self, image: npt.NDArray[Any]) -> None:
        """Check an image or a batch of images.

        Args:
            image: Raw values, shape (..., C, H, W), channels as in *bands*. Non-finite pixels,
                fill pixels, and pixels below the limits of their sensor are ignored.
        """
        if self.is_done:
            return
        self._looked_at += int(np.prod(image.shape[:-3]))
        for key in list(self._seen):
            sensor = SENSORS[key]
            self._seen[key].append(some_values(image[..., self._channels[key], :, :], sensor))
            values = np.concatenate(self._seen[key])
            # A few images may have no dark pixels.
            is_sure = wrong_unit(values, sensor) != WrongUnit.OFFSET or self._looked_at >= _FEW
            if is_sure and warn_of_unit(values, sensor, self._source):
                del self._seen[key]


def baseline_of(name: str) -> float | None:
    """Return the processing baseline in the name of a Sentinel-2 product.

    Args:
        name: Name, e.g. S2B_MSIL2A_20230601T100559_N0509_R022_T33UUP_20230601T132522.

    Returns:
        The baseline, e.g. 5.09; None if the name has none.
    """
    match = _BASELINE.search(name.replace('_', ' '))
    return float(f'{match[1]}.{match[2]}') if match else None
