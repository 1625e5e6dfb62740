"""A scene of one or more sensors, of any size, read window by window on one grid."""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from rasterio.enums import Resampling
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.windows import Window
from torch import Tensor

from geofm.grid import Grid
from geofm.maps.scene.placement import Placement
from geofm.printing import warn
from geofm.rasters import Address, open_raster
from geofm.sensor_rasters import SensorBands
from geofm.sensors import (
    DEFAULT_SENSORS,
    SENSORS,
    BandError,
    Sensor,
    canonical_order,
    check_bands,
    date_columns,
    reference_sensor,
    sensor_channels,
)
from geofm.units import (
    UnitWarning,
    WrongUnit,
    baseline_of,
    wrong_unit,
)

#: Values for a band that a raster lacks: the mean of the band, or zero.
Missing = Literal['mean', 'zero']

#: Size of GDAL's cache in bytes while a scene is read. GDAL's default, 5 % of the machine's memory,
#: can be far more than a row of windows needs.
CACHE_BYTES = 256 * 2**20

#: Maximum number of pixels of a raster that are warped at once.
_MOST_PIXELS = 2**24

#: Side in pixels of the windows from which the unit of a raster is recognised.
_SAMPLE = 64

_FILE_DATE = re.compile(r'(?<!\d)((?:19|20)\d{2})(-?)(\d{2})\2(\d{2})(?:T\d{6})?(?!\d)')

_OLD_SENSING = re.compile(r'_OPER_.*_V(\d{8}T\d{6})')

#: Metadata domain and key of the time of acquisition in the files of GDAL's drivers and of common
#: producers. TIFFTAG_DATETIME is not among them: by the standard, it is the time of writing.
_DATE_TAGS = (
    ('IMAGERY', 'ACQUISITIONDATETIME'),
    (None, 'ACQUISITION_DATE'),
    (None, 'DATATAKE_1_DATATAKE_SENSING_START'),
    (None, 'PRODUCT_START_TIME'),
)


