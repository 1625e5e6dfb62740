"""Is a file of a sensor what it should be?"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.io import DatasetReader
from rasterio.windows import Window

from geofm.datasets.readers.tiff_header import (
    Header,
    NotPlainError,
    header_of,
    parse_header,
    read_rows,
)
from geofm.rasters import RASTER_ERRORS, open_raster
from geofm.sensor_rasters import SensorBands, UnitError
from geofm.sensors import SENSORS, BandError, Sensor
from geofm.units import WrongUnit, some_values, wrong_unit
from geofm.validity import Bools, mark_beyond_limits

#: Where rows are looked at, as fractions of the height.
_ROWS = (0.1, 0.5, 0.9)

#: GDAL's word for no transform.
_NO_TRANSFORM: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

#: Bytes of pixels beyond which a file must be large itself, and how many bytes of pixels it may
#: have for each of its own. Images with something in them are not compressed as far as that.
_MANY_BYTES, _MOST_EXPANSION = 1 << 26, 200

#: Values that are read at a time.
_AT_ONCE = 1 << 22

#: No coordinate of the Earth is as large, in degrees, metres or feet.
_FARTHEST = 1e9

#: Bytes after the last one that the header speaks of which writers leave behind.
_LEFT_OVER = 64

#: Fill is one value, or a few. A file has random bytes among its pixels if so many different values
#: are beyond the limits of the sensor, in so large a fraction of them.
_MOST_FILLS, _MOST_BEYOND = 8, 0.01

#: Names of the bands of a file that does not name them.
UNNAMED = ''


class Problem(StrEnum):
    """Why a file must not be used."""

    NAME = 'name is not that of a scene'
    EMPTY = 'no bytes'
    PERMISSION = 'no permission to read'
    UNREADABLE = 'not readable as a raster'
    TRUNCATED = 'shorter than its header says'
    LONGER = 'longer than its header says'
    TOO_LARGE = 'more pixels than its bytes can hold'
    BAND_COUNT = 'wrong number of bands'
    DTYPE = 'wrong type of pixels'
    SCALE = 'states a scale that leads to no unit of the sensor'
    NO_EPSG = 'no CRS with an EPSG code'
    TRANSFORM = 'transform that leads to no place on the ground'
    DUPLICATE = 'another file has the same sensor, ROI, patch and time step'
    NO_DATA = 'every pixel is NaN, masked, nodata or beyond the range of the sensor'
    ZEROS = 'every pixel is 0'
    DAMAGED = 'random values, beyond the range of the sensor'
    LINEAR = 'S1 in linear power, not in dB'
    RAW = 'S1 in raw digital numbers, not in dB'
    DECIBEL = 'backscatter in dB, not in linear power'
    REFLECTANCE = 'S2 in reflectance, not in DN (reflectance x 10,000)'
    FRACTION = 'brightness from 0 to 1, not from 0 to 255'


_UNITS = {
    WrongUnit.POWER: Problem.LINEAR,
    WrongUnit.RAW: Problem.RAW,
    WrongUnit.DECIBEL: Problem.DECIBEL,
    WrongUnit.FRACTION: Problem.FRACTION,
    WrongUnit.REFLECTANCE: Problem.REFLECTANCE,
}


#: What the table of problems says of files that are used, their invalid pixels masked.
GAPS = 'some pixels are NaN or nodata (used: they are masked)'


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out about a file.

    Attributes:
        header: Its header, if it could be read.
        problem: Why it must not be used, None if it may be.
        gaps: Whether pixels without data were seen in the rows that were looked at.
        names: Names of its bands, separated by spaces, as the file gives them; :data:`UNNAMED` if
            it does not, and the order of the sensor is assumed.
    """

    header: Header | None
    problem: Problem | None
    gaps: bool = False
    names: str = UNNAMED


