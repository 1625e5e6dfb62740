"""The rule for valid pixels, used by data sets, the catalogue and maps.

A pixel is not valid if

* any band has the file's nodata value. If that is 0 and the sensor can measure 0
  (:attr:`~geofm.sensors.Sensor.measures_zero`), all bands must be 0,
* any band has one of the sensor's own nodata values (:attr:`~geofm.sensors.Sensor.nodata`),
* all bands are 0, and the sensor uses 0 as a fill value
  (:attr:`~geofm.sensors.Sensor.fills_zero`),
* any band is NaN, infinite or outside of :attr:`~geofm.sensors.Sensor.limits`.

The first three conditions apply to the raw numbers of a file, the last one to values in the unit of
the sensor.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from geofm.sensors import Sensor

type Bools = npt.NDArray[np.bool_]

#: Nodata value of a file: one for all bands, one per band (None for bands without one), or None.
type Nodata = float | Sequence[float | None] | None


def mark_nodata(
    image: npt.NDArray[Any],
    valid: Bools,
    sensor: Sensor,
    nodata: Nodata = None,
    others: npt.NDArray[Any] | None = None,
) -> None:
    """Mark pixels with nodata or fill values as not valid.

    Args:
        image: Raw numbers of the bands of a sensor, before any scale and offset, (C, H, W).
        valid: Which pixels are valid so far, (H, W); changed in place.
        sensor: The sensor.
        nodata: Nodata value of the file.
        others: Raw numbers of further bands of the sensor, (K, H, W). Pixels that are 0 in all
            bands of *image* are only fill if these are 0, too.
    """
    per_band = nodata if isinstance(nodata, Sequence) else [nodata] * len(image)
    # Usually the first band has no 0, and the others need not be checked.
    if (sensor.fills_zero or 0 in per_band) and not image[0].all():
        measured = (image != 0).any(axis=0)
        valid &= measured if others is None else measured | (others != 0).any(axis=0)
    for band, value in zip(image, per_band, strict=True):
        if value is None or np.isnan(value) or (value == 0 and sensor.measures_zero):
            continue
        _mark_value(band, valid, value)
    for value in sensor.nodata:
        for band in image:
            _mark_value(band, valid, value)


def _mark_value(band: npt.NDArray[Any], valid: Bools, value: float) -> None:
    """Mark pixels of a band that have a value as not valid."""
    # A float32 file may state its nodata value in double precision.
    with np.errstate(over='ignore'):
        valid &= band != (band.dtype.type(value) if band.dtype.kind == 'f' else value)


def mark_beyond_limits(image: npt.NDArray[Any], valid: Bools, sensor: Sensor) -> None:
    """Mark pixels with values outside the limits of a sensor as not valid.

    Args:
        image: Values of the bands of a sensor, in its unit, (C, H, W).
        valid: Which pixels are valid so far, (H, W); changed in place.
        sensor: The sensor.
    """
    if stays_within(image.dtype, sensor):
        return
    low, high = sensor.limits
    # Comparisons with NaN are false, so this also detects NaN.
    if image.size and not (low <= image.min() and image.max() <= high):
        valid &= ((image >= low) & (image <= high)).all(axis=0)


def stays_within(dtype: np.dtype[Any], sensor: Sensor) -> bool:
    """Return whether all numbers of a data type are within the limits of a sensor.

    Args:
        dtype: Data type.
        sensor: The sensor.

    Returns:
        True if pixels of this type need not be checked.
    """
    if dtype.kind not in 'iu':
        return False
    kind = np.iinfo(dtype)
    return sensor.limits[0] <= kind.min and kind.max <= sensor.limits[1]
