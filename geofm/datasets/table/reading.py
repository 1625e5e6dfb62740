"""Read an observation of a table on a grid, in the unit of its sensor."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasterio.windows import Window

from geofm.datasets.pairs.reading import BrokenFileError
from geofm.datasets.readers.opening import open_source
from geofm.datasets.readers.source import Source, SourceView, as_dataset, grid_of
from geofm.datasets.table.raster_table import RasterTable
from geofm.grid import Grid, alpha_band, own_mask, warp_values
from geofm.printing import counted
from geofm.rasters import RASTER_ERRORS
from geofm.sensor_rasters import MOST_VALUES, REACH, SensorBands, covering_window
from geofm.sensors import BandError, Sensor
from geofm.validity import Bools, mark_beyond_limits, mark_nodata

type Image = npt.NDArray[np.float32]
type Ints = npt.NDArray[np.integer[Any]]

# Rasters without a CRS that have the same outline are warped onto each other as if in this CRS.
_PLANE = CRS.from_epsg(3857)


@dataclass(frozen=True)
class _Part:
    """Bands of one file.

    Attributes:
        source: The open file, with the metadata of the table.
        known: The bands to read, with scale and offset.
        own: Grid of the file, in pixels of the finest file if it is not georeferenced.
    """

    source: Source
    known: SensorBands
    own: Grid


def read_observation(
    table: RasterTable,
    rows: Sequence[int] | Ints,
    bands: Sequence[str] | None = None,
    grid: Grid | None = None,
    window: Window | None = None,
) -> tuple[Image, Bools]:
    """Read bands of an observation.

    Files on the requested grid are read without resampling. Other files are warped with the
    resampling method of the sensor; invalid pixels do not contribute to valid ones.

    Args:
        table: The table.
        rows: Rows of the observation, all of the same sensor.
        bands: Names of the channels to read, in this order. Default: all channels of the sensor.
        grid: Grid to read on. Default: the grid of the file with the most pixels, or the pixels of
            that file if it is not georeferenced.
        window: Window of this grid in whole pixels, which may extend beyond it. Default: the whole
            grid.

    Returns:
        Values in the unit of the sensor, float32 (C, H, W), and a mask, bool (H, W), that is True
        where all bands are valid by the rules of :mod:`geofm.validity` and the masks of the files.
        Pixels outside the files are invalid. Invalid values are meaningless and may be NaN.

    Raises:
        BrokenFileError: If a file cannot be read or lacks a band. The message names the file.
        ValueError: If the window does not consist of whole pixels, or is too large.
    """
    rows = [int(row) for row in rows]
    sensor = table.sensor_of(rows[0])
    bands = sensor.band_names if bands is None else tuple(bands)
    with ExitStack() as stack:
        parts = _parts(table, rows, sensor, bands, stack, is_plane=grid is None)
        with _named(parts[0].source.name):
            target = max((p.own for p in parts), key=_pixels) if grid is None else grid
            target = target if window is None else _crop(target, window)
            if len(bands) * target.height * target.width > MOST_VALUES:
                raise ValueError(
                    f'{target.height} x {target.width} pixels of {len(bands)} bands are too many '
                    'to read at once: read windows'
                )
        groups = _by_grid(parts)
        values: Image = np.empty((len(bands), *target.shape), np.float32)
        valid, nonzero = np.ones(target.shape, bool), np.zeros(target.shape, bool)
        for group in groups:
            names = [name for part in group for name in part.known.indices]
            with _named(group[0].source.name):
                image, good, some = _read_group(group, target, sensor, len(groups) == 1)
            values[[bands.index(name) for name in names]] = image
            valid &= good
            nonzero |= some
        if len(groups) > 1 and sensor.fills_zero:
            valid &= nonzero
    return values, valid


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Turn errors of reading into errors that name the file."""
    try:
        yield
    except BrokenFileError:
        raise
    except (*RASTER_ERRORS, MemoryError) as error:
        raise BrokenFileError(path, error.__cause__ or error) from error


def _parts(
    table: RasterTable,
    rows: list[int],
    sensor: Sensor,
    bands: tuple[str, ...],
    stack: ExitStack,
    is_plane: bool,
) -> list[_Part]:
    """Open the files with the bands."""
    found: list[tuple[Source, SensorBands]] = []
    missing = set(bands)
    for path, same in groupby(rows, table.path):
        needed = [row for row in same if missing & set(table.bands_of(row) or missing)]
        if not needed:
            continue
        with _named(path):
            source = open_source(path, sensor.name)
            stack.callback(source.close)
            for row in needed:
                view = view_of(table, row, source)
                names = table.bands_of(row)
                given = None if names is None else [n for n in names if n != '-']
                known = SensorBands.of(as_dataset(view), sensor, given)
                wanted = [name for name in bands if name in known.indices and name in missing]
                missing -= set(wanted)
                if wanted:
                    found.append((view, known.choose(wanted)))
    if missing:
        gone = [name for name in bands if name in missing]
        raise BrokenFileError(table.path(rows[0]), BandError(f'bands {gone} are missing'))
    finest = max((source for source, _ in found), key=lambda s: s.height * s.width)
    parts = []
    for source, known in found:
        own = grid_of(source)
        if own is None:
            if not is_plane:
                raise BrokenFileError(source.name, 'it has no CRS, but is read on a grid')
            scale = Affine.scale(finest.width / source.width, finest.height / source.height)
            own = Grid(_PLANE, scale, source.height, source.width)
        parts.append(_Part(source, known, own))
    return parts


