"""Which pixels hold data: the one rule, for data sets, the catalogue and maps.

A pixel holds no data where

* any band has the file's nodata value, except that a nodata value of 0 counts only where all bands
  are 0 if the sensor measures 0 (:attr:`~geofm.sensors.Sensor.measures_zero`),
* any band has one of the sensor's own nodata values (:attr:`~geofm.sensors.Sensor.nodata`),
* all bands are 0, if that is fill for the sensor whether the file says so or not
  (:attr:`~geofm.sensors.Sensor.fills_zero`),
* any band is NaN, infinite or outside of :attr:`~geofm.sensors.Sensor.limits`.

The first three are about the numbers of a file, the last one is about values in the sensor's unit.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from geofm.sensors import Sensor

type Bools = npt.NDArray[np.bool_]

#: Nodata value of a file: one for all bands, one per band (None: that band has none), or none.
type Nodata = float | Sequence[float | None] | None


def mark_nodata(
    image: npt.NDArray[Any],
    valid: Bools,
    sensor: Sensor,
    nodata: Nodata = None,
    others: npt.NDArray[Any] | None = None,
) -> None:
    """Mark pixels that a file's numbers call fill or nodata.

    Args:
        image: Numbers of the file (C, H, W), before any scale and offset, bands of one sensor.
        valid: Where pixels are valid so far, (H, W); changed in place.
        sensor: The sensor.
        nodata: Nodata value of the file.
        others: Numbers of further bands of the sensor (K, H, W), where 0 in all of *image* is not
            fill unless these are 0, too.
    """
    per_band = nodata if isinstance(nodata, Sequence) else [nodata] * len(image)
    # Most often the first band has no 0, and the others need not be looked at.
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
    """Mark pixels of a band that have a value."""
    # A float32 file may give its nodata value in double precision.
    with np.errstate(over='ignore'):
        valid &= band != (band.dtype.type(value) if band.dtype.kind == 'f' else value)


def mark_beyond_limits(image: npt.NDArray[Any], valid: Bools, sensor: Sensor) -> None:
    """Mark pixels whose values a sensor cannot have measured.

    Args:
        image: Values in the sensor's unit (C, H, W), bands of one sensor.
        valid: Where pixels are valid so far, (H, W); changed in place.
        sensor: The sensor.
    """
    if stays_within(image.dtype, sensor):
        return
    low, high = sensor.limits
    # Comparisons with NaN are false, so a look at the extremes finds NaN and infinity too.
    if image.size and not (low <= image.min() and image.max() <= high):
        valid &= ((image >= low) & (image <= high)).all(axis=0)


def stays_within(dtype: np.dtype[Any], sensor: Sensor) -> bool:
    """Whether no number of a type is beyond the limits of a sensor.

    Args:
        dtype: Type of the numbers.
        sensor: The sensor.

    Returns:
        True if pixels of this type need not be looked at.
    """
    if dtype.kind not in 'iu':
        return False
    kind = np.iinfo(dtype)
    return sensor.limits[0] <= kind.min and kind.max <= sensor.limits[1]
