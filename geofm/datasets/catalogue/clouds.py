"""Cloud cover of Sentinel-2 images, by s2cloudless.

Zupanc, "Improving Cloud Detection with Machine Learning", 2017
(github.com/sentinel-hub/sentinel2-cloud-detector). The model is part of the s2cloudless package.
"""

import os
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from rasterio.errors import RasterioError

from geofm.rasters import RASTER_ERRORS, open_raster
from geofm.sensor_rasters import SensorBands
from geofm.sensors import SENTINEL2, band_indices

#: s2cloudless expects reflectance from 0 to 1. DN = reflectance x 10,000.
_DN_PER_REFLECTANCE = 10_000


@cache
def _detector() -> Any:
    """Return the detector, with its authors' settings for 10 m pixels."""
    try:
        s2cloudless = import_module('s2cloudless')
    except ImportError as err:
        raise ValueError(
            'cloud cover needs s2cloudless, which is not installed: pip install s2cloudless'
        ) from err
    return s2cloudless.S2PixelCloudDetector(
        threshold=0.4, average_over=4, dilation_size=2, all_bands=True
    )


def cloud_cover(path: str | os.PathLike[str]) -> float:
    """Compute the fraction of an image that is covered by clouds.

    Args:
        path: A Sentinel-2 Level-1C file with 13 bands in DN.

    Returns:
        Fraction, 0 to 1, of the valid pixels; NaN if no pixel is valid.

    Raises:
        RasterioError: If the file cannot be read, or lacks a band.
        ValueError: If s2cloudless is not installed.
    """
    detector = _detector()
    try:
        with open_raster(path) as src:
            bands = SensorBands.of(src, SENTINEL2)
            order = band_indices(SENTINEL2.band_names, list(bands.indices))
            values, valid = bands.read(src)
    except RASTER_ERRORS as err:
        raise RasterioError(f'{path}: {err}') from err
    pixels = values[order]
    if not valid.any():
        return float('nan')
    reflectance = np.moveaxis(np.where(valid, pixels, 0), 0, -1) / _DN_PER_REFLECTANCE
    mask = detector.get_cloud_masks(reflectance[np.newaxis])[0]
    return float(mask[valid].mean())
