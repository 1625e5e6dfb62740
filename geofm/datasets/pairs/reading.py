"""Reading Sentinel-1 and Sentinel-2 files on a grid, with errors that name the file."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.windows import Window

from geofm.datasets.catalogue.tiff_header import NotPlainError, parse_header, read_window
from geofm.grid import Grid, read_on_grid
from geofm.sensors import SENSORS


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
    sensor: str,
    epsg: int,
    grid: Grid,
    window: Window,
    target: Target,
    may_warp: bool = False,
) -> None:
    """Read a window of a file.

    Args:
        path: The file.
        sensor: ``'s1'`` or ``'s2'``.
        epsg: EPSG code of the grid.
        grid: Grid of the window.
        window: The window, in whole pixels of the file that the pair's grid is of.
        target: Where pixels go.
        may_warp: Whether the file may lie on another grid.

    Raises:
        BrokenFileError: If the file cannot be read, or must not be warped and lies elsewhere.
    """
    try:
        if not _read_plain(path, sensor, epsg, grid, window, target):
            with rasterio.open(path) as src:
                if not may_warp and grid.window_in(Grid.of(src)) != window:
                    # GDAL would stretch what it finds to the window, or read other ground.
                    raise OSError('its pixels no longer lie where they did when it was scanned')
                _READERS[sensor](src, grid, window, target)
    except (RasterioError, OSError, ValueError) as err:
        raise BrokenFileError(path, err.__cause__ or err) from err


def refuse_empty(path: str, sensor: str, epsg: int, grid: Grid, window: Window) -> None:
    """Refuse a file that has nothing to show where it lies on the grid of its pair.

    Args:
        path: The file.
        sensor: ``'s1'`` or ``'s2'``.
        epsg: EPSG code of the grid.
        grid: Grid of the window.
        window: The window.

    Raises:
        BrokenFileError: If every pixel is NaN, nodata or 0. Files like that are none of an index.
    """
    with rasterio.open(path) as src:
        if grid.window_in(Grid.of(src)) is None:
            # What is warped may just miss the ground.
            return
    image = np.empty((len(SENSORS[sensor].bands), *grid.shape), np.float32)
    valid = np.ones(grid.shape, bool)
    read_file(path, sensor, epsg, grid, window, (image, valid))
    if not valid.any():
        raise BrokenFileError(path, 'every pixel is NaN, nodata or 0')


def _read_plain(
    path: str, sensor: str, epsg: int, grid: Grid, window: Window, target: Target
) -> bool:
    """Read from a file whose pixels lie there as they are, on the very grid; False for others.

    Such are the files of the data set, and this takes less time than GDAL does.
    """
    col, row, width, height = (int(v) for v in window.flatten())
    with Path(path).open('rb', buffering=0) as file:
        try:
            header = parse_header(file.fileno())
        except NotPlainError:
            return False
        t = Affine(*header.transform) @ Affine.translation(col, row)
        if (
            header.bands != len(target[0])
            or header.epsg != epsg
            or t != grid.transform
            or col + width > header.width
            or row + height > header.height
        ):
            return False
        pixels = read_window(path, header, file.fileno(), (col, row, width, height))
    if pixels is None:
        return False
    target[0][:] = np.moveaxis(pixels, -1, 0)
    _MARKERS[sensor](target, header.nodata)
    return True


def _read_s1(src: DatasetReader, grid: Grid, window: Window, target: Target) -> None:
    """Backscatter in dB on a grid, warped if it must be."""
    image, valid = target
    image[:], s1_valid = _read_moved_s1(src, grid)
    valid &= s1_valid


def _mark_s1(target: Target, nodata: float | None) -> None:
    """Note where backscatter in dB is not valid."""
    image, valid = target
    if not np.isfinite(image.sum()):
        valid &= np.isfinite(image).all(axis=0)
    if not image.all():
        valid &= (image != 0).any(axis=0)
    if nodata is not None and not np.isnan(nodata):
        valid &= (image != np.float32(nodata)).all(axis=0)


def _read_moved_s1(
    src: DatasetReader, grid: Grid
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Backscatter in dB of a file on whatever grid, and where it is valid."""
    # Fill must be known before warping, or it would bleed into the pixels beside it. Only 0 in
    # both polarisations is fill.
    pixels, valid = read_on_grid(src, grid, fill=0)
    return pixels, valid & (pixels != 0).any(axis=0)


def _read_s2(src: DatasetReader, grid: Grid, window: Window, target: Target) -> None:
    """DN of a window."""
    src.read(window=window, out=target[0])
    _mark_s2(target, src.nodata)


def _mark_s2(target: Target, nodata: float | None) -> None:
    """Note where DN are not valid."""
    image, valid = target
    # Most often the first band has no 0, and the others need not be looked at.
    if not image[0].all():
        valid &= (image != 0).any(axis=0)
    if nodata is not None and nodata != 0:
        # A single band may well be at the nodata value, B10 at 0 above all.
        valid &= (image != nodata).any(axis=0)


_READERS = {'s1': _read_s1, 's2': _read_s2}
_MARKERS = {'s1': _mark_s1, 's2': _mark_s2}