@dataclass(frozen=True)
class SensorRaster:
    """An open raster of one sensor.

    Attributes:
        sensor: The sensor.
        src: The raster.
        address: Path or address of the raster.
        reading: How its bands are read.
        placement: Where its pixels lie.
        date: Day of acquisition, NaT if unknown.
    """

    sensor: Sensor
    src: DatasetReader
    address: Address
    reading: SensorBands
    placement: Placement
    date: np.datetime64

    @classmethod
    def open(
        cls,
        path: Path,
        sensor: Sensor,
        date: str | None = None,
        bands: Sequence[str] | None = None,
    ) -> Self:
        """Open a raster of a sensor.

        A warning is issued if the bands have no names or if the raster is placed by ground control
        points.

        Args:
            path: A raster as :func:`geofm.rasters.open_raster` takes it. Its bands are identified
                by their descriptions, e.g. 'B8A' or 'Sigma0_VV'. Without descriptions, the raster
                must have all bands of the sensor in the sensor's order, or *bands* must name them.
            sensor: The sensor.
            date: Day of acquisition, YYYY-MM-DD. Default: from the file's name or metadata.
            bands: Name of each band of the file, in the order of the file. Overrides the
                descriptions.

        Returns:
            The open raster.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file is not a raster or not georeferenced, if its scale and offset do
                not lead to a unit of the sensor, or if the date is invalid.
            BandError: If the bands cannot be identified.
        """
        try:
            src = open_raster(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f'{error} (given as the {sensor.title} raster)') from error
        try:
            placement = Placement.of(src)
            day = acquisition_date(src) if date is None else _day(date, sensor)
            reading = SensorBands.of(src, sensor, bands)
        except ValueError:
            src.close()
            raise
        if not reading.named and len(sensor.bands) > 1:
            warn(
                f'{path}: its bands have no names; assumed to be {", ".join(reading.indices)}, in '
                f'this order. If that is wrong, name them with {bands_option(sensor.name)}'
            )
        return cls(sensor, src, Address.parse(path), reading, placement, day)._without_offset()

    @property
    def states_scale(self) -> bool:
        """Whether the file has a scale or an offset."""
        bands = self.bands.values()
        return any((self.src.scales[i], self.src.offsets[i]) != (1, 0) for i in bands)

    def _without_offset(self) -> Self:
        """Subtract the offset of processing baseline 04.00 if the values contain it."""
        # The baseline is in the name of a product and, written by GDAL, in the metadata as '05.09'.
        tag = self.src.tags().get('PROCESSING_BASELINE', '')
        baseline = baseline_of(self.src.name) or baseline_of(f'N{tag.replace(".", "")}') or 0
        added = self.sensor.baseline_offset
        if not added or self.states_scale or baseline < 4:
            return self
        if wrong_unit(self.sample(), self.sensor) is not WrongUnit.OFFSET:
            return self
        warn(
            f'{self.src.name}: processing baseline {baseline:.2f}, and hardly any DN is below '
            f'{added:g}: this offset is subtracted. If that is wrong, set a scale of '
            f'{self.sensor.scale:g} and an offset of 0 in the file'
        )
        shape = (len(self.bands), 1, 1)
        reading = replace(self.reading, scale=np.ones(shape), offset=np.full(shape, -added))
        return replace(self, reading=reading)

    @property
    def bands(self) -> Mapping[str, int]:
        """Zero-based index in the file of each known band."""
        return self.reading.indices

    def sample(self) -> npt.NDArray[np.float32]:
        """Read some values of all bands from windows spread over the raster.

        Returns:
            Values without fill, in the unit of the sensor, of one dimension. Values above the
            sensor's limits are included.
        """
        starts = [
            sorted({int((size - _SAMPLE) * k / 2) if size > _SAMPLE else 0 for k in range(3)})
            for size in self.src.shape
        ]
        return np.concatenate(
            [
                self.reading.measured(self.src, Window(col, row, *self._sides(row, col)))
                for row in starts[0]
                for col in starts[1]
            ]
        )

    def _sides(self, row: int, col: int) -> tuple[int, int]:
        """Return the width and height of a window of :meth:`sample`."""
        height, width = self.src.shape
        return min(_SAMPLE, width - col), min(_SAMPLE, height - row)

    def overview(self, shrink: float) -> Self:
        """Open the coarsest overview that is not coarser than needed.

        Args:
            shrink: Side of the pixels that are needed, in pixels of the raster.

        Returns:
            The overview, which the caller must close; this raster if it has no such overview.
        """
        fit = [i for i, factor in enumerate(self.src.overviews(1)) if factor <= shrink]
        if not fit or not self.placement.is_regular:
            return self
        src = open_raster(self.address.name, overview_level=fit[-1])
        return replace(self, src=src, placement=Placement.of(src))


def acquisition_date(src: DatasetReader) -> np.datetime64:
    """Return the day of acquisition from the file name or the metadata of a raster.

    Args:
        src: Open raster. The first YYYY-MM-DD or YYYYMMDD in its name is used; in the names of
            Sentinel products and of SEN12MS-CR-TS, that is the time of sensing.

    Returns:
        The day, NaT if unknown.
    """
    tags = (src.tags(ns=domain).get(key, '') for domain, key in _DATE_TAGS)
    path = Path(src.name)
    names = [path.name]
    if '_OPER_' in path.name:
        # Until 2016, names of Sentinel-2 products began with the time of processing. The time of
        # sensing follows a V in the product's name, which may be the name of a folder.
        found = (_OLD_SENSING.search(part) for part in reversed(path.parts))
        names = [match[1] for match in found if match]
    for text in (*names, *tags):
        for match in _FILE_DATE.finditer(text.replace('/', '-')):
            year, _, month, day = match.groups()
            try:
                return np.datetime64(f'{year}-{month}-{day}', 'D')
            except ValueError:
                continue
    return np.datetime64('NaT', 'D')


def _day(text: str, sensor: Sensor) -> np.datetime64:
    try:
        return np.datetime64(text, 'D')
    except ValueError as error:
        raise ValueError(f"{sensor.name} date '{text}' is invalid: give YYYY-MM-DD") from error


