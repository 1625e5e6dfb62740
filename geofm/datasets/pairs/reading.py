"""Read files of a sensor on a grid, with errors that name the file."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rasterio.transform import Affine

from geofm.datasets.pairs.matches import Extent
from geofm.datasets.readers.tiff_header import NotPlainError, parse_header, read_window
from geofm.grid import Grid
from geofm.rasters import RASTER_ERRORS, open_raster
from geofm.sensor_rasters import SensorBands
from geofm.sensors import Sensor, band_indices
from geofm.validity import mark_beyond_limits, mark_nodata, stays_within


class BrokenFileError(ValueError):
    """A file of the index cannot be read.

    Attributes:
        path: The file.
    """

    def __init__(self, path: str, reason: object) -> None:
        """Initialize a new BrokenFileError instance.

        Args:
            path: The file.
            reason: The reason.
        """
        super().__init__(path, reason)
        self.path = path

    def __str__(self) -> str:
        path, reason = self.args
        return (
            f'{path}: cannot be read ({reason}); restore the file, or delete it and create the '
            f'dataset again, which then leaves out the sample'
        )


#: Arrays that receive pixels, (C, H, W), and in which invalid pixels are marked, (H, W).
type Target = tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]


class Place(NamedTuple):
    """Location of the pixels to read.

    Attributes:
        grid: Grid of the pixels; None if the files are not georeferenced.
        epsg: EPSG code of the grid.
        extent: Part of the reference file.
    """

    grid: Grid | None
    epsg: int
    extent: Extent


def read_file(
    path: str,
    bands: Sequence[str],
    sensor: Sensor,
    place: Place,
    target: Target,
    may_warp: bool = False,
) -> None:
    """Read bands of a georeferenced file on a grid.

    Args:
        path: The file.
        bands: Names of the bands of *sensor* to read. Which pixels are valid is determined from all
            bands of the file.
        sensor: Sensor of the file.
        place: Location to read.
        target: Arrays that receive the pixels.
        may_warp: Whether the file may be on another grid than the reference file.

    Raises:
        BrokenFileError: If the file cannot be read, lacks a band, or is on another grid and must
            not be warped.
    """
    grid, extent = place.grid, place.extent
    assert grid is not None
    try:
        if not read_plain(path, bands, sensor, place, target):
            with open_raster(path) as src:
                if not may_warp and not _is_part(grid, extent, Grid.of(src)):
                    # GDAL would resample the pixels, or read another place.
                    raise OSError('its grid has changed since it was scanned')
                known = SensorBands.of(src, sensor)
                picks = band_indices(bands, list(known.indices))
                values, valid = known.read_on(src, grid)
                target[0][:] = values[picks]
                target[1][:] &= valid
    except RASTER_ERRORS as err:
        raise BrokenFileError(path, err.__cause__ or err) from err


def _is_part(grid: Grid, extent: Extent, of: Grid) -> bool:
    """Check whether a grid is the expected part of another grid."""
    window = grid.window_in(of)
    return window is not None and (window.row_off, window.col_off) == extent[:2]


def check_not_empty(path: str, sensor: Sensor, place: Place) -> None:
    """Raise an error if a file has no valid pixel at the location of a sample.

    A file whose grid does not contain that of the sample is not checked, since the sample may lie
    outside of the file.

    Args:
        path: The file.
        sensor: Sensor of the file.
        place: Location of the sample.

    Raises:
        BrokenFileError: If no pixel is valid. The scan leaves out such files, so the file has
            changed.
    """
    grid = place.grid
    assert grid is not None
    with open_raster(path) as src:
        if grid.window_in(Grid.of(src)) is None:
            return
    image = np.empty((0, *grid.shape), np.float32)
    valid = np.ones(grid.shape, bool)
    read_file(path, (), sensor, place, (image, valid))
    if not valid.any():
        raise BrokenFileError(
            path, 'every pixel is NaN, masked, nodata, 0 or beyond the range of the sensor'
        )


def read_plain(
    path: str, bands: Sequence[str], sensor: Sensor, place: Place, target: Target
) -> bool:
    """Read an ordinary file that is on the requested grid, without GDAL.

    This is faster than GDAL.

    Args:
        path: The file.
        bands: See :func:`read_file`.
        sensor: Sensor of the file.
        place: Location to read.
        target: Arrays that receive the pixels.

    Returns:
        Whether the file could be read in this way.

    Raises:
        OSError: If the file cannot be read.
    """
    row, col, height, width = place.extent
    with Path(path).open('rb', buffering=0) as file:
        try:
            header = parse_header(path, file.fileno(), measure=False)
        except NotPlainError:
            return False
        t = Affine(*header.transform)
        if row or col:
            t = t @ Affine.translation(col, row)
        if (
            header.bands != len(sensor.bands)
            or header.epsg != place.epsg
            or place.grid is None
            or t != place.grid.transform
            or col + width > header.width
            or row + height > header.height
        ):
            return False
        pixels = read_window(path, header, file.fileno(), (col, row, width, height))
    if pixels is None:
        return False
    image, valid = target
    is_all = bands == sensor.band_names
    values = image if is_all else np.empty((header.bands, height, width), np.float32)
    with np.errstate(over='ignore'):
        if width == header.width and values.flags.c_contiguous:
            # Treat whole rows as one long row, which NumPy copies faster.
            values.reshape(header.bands, -1)[:] = pixels.reshape(-1, header.bands).T
        else:
            values[:] = np.moveaxis(pixels, -1, 0)
    mark_nodata(values, valid, sensor, header.nodata)
    if not stays_within(pixels.dtype, sensor):
        mark_beyond_limits(values, valid, sensor)
    if not is_all:
        image[:] = values[band_indices(bands, sensor.band_names)]
    return True
