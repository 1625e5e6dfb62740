"""Reading Sentinel-1 and Sentinel-2 files on a grid, with errors that name the file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rasterio.transform import Affine
from rasterio.windows import Window

from geofm.datasets.catalogue.tiff_header import NotPlainError, parse_header, read_window
from geofm.grid import Grid
from geofm.rasters import RASTER_ERRORS, open_raster
from geofm.sensor_rasters import SensorBands
from geofm.sensors import Sensor, band_indices
from geofm.validity import mark_beyond_limits, mark_nodata, stays_within


class BrokenFileError(ValueError):
    """A file that the index has cannot be read any more.

    Attributes:
        path: The file.
    """

    def __init__(self, path: str, reason: object) -> None:
        """Initialize a new BrokenFileError instance.

        Args:
            path: The file.
            reason: What is wrong with it.
        """
        super().__init__(path, reason)
        self.path = path

    def __str__(self) -> str:
        path, reason = self.args
        return (
            f'{path}: cannot be read ({reason}); fetch the file again, or delete it and make the '
            f'dataset anew, which then leaves the pair out'
        )


#: Where pixels go, (C, H, W), and where it is noted that they are not valid, (H, W).
type Target = tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]


def read_file(
    path: str,
    bands: Sequence[str],
    sensor: Sensor,
    epsg: int,
    grid: Grid,
    window: Window,
    target: Target,
    may_warp: bool = False,
) -> None:
    """Read bands of a window of a file.

    Args:
        path: The file.
        bands: Names of the bands to read, of *sensor*. All bands that the file has decide which
            pixels are valid.
        sensor: Sensor of the file.
        epsg: EPSG code of the grid.
        grid: Grid of the window.
        window: The window, in whole pixels of the file that the pair's grid is of.
        target: Where pixels go.
        may_warp: Whether the file may lie on another grid.

    Raises:
        BrokenFileError: If the file cannot be read, lacks a band, or must not be warped and lies
            elsewhere.
    """
    try:
        if not _read_plain(path, bands, sensor, epsg, grid, window, target):
            with open_raster(path) as src:
                if not may_warp and grid.window_in(Grid.of(src)) != window:
                    # GDAL would stretch what it finds to the window, or read other ground.
                    raise OSError('its pixels no longer lie where they did when it was scanned')
                known = SensorBands.of(src, sensor)
                picks = band_indices(bands, list(known.indices))
                values, valid = known.read_on(src, grid)
                target[0][:] = values[picks]
                target[1][:] &= valid
    except RASTER_ERRORS as err:
        raise BrokenFileError(path, err.__cause__ or err) from err


def refuse_empty(path: str, sensor: Sensor, epsg: int, grid: Grid, window: Window) -> None:
    """Refuse a file that has nothing to show where it lies on the grid of its pair.

    Args:
        path: The file.
        sensor: Sensor of the file.
        epsg: EPSG code of the grid.
        grid: Grid of the window.
        window: The window.

    Raises:
        BrokenFileError: If no pixel is valid. Files like that are none of an index.
    """
    with open_raster(path) as src:
        if grid.window_in(Grid.of(src)) is None:
            # What is warped may just miss the ground.
            return
    image = np.empty((0, *grid.shape), np.float32)
    valid = np.ones(grid.shape, bool)
    read_file(path, (), sensor, epsg, grid, window, (image, valid))
    if not valid.any():
        raise BrokenFileError(
            path, 'every pixel is NaN, masked, nodata, 0 or beyond the range of the sensor'
        )


def _read_plain(
    path: str,
    bands: Sequence[str],
    sensor: Sensor,
    epsg: int,
    grid: Grid,
    window: Window,
    target: Target,
) -> bool:
    """Read from a file whose pixels lie there as they are, on the very grid; False for others.

    Such are the files of the data set, and this takes less time than GDAL does.
    """
    col, row, width, height = (int(v) for v in window.flatten())
    with Path(path).open('rb', buffering=0) as file:
        try:
            header = parse_header(path, file.fileno())
        except NotPlainError:
            return False
        t = Affine(*header.transform) @ Affine.translation(col, row)
        if (
            header.bands != len(sensor.bands)
            or header.epsg != epsg
            or t != grid.transform
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
        values[:] = np.moveaxis(pixels, -1, 0)
    mark_nodata(values, valid, sensor, header.nodata)
    if not stays_within(pixels.dtype, sensor):
        mark_beyond_limits(values, valid, sensor)
    if not is_all:
        image[:] = values[band_indices(bands, sensor.band_names)]
    return True