def option(key: str) -> str:
    """Return the command-line option for the file of a sensor.

    Args:
        key: Key of the sensor.

    Returns:
        ``--s1`` or ``--s2`` for Sentinel-1 and Sentinel-2, otherwise e.g. ``--scene dem=FILE``.
    """
    return f'--{key}' if key in DEFAULT_SENSORS else f'--scene {key}=FILE'


def bands_option(key: str) -> str:
    """Return the command-line option for the names of the bands of a file.

    Args:
        key: Key of the sensor.

    Returns:
        The option, e.g. ``--scene_bands landsat=[...]``.
    """
    return f'--scene_bands {key}=[...]'


def files_by_sensor(
    s1: Path | None, s2: Path | None, scene: Mapping[str, Path | None] | None
) -> dict[str, Path]:
    """Return the files of a scene by sensor.

    Args:
        s1: Sentinel-1 raster.
        s2: Sentinel-2 raster.
        scene: Rasters of any sensors by key.

    Returns:
        The rasters that are not None, in canonical order.

    Raises:
        SensorError: If a sensor is unknown.
        ValueError: If a sensor is given twice.
    """
    files = dict(zip(DEFAULT_SENSORS, (s1, s2), strict=True))
    for key, path in (scene or {}).items():
        if files.get(key) is not None and path is not None:
            raise ValueError(f'two rasters of the sensor {key}: {files[key]} and {path}')
        files[key] = path or files.get(key)
    given = {key: path for key, path in files.items() if path is not None}
    return {key: given[key] for key in canonical_order([*given])} if given else {}