def view_of(table: RasterTable, row: int, source: Source) -> Source:
    """Return the bands of a file that a row describes, with the metadata of the row.

    Args:
        table: The table.
        row: Index of the row.
        source: The open file.

    Returns:
        The bands of the file, without those that the row marks as unused ('-'), or only the band at
        the index of the row if it has one. An alpha band of the file is kept as the last band,
        because it is the mask of the others. Scale, offset, unit and nodata value of the row
        replace those of the file.

    Raises:
        BandError: If the number of bands of the file does not match the row.
    """
    alpha = alpha_band(as_dataset(source))
    chosen = [i for i in range(source.count) if i != alpha]
    names = table.bands_of(row)
    if table.index[row] > 0:
        if table.index[row] > source.count:
            raise BandError(
                f'{source.name}: {counted(source.count, "band")}, but the table has index '
                f'{table.index[row]}'
            )
        chosen = [int(table.index[row]) - 1]
    elif names is not None:
        if len(names) != len(chosen):
            raise BandError(
                f'{source.name}: has {counted(len(chosen), "band")}, but the table names '
                f"{len(names)}: {' '.join(names)}; name each band in the order of the file, or '-' "
                'if it is not used'
            )
        chosen = [i for i, name in zip(chosen, names, strict=True) if name != '-']
    scale, offset, nodata = (
        None if column is None or math.isnan(column[row]) else float(column[row])
        for column in (table.scale, table.offset, table.nodata)
    )
    unit = None if table.unit is None or table.unit[row] < 0 else table.units[table.unit[row]]
    if len(chosen) == source.count and scale is offset is nodata is unit is None:
        return source
    if alpha is not None and alpha not in chosen:
        # Keep the alpha band as a mask.
        chosen = [*chosen, alpha]
    return SourceView(source, chosen, scale, offset, unit, nodata)


def _pixels(grid: Grid) -> int:
    return grid.height * grid.width


def _crop(grid: Grid, window: Window) -> Grid:
    """Crop a grid to a window of whole pixels."""
    sides = window.flatten()
    if not all(float(side).is_integer() for side in sides) or window.width < 1 or window.height < 1:
        raise ValueError(f'{window} does not consist of whole pixels')
    col, row, width, height = (int(side) for side in sides)
    return grid.crop(row, col, height, width)


def _by_grid(parts: list[_Part]) -> list[list[_Part]]:
    """Group parts on the same grid."""
    groups: list[list[_Part]] = []
    for part in parts:
        for group in groups:
            own = group[0].own
            if own == part.own or (own.shape == part.own.shape and own.window_in(part.own)):
                group.append(part)
                break
        else:
            groups.append([part])
    return groups


def _read_group(
    parts: list[_Part], target: Grid, sensor: Sensor, alone: bool
) -> tuple[Image, Bools, Bools]:
    """Read files on one grid: values, validity, and where any number is not 0."""
    own = parts[0].own
    offset = target.offset_in(own)
    count = sum(len(part.known.indices) for part in parts)
    image: Image = np.full((count, *target.shape), np.nan, np.float32)
    valid, nonzero = np.zeros(target.shape, bool), np.zeros(target.shape, bool)
    if offset is not None:
        row, col = offset
        top, left = max(row, 0), max(col, 0)
        bottom = min(row + target.height, own.height)
        right = min(col + target.width, own.width)
        if top < bottom and left < right:
            window = Window(left, top, right - left, bottom - top)
            inside = np.s_[top - row : bottom - row, left - col : right - col]
            image[(slice(None), *inside)], valid[inside], nonzero[inside] = _read_window(
                parts, window, sensor, alone
            )
        return image, valid, nonzero
    window = covering_window(own, target, REACH.get(sensor.resampling, 2))
    if window is None:
        return image, valid, nonzero
    if window.width * window.height * count > MOST_VALUES:
        raise ValueError(
            f'{window.width} x {window.height} pixels of the file cover a grid of {target.width} x '
            f'{target.height}: resample the file to a coarser resolution'
        )
    values, good, some = _read_window(parts, window, sensor, alone)
    # Mask before warping, or invalid values would affect neighbouring pixels.
    values[:, ~good] = np.nan
    part = own.crop(window.row_off, window.col_off, window.height, window.width)
    place = {'src_transform': part.transform, 'src_crs': part.crs}
    image = warp_values(values, target, Resampling[sensor.resampling], **place)
    (seen,) = warp_values(some[None].astype(np.float32), target, Resampling.nearest, **place)
    return image, np.isfinite(image).all(axis=0), seen > 0


def _read_window(
    parts: list[_Part], window: Window, sensor: Sensor, alone: bool
) -> tuple[Image, Bools, Bools]:
    """Read a window of files: values, validity, and where any number is not 0."""
    shape = int(window.height), int(window.width)
    valid, nonzero = np.ones(shape, bool), np.zeros(shape, bool)
    images, fills = [], sensor.fills_zero
    for part in parts:
        source, indices = as_dataset(part.source), list(part.known.indices.values())
        numbers = source.read([i + 1 for i in indices], window=window)
        mask = own_mask(source, indices, window)
        if mask is not None:
            valid &= mask
        some = numbers.any(axis=0)
        if part.known.others and not some.all():
            some |= source.read([i + 1 for i in part.known.others], window=window).any(axis=0)
        nonzero |= some
        nodata = [source.nodatavals[i] for i in indices]
        fills |= 0 in nodata
        # Whether 0 is a fill value is decided below from all files.
        mark_nodata(numbers, valid, sensor, nodata, others=np.ones((1, 1, 1)))
        images.append(part.known.scaled(numbers))
    image = images[0] if len(images) == 1 else np.concatenate(images)
    is_single = len(image) == 1 and not any(part.known.others for part in parts)
    if fills and (alone or not is_single or not sensor.measures_zero):
        valid &= nonzero
    mark_beyond_limits(image, valid, sensor)
    return image, valid, nonzero