def inspect(path: str | os.PathLike[str], sensor: str) -> Finding:
    """Look at the header and at some rows of a file, and at all of it if these look bad.

    Args:
        path: Path of the file.
        sensor: Key of the sensor.

    Returns:
        What was found; no error is raised for a file, whatever its bytes are.
    """
    header = None
    try:
        with Path(path).open('rb', buffering=0) as file:
            descriptor = file.fileno()
            size = os.fstat(descriptor).st_size
            if size == 0:
                return Finding(None, Problem.EMPTY)
            try:
                header = parse_header(path, descriptor)
            except NotPlainError:
                pass
            else:
                return _inspect_plain(path, descriptor, header, SENSORS[sensor], size)
        with open_raster(path) as src:
            header = header_of(src)
            return _inspect_any(src, header, SENSORS[sensor], size)
    except PermissionError:
        return Finding(header, Problem.PERMISSION)
    except (*RASTER_ERRORS, MemoryError):
        return Finding(header, Problem.UNREADABLE)


def look_at_values(path: str | os.PathLike[str], sensor: str) -> npt.NDArray[np.float32]:
    """Read some values of a file, to tell their unit by.

    Args:
        path: Path of the file.
        sensor: Key of the sensor.

    Returns:
        Values as of :func:`geofm.units.some_values`; none if the file cannot be read.
    """
    try:
        with open_raster(path) as src:
            bands = SensorBands.of(src, SENSORS[sensor])
            rows = [Window(0, int(share * src.height), src.width, 1) for share in _ROWS]
            values = [some_values(bands.read(src, row)[0], bands.sensor) for row in rows]
    except RASTER_ERRORS:
        return np.empty(0, np.float32)
    return np.concatenate(values)