def read_where_covered(
    raster: SensorRaster, bands: Sequence[str], grid: Grid
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Read bands on a grid that may reach beyond the raster.

    If the pixels of the raster are pixels of the grid, they are read unchanged; otherwise the
    raster is warped.

    Args:
        raster: Open raster.
        bands: Names of bands of the raster.
        grid: Grid to read on.

    Returns:
        Values in the unit of the sensor, float32 of shape (C, H, W), and a mask of valid pixels,
        bool of shape (H, W), by the rule of :mod:`geofm.validity` and the mask of the file. Pixels
        that the raster does not cover are NaN.
    """
    reading = raster.reading.choose(bands)
    part = _shared_part(raster.placement.grid, grid) if raster.placement.is_regular else None
    if part is None:
        return _warp(raster, reading, grid, Resampling[raster.sensor.resampling])
    row, col, window = part
    values = np.full((len(bands), *grid.shape), np.nan, np.float32)
    valid = np.zeros(grid.shape, bool)
    inside = (slice(row, row + window.height), slice(col, col + window.width))
    values[:, *inside], valid[inside] = reading.read(raster.src, window)
    return values, valid


def _shared_part(own: Grid, grid: Grid) -> tuple[int, int, Window] | None:
    """Return the part of a grid that has the pixels of a raster.

    Args:
        own: Grid of the raster.
        grid: The grid.

    Returns:
        First row and first column of the part in the grid, and its window in the raster; None if
        the two do not share pixels.
    """
    if own.crs != grid.crs:
        return None
    to_grid = ~grid.transform @ own.transform
    corners = (to_grid @ (0, 0), to_grid @ (own.width, own.height))
    left, right = sorted(round(col) for col, _ in corners)
    top, bottom = sorted(round(row) for _, row in corners)
    left, right = max(left, 0), min(right, grid.width)
    top, bottom = max(top, 0), min(bottom, grid.height)
    if left >= right or top >= bottom:
        return None
    window = grid.crop(top, left, bottom - top, right - left).window_in(own)
    return None if window is None else (top, left, window)


def _warp(
    raster: SensorRaster, reading: SensorBands, grid: Grid, resampling: Resampling
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Warp a raster onto a grid. Pixels without data do not influence their neighbours."""
    window = raster.placement.window_of(grid)
    if window is None:
        values = np.full((len(reading.indices), *grid.shape), np.nan, np.float32)
        return values, np.zeros(grid.shape, bool)
    if window.width * window.height > _MOST_PIXELS and max(grid.shape) > 1:
        # The grid is halved until the window of a part is small enough.
        axis = int(grid.width > grid.height)
        half = grid.shape[axis] // 2
        first = (0, 0, *((half, grid.width) if axis == 0 else (grid.height, half)))
        rest = (
            (half, 0, grid.height - half, grid.width)
            if axis == 0
            else (0, half, grid.height, grid.width - half)
        )
        parts = [_warp(raster, reading, grid.crop(*box), resampling) for box in (first, rest)]
        values = np.concatenate([values for values, _ in parts], axis=axis + 1)
        return values, np.concatenate([valid for _, valid in parts], axis=axis)
    values, valid = reading.read(raster.src, window)
    values[:, ~valid] = np.nan
    values = raster.placement.warp(values, window, grid, resampling)
    return values, np.isfinite(values).all(axis=0)


class Imagery(Protocol):
    """Bands of one or more sensors on one grid, read window by window.

    :class:`Scene` and :class:`geofm.maps.scene.TableScene` implement it.

    Attributes:
        bands: Names of the channels.
        grid: The grid.
        path: The raster that has this grid.
        stem: Short name, for the names of files.
        missing: What fills a missing band.
    """

    bands: tuple[str, ...]
    grid: Grid
    path: Path
    stem: str
    missing: Missing | None

    @property
    def dates(self) -> Tensor:
        """Days of acquisition since 1970-01-01 per sensor, as models take them, int64 (S,)."""

    @property
    def absent(self) -> tuple[str, ...]:
        """Keys of the missing sensors."""

    @property
    def at_mean(self) -> list[int]:
        """Indices of the channels that are filled with the mean of their band."""

    def read(self, row: int, col: int, height: int, width: int) -> dict[str, Tensor]:
        """Read a window, as :meth:`Scene.read` does."""

    def describe(self) -> dict[str, Any]:
        """Identify the files, as plain data for JSON."""

    def tags(self) -> dict[str, str]:
        """Return the name of the first file and the date of each sensor, for tags of products."""

    @property
    def days(self) -> Mapping[str, np.datetime64]:
        """Day of acquisition of each sensor that is present, by key; NaT if unknown."""

    def check_units(self) -> list[str]:
        """Warn of values that seem to be in another unit."""


class Scene:
    """Rasters of one or more sensors, read on the grid of one of them.

    Use it as a context manager, which closes the files.

    Attributes:
        grid: The grid of the scene.
        reference: Key of the sensor that has this grid.
        path: The raster that has this grid.
        stem: Short name of that raster, for the names of files.
        missing: Values for a band that a raster lacks.
        bands: Names of the channels.
        sensors: Keys of the sensors that :attr:`dates` has columns for.
        rasters: The open raster of each sensor that is present, by key.
    """

    def __init__(
        self,
        bands: Sequence[str],
        s1: Path | None = None,
        s2: Path | None = None,
        dates: Mapping[str, str] | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
        missing: Missing | None = None,
        *,
        files: Mapping[str, Path | None] | None = None,
        reference: str | None = None,
        sensors: Sequence[str] | None = None,
        **others: Path | None,
    ) -> None:
        """Open the rasters of the sensors that the bands belong to.

        Args:
            bands: Names of the channels, in the order in which they are returned. A raster of a
                sensor without any of these bands is not opened.
            s1: Sentinel-1 raster, in dB.
            s2: Sentinel-2 raster, in DN (reflectance x 10,000).
            dates: Days of acquisition as YYYY-MM-DD, by sensor. Default: from the file's name or
                metadata; unknown if neither has a date.
            names: Name of each band of a file, in the order of the file, by sensor. Default: the
                descriptions of the file's bands; without any, all bands of the sensor in order.
            missing: Values for a band that a raster lacks: its 'mean' or 'zero'. None: a missing
                band is an error.
            files: Rasters of any sensors by key, in the units of the sensors.
            reference: Key of the sensor whose grid is used. Default: Sentinel-2 if it is given,
                otherwise the first sensor that is not static, see
                :func:`geofm.sensors.reference_sensor`.
            sensors: Keys of the sensors that :attr:`dates` has columns for. Default: the sensors of
                the bands.
            **others: Rasters of further sensors, such as ``dem=path``.

        Raises:
            FileNotFoundError: If a file does not exist.
            SensorError: If a sensor is unknown.
            ValueError: If no raster of these sensors is given, if a raster cannot be read or has no
                CRS, if the rasters do not overlap, or if a date is invalid.
            BandError: If a band is unknown, or if a raster lacks a band.
        """
        self.bands = check_bands(bands)
        self.missing = missing
        dates = dates or {}
        names = names or {}
        if unknown := sorted({*dates, *names} - set(SENSORS)):
            raise ValueError(f'dates or bands of unknown sensors {unknown}: known: {[*SENSORS]}')
        self._channels = sensor_channels(self.bands)
        self.sensors = canonical_order(list(self._channels) if sensors is None else sensors)
        given = files_by_sensor(s1, s2, {**(files or {}), **others})
        paths = {key: given[key] for key in self._channels if key in given}
        if not paths:
            wanted = ' or '.join(f'{SENSORS[key].title} ({option(key)})' for key in self._channels)
            raise ValueError(f'no raster given for {wanted}')
        self.reference = reference_sensor([*paths]) if reference is None else reference
        if self.reference not in paths:
            raise ValueError(
                f'reference sensor {self.reference}: it has no raster; there are rasters of '
                f'{", ".join(paths)}'
            )
        with ExitStack() as stack:
            self.rasters: dict[str, SensorRaster] = {}
            for key, path in paths.items():
                raster = SensorRaster.open(path, SENSORS[key], dates.get(key), names.get(key))
                stack.callback(raster.src.close)
                self.rasters[key] = raster
            whole = self.rasters[self.reference]
            self.path = Path(whole.src.name)
            self.stem = whole.address.stem
            self.grid = whole.placement.grid
            self._wanted = {key: self._bands_of(r, missing) for key, r in self.rasters.items()}
            self._check_overlap()
            self._files = stack.pop_all()

    def _bands_of(self, raster: SensorRaster, missing: Missing | None) -> list[str]:
        """Return the bands to read from a raster."""
        wanted = [self.bands[channel] for channel in self._channels[raster.sensor.name]]
        there = [band for band in wanted if band in raster.bands]
        if len(there) < len(wanted) and (missing is None or not there):
            lacking = [band for band in wanted if band not in there]
            raise BandError(
                f'{raster.src.name}: missing bands {lacking}: the file has {list(raster.bands)}. '
                "missing_bands (--missing_bands): 'mean' fills them with their mean, 'zero' with "
                'zeros'
            )
        return there

    @property
    def absent(self) -> tuple[str, ...]:
        """Keys of the sensors of the bands that have no raster."""
        return tuple(key for key in self._channels if key not in self.rasters)

    @property
    def at_mean(self) -> list[int]:
        """Indices of the channels that are filled with the mean of their band."""
        filled = self.filled if self.missing == 'mean' else ()
        return [self.bands.index(band) for band in filled]

    @property
    def filled(self) -> tuple[str, ...]:
        """Bands that are filled because the raster of their sensor lacks them."""
        return tuple(
            band
            for key, there in self._wanted.items()
            for band in (self.bands[channel] for channel in self._channels[key])
            if band not in there
        )

    def _check_overlap(self) -> None:
        outlines = {}
        for key, raster in self.rasters.items():
            try:
                outlines[key] = raster.placement.grid.footprint(self.grid.crs)
            except ValueError as error:
                raise ValueError(f'{raster.src.name}: {error}') from error
        whole = outlines[self.reference]
        for key, outline in outlines.items():
            if key != self.reference and not outline.intersection(whole).area > 0:
                first, second = (
                    self.rasters[k].src.name for k in canonical_order([key, self.reference])
                )
                raise ValueError(
                    f'{first} and {second} do not overlap: give rasters of the same place'
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._files.close()

    @property
    def dates(self) -> Tensor:
        """Days of acquisition since 1970-01-01, int64 (T,); the smallest int64 where unknown.

        There is one per sensor of :func:`geofm.sensors.date_columns`.
        """
        nat = np.datetime64('NaT', 'D')
        columns = date_columns(self.sensors)
        days = [self.rasters[key].date if key in self.rasters else nat for key in columns]
        return torch.from_numpy(np.array(days, 'datetime64[D]').astype(np.int64))

    def read(self, row: int, col: int, height: int, width: int) -> dict[str, Tensor]:
        """Read a window, which may reach beyond the scene.

        Args:
            row: First row in pixels of the grid.
            col: First column.
            height: Number of rows.
            width: Number of columns.

        Returns:
            A sample with 'image', float32 (C, H, W) in raw units, in the order of the bands;
            'valid', bool (H, W), true where all sensors that are present have data; and 'dates',
            int64 (S,). Channels of missing sensors and of :attr:`filled` are 0.
        """
        grid = self.grid.crop(row, col, height, width)
        image = np.zeros((len(self.bands), height, width), np.float32)
        # The scene ends where the reference raster ends: pixels that it does not cover are invalid.
        valid = np.ones((height, width), bool)
        for key, raster in self.rasters.items():
            bands = self._wanted[key]
            values, has_data = read_where_covered(raster, bands, grid)
            image[[self.bands.index(band) for band in bands]] = values
            valid &= has_data
        return {
            'image': torch.from_numpy(image),
            'valid': torch.from_numpy(valid),
            'dates': self.dates,
        }

    def describe(self) -> dict[str, Any]:
        """Identify the files of the scene without reading their pixels.

        Returns:
            Path, size, modification time, date, bands, scale and offset, by sensor.
        """
        described = {}
        for key, raster in self.rasters.items():
            path = raster.address.file
            stat = path.stat()
            reading = raster.reading
            described[key] = {
                'path': str(path.resolve()),
                'name': raster.src.name,
                'size': stat.st_size,
                'changed': stat.st_mtime_ns,
                'date': str(raster.date),
                'bands': dict(raster.bands),
                'scale': None if reading.scale is None else reading.scale.ravel().tolist(),
                'offset': None if reading.offset is None else reading.offset.ravel().tolist(),
                'logarithm': reading.logarithm,
            }
        return described

    def tags(self) -> dict[str, str]:
        """Return the name and the date of the raster of each sensor, for the tags of a product."""
        return {
            **{key: Path(raster.src.name).name for key, raster in self.rasters.items()},
            **{f'{key}_date': str(raster.date) for key, raster in self.rasters.items()},
        }

    @property
    def days(self) -> dict[str, np.datetime64]:
        """Day of acquisition of each sensor that is present, by key; NaT if unknown."""
        return {key: raster.date for key, raster in self.rasters.items()}

    def thumbnail(
        self, bands: Sequence[str], max_side: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Read bands of one sensor at a reduced size.

        The scene is never read at full size.

        Args:
            bands: Bands of one sensor that is present. They need not be among the bands of the
                scene, but the raster must have them.
            max_side: Longest side of the result in pixels.

        Returns:
            Pixels, float32 of shape (C, h, w), averaged if the scene is larger, and a mask of valid
            pixels, bool of shape (h, w).
        """
        (key,) = sensor_channels(bands)
        raster = self.rasters[key]
        grid = self.grid
        shrink = max(1.0, max(grid.shape) / max_side)
        if shrink == 1:
            return read_where_covered(raster, bands, grid)
        height, width = (max(1, round(side / shrink)) for side in grid.shape)
        scale = Affine.scale(grid.width / width, grid.height / height)
        small = replace(grid, transform=grid.transform @ scale, height=height, width=width)
        same = raster.placement.is_regular and raster.placement.grid == grid
        source = raster.overview(shrink) if same else raster
        try:
            reading = raster.reading.choose(bands)
            return _warp(source, reading, small, Resampling.average)
        finally:
            if source is not raster:
                source.src.close()

    def check_units(self) -> list[str]:
        """Warn of rasters whose values seem to be in another unit.

        Only some windows of each raster are read.

        Returns:
            The messages of the warnings.
        """
        said = []
        for raster in self.rasters.values():
            text = wrong_unit(raster.sample(), raster.sensor)
            # A file with a scale or an offset says itself whether an offset was added.
            if text is not None and not (text is WrongUnit.OFFSET and raster.states_scale):
                advice = text.advice(raster.sensor)
                said.append(f'{raster.src.name}: {raster.sensor.title}: {advice}')
                warn(said[-1], UnitWarning)
        return said
