"""Units of pixel values: telling from the values that a file is not in its sensor's unit."""

import warnings

import numpy as np
import numpy.typing as npt

from geofm.sensors import Sensor

#: No valid value of Sentinel-2 in DN stays below: reflectance is rarely above 2.
_REFLECTANCE = 2.0

#: What processing baseline 04.00 of Sentinel-2 adds to every DN (since January 2022).
BASELINE_OFFSET = 1000.0


class UnitWarning(UserWarning):
    """Values look as if they were in another unit than the sensor's."""


def wrong_unit(values: npt.NDArray[np.generic], sensor: Sensor) -> str | None:
    """Tell from valid values whether they are in another unit than the sensor's.

    Args:
        values: Valid values of all bands of the sensor that are at hand, of any shape, as many as
            possible: whether a place is all water or desert cannot be told from a few.
        sensor: The sensor.

    Returns:
        What the values look like and what to do about it, or None if they look right.
    """
    if values.size == 0:
        return None
    low, median, high = (float(v) for v in np.percentile(values, (0, 50, 100)))
    if sensor.unit == 'dB':
        if low >= 0 and high > 100:
            return (
                f'values from {low:g} to {high:g} look like raw digital numbers, not dB: '
                'calibrate the product to sigma0 or gamma0 in dB first'
            )
        if low >= 0:
            return (
                f'values from {low:g} to {high:g} look like linear power, not dB: '
                'convert them with 10 * log10(power)'
            )
        return None
    if high <= _REFLECTANCE and median < _REFLECTANCE:
        return (
            f'values from {low:g} to {high:g} look like reflectance, not DN: '
            'multiply them by 10,000'
        )
    if low >= BASELINE_OFFSET:
        return (
            f'no value is below {low:g}, as if the offset of processing baseline 04.00 had been '
            'added: subtract 1,000 from DN of products since January 2022'
        )
    return None


def warn_of_unit(values: npt.NDArray[np.generic], sensor: Sensor, source: str) -> None:
    """Warn if values look as if they were in another unit than the sensor's.

    Args:
        values: Valid values, as for :func:`wrong_unit`.
        sensor: The sensor.
        source: File or data set that the values are from.
    """
    if said := wrong_unit(values, sensor):
        warnings.warn(f'{source}: {sensor.title}: {said}', UnitWarning, stacklevel=3)