def _inspect_plain(
    path: str | os.PathLike[str], descriptor: int, header: Header, sensor: Sensor, size: int
) -> Finding:
    """Look at an ordinary file, whose bands are in the order of the sensor."""
    if header.bands != len(sensor.bands):
        return Finding(header, Problem.BAND_COUNT)
    problem = _header_problem(header, size)
    if problem is not None:
        return Finding(header, problem)
    bands = SensorBands(sensor, dict(zip(sensor.band_names, range(header.bands), strict=True)))
    if header.strips is None or header.rows_per_strip * header.width * header.bands > _AT_ONCE:
        with open_raster(path) as src:
            return inspect_bands(src, header, bands)
    rows = [int(share * header.height) for share in _ROWS]
    strips = sorted({row // header.rows_per_strip for row in rows})
    look = _Look(bands, header)
    for strip in strips:
        numbers = np.moveaxis(read_rows(descriptor, header, strip), -1, 0)
        valid = np.ones(numbers.shape[1:], bool)
        look.add(numbers, bands.convert(numbers, valid, header.nodata), valid)
    if look.problem is None:
        return look.finding()
    # A few rows are no proof.
    with open_raster(path) as src:
        return inspect_bands(src, header, bands, all_rows=True)


def _inspect_any(src: DatasetReader, header: Header, sensor: Sensor, size: int) -> Finding:
    """Look at a file through GDAL."""
    try:
        bands = SensorBands.of(src, sensor)
    except BandError:
        return Finding(header, Problem.BAND_COUNT)
    except UnitError:
        return Finding(header, Problem.SCALE)
    finding = Finding(header, _header_problem(header, size))
    if finding.problem is None:
        finding = inspect_bands(src, header, bands)
    return replace(finding, names=' '.join(bands.indices) if bands.named else UNNAMED)


def _header_problem(header: Header, size: int) -> Problem | None:
    """What is wrong with a header."""
    if header.epsg is None:
        return Problem.NO_EPSG
    if not leads_somewhere(header.transform):
        return Problem.TRANSFORM
    if size < header.end:
        return Problem.TRUNCATED
    if header.used and size > header.used + _LEFT_OVER:
        return Problem.LONGER
    pixels = header.width * header.height * header.bands * np.dtype(header.dtype).itemsize
    return Problem.TOO_LARGE if pixels > max(_MANY_BYTES, _MOST_EXPANSION * size) else None


def leads_somewhere(transform: tuple[float, ...]) -> bool:
    """Whether a transform can be inverted and stays within what any CRS of the Earth covers.

    Args:
        transform: Affine coefficients a to f.

    Returns:
        Whether it does.
    """
    a, b, _, d, e, _ = transform
    return (
        transform != _NO_TRANSFORM
        and all(abs(value) < _FARTHEST for value in transform)
        and a * e != b * d
    )


def inspect_bands(
    src: DatasetReader, header: Header, bands: SensorBands, all_rows: bool = False
) -> Finding:
    """Look at some rows of an open raster, and at all of it if these look bad.

    Args:
        src: The raster.
        header: Its header.
        bands: Which bands of it to look at.
        all_rows: Whether to look at all rows in any case.

    Returns:
        What was found.
    """
    if not all_rows:
        look = _Look(bands, header)
        for share in _ROWS:
            row = Window(0, int(share * src.height), src.width, 1)
            look.add(*bands.numbers_and_values(src, row))
        if look.problem is None:
            return look.finding()
    # A few rows are no proof.
    look = _Look(bands, header)
    for window in _windows(src):
        look.add(*bands.numbers_and_values(src, window))
    return look.finding()


def _windows(src: DatasetReader) -> Iterator[Window]:
    """Windows of a file that are read one after the other, in whole blocks where possible."""
    height, width = src.block_shapes[0]
    cols = max(width, _AT_ONCE // (height * src.count) // width * width)
    rows = max(1, _AT_ONCE // (min(cols, src.width) * src.count) // height) * height
    for row in range(0, src.height, rows):
        for col in range(0, src.width, cols):
            yield Window(col, row, min(cols, src.width - col), min(rows, src.height - row))


class _Look:
    """What was seen of a file so far."""

    def __init__(self, bands: SensorBands, header: Header) -> None:
        self._bands, self._header = bands, header
        self._gaps = False
        self._any_number = self._any_valid = False
        self._pixels = self._beyond = 0
        self._fills: set[float] = set()
        self._some: list[npt.NDArray[np.float32]] = []

    def add(self, numbers: npt.NDArray[Any], values: npt.NDArray[np.float32], valid: Bools) -> None:
        """Look at a window: numbers of the file, values (C, H, W), and which are valid."""
        sensor = self._bands.sensor
        self._pixels += valid.size
        with np.errstate(invalid='ignore'):
            self._any_number |= bool(numbers.any())
        if not valid.all():
            self._gaps = True
            within = np.ones_like(valid)
            mark_beyond_limits(values, within, sensor)
            far = values[:, ~within]
            self._beyond += far.shape[1]
            low, high = sensor.limits
            outside = far[np.isfinite(far) & ~((far >= low) & (far <= high))]
            if len(self._fills) <= _MOST_FILLS:
                self._fills.update(np.unique(outside)[: _MOST_FILLS + 1].tolist())
        self._any_valid |= bool(valid.any())
        self._some.append(some_values(values, sensor))

    @property
    def problem(self) -> Problem | None:
        """Why the file must not be used."""
        if not self._any_number and self._bands.sensor.fills_zero:
            return Problem.ZEROS if self._header.nodata != 0 else Problem.NO_DATA
        unit = wrong_unit(np.concatenate(self._some), self._bands.sensor)
        if unit in _UNITS:
            return _UNITS[unit]
        if not self._is_right_type:
            return Problem.DTYPE
        if len(self._fills) > _MOST_FILLS and self._beyond > _MOST_BEYOND * self._pixels:
            return Problem.DAMAGED
        return None if self._any_valid else Problem.NO_DATA

    @property
    def _is_right_type(self) -> bool:
        """Whether pixels are of a type that the sensor's files may have."""
        dtype = self._header.dtype
        # Whole numbers may stand for decibels if the file says how.
        scaled = self._bands.scale is not None and np.dtype(dtype).kind in 'iu'
        types = self._bands.sensor.dtypes
        return scaled or not types or dtype in types

    def finding(self) -> Finding:
        """What was found out about the file."""
        return Finding(self._header, self.problem, self._gaps)
