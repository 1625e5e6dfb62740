"""Check whether a file is a valid image of its sensor."""

import os
import threading
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

#: Rows that are inspected, as fractions of the height.
_ROWS = (0.1, 0.5, 0.9)

#: Transform that GDAL reports if there is none.
_NO_TRANSFORM: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

#: A file with more than this many bytes of pixels must not be compressed by more than this factor.
#: Real images are never compressed so far.
_MANY_BYTES, _MOST_EXPANSION = 1 << 26, 200

#: Number of values read at a time.
_AT_ONCE = 1 << 22

#: Larger than any coordinate on Earth, in degrees, metres or feet.
_FARTHEST = 1e9

#: Number of bytes that writers may leave after the last byte the header refers to.
_LEFT_OVER = 64

#: Fill values are one or a few. A file is considered damaged if more distinct values than this are
#: outside the limits of the sensor, in more than this fraction of the pixels.
_MOST_FILLS, _MOST_BEYOND = 8, 0.01

#: Lock for computations of a few microseconds each. Otherwise threads spend most of their time
#: passing on Python's global lock, which NumPy releases in each of them.
_COMPUTING = threading.Lock()

#: Value for the band names of a file that does not name its bands.
UNNAMED = ''


class Problem(StrEnum):
    """Reason why a file must not be used."""

    NAME = 'name is not that of a scene'
    EMPTY = 'empty file'
    PERMISSION = 'no permission to read'
    UNREADABLE = 'not readable as a raster'
    TRUNCATED = 'shorter than its header says'
    LONGER = 'longer than its header says'
    TOO_LARGE = 'more pixels than its bytes can hold'
    BAND_COUNT = 'wrong number of bands'
    DTYPE = 'wrong type of pixels'
    SCALE = 'its scale leads to no unit of the sensor'
    NO_EPSG = 'no CRS with an EPSG code'
    TRANSFORM = 'transform that is not a position on the ground'
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


#: Text in the table of problems for files that are used, with invalid pixels masked.
GAPS = 'some pixels are NaN or nodata (used: they are masked)'


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of inspecting a file.

    Attributes:
        header: Its header, if it could be read.
        problem: Why it must not be used; None if it can be used.
        gaps: Whether the inspected rows have pixels without data.
        names: Names of its bands in the file, separated by spaces; :data:`UNNAMED` if the file has
            none, and the order of the sensor is assumed.
    """

    header: Header | None
    problem: Problem | None
    gaps: bool = False
    names: str = UNNAMED


def inspect(path: str | os.PathLike[str], sensor: str) -> Finding:
    """Inspect the header and some rows of a file, and all rows if these look wrong.

    Args:
        path: Path of the file.
        sensor: Key of the sensor.

    Returns:
        The finding. No error is raised, whatever the file contains.
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


def sample_values(path: str | os.PathLike[str], sensor: str) -> npt.NDArray[np.float32]:
    """Read some values of a file, to determine their unit.

    Args:
        path: Path of the file.
        sensor: Key of the sensor.

    Returns:
        Values as selected by :func:`geofm.units.some_values`; none if the file cannot be read.
    """
    try:
        with open_raster(path) as src:
            bands = SensorBands.of(src, SENSORS[sensor])
            rows = [Window(0, int(fraction * src.height), src.width, 1) for fraction in _ROWS]
            values = [some_values(bands.read(src, row)[0], bands.sensor) for row in rows]
    except RASTER_ERRORS:
        return np.empty(0, np.float32)
    return np.concatenate(values)


def _inspect_plain(
    path: str | os.PathLike[str], descriptor: int, header: Header, sensor: Sensor, size: int
) -> Finding:
    """Inspect an ordinary file, whose bands are in the order of the sensor."""
    if header.bands != len(sensor.bands):
        return Finding(header, Problem.BAND_COUNT)
    problem = _header_problem(header, size)
    if problem is not None:
        return Finding(header, problem)
    bands = SensorBands(sensor, dict(zip(sensor.band_names, range(header.bands), strict=True)))
    rows = [int(fraction * header.height) for fraction in _ROWS]
    strips = sorted({row // header.rows_per_strip for row in rows}) if header.strips else []
    values = len(strips) * header.rows_per_strip * header.width * header.bands
    if not 0 < values <= _AT_ONCE:
        with open_raster(path) as src:
            return inspect_bands(src, header, bands)
    pixels = np.concatenate([read_rows(descriptor, header, strip) for strip in strips])
    with _COMPUTING:
        # Reductions over bands are several times faster if each band is contiguous.
        numbers = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
        valid = np.ones(numbers.shape[1:], bool)
        inspection = _Inspection(bands, header)
        inspection.add(numbers, bands.convert(numbers, valid, header.nodata), valid)
        finding = inspection.finding()
    if finding.problem is None:
        return finding
    # A few rows are not enough to reject a file.
    with open_raster(path) as src:
        return inspect_bands(src, header, bands, all_rows=True)


def _inspect_any(src: DatasetReader, header: Header, sensor: Sensor, size: int) -> Finding:
    """Inspect a file through GDAL."""
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
    """Return what is wrong with a header, if anything."""
    if header.epsg is None:
        return Problem.NO_EPSG
    if not is_on_earth(header.transform):
        return Problem.TRANSFORM
    if size < header.end:
        return Problem.TRUNCATED
    if header.used and size > header.used + _LEFT_OVER:
        return Problem.LONGER
    pixels = header.width * header.height * header.bands * np.dtype(header.dtype).itemsize
    return Problem.TOO_LARGE if pixels > max(_MANY_BYTES, _MOST_EXPANSION * size) else None


def is_on_earth(transform: tuple[float, ...]) -> bool:
    """Check that a transform is given, is invertible and leads to coordinates of a CRS on Earth.

    The identity counts as not given, because GDAL reports it for files without a transform.

    Args:
        transform: Affine coefficients a to f.

    Returns:
        Whether it is.
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
    """Inspect some rows of an open raster, and all rows if these look wrong.

    Args:
        src: The raster.
        header: Its header.
        bands: Bands to inspect.
        all_rows: Whether to inspect all rows in any case.

    Returns:
        The finding.
    """
    if not all_rows:
        inspection = _Inspection(bands, header)
        for fraction in _ROWS:
            row = Window(0, int(fraction * src.height), src.width, 1)
            inspection.add(*bands.numbers_and_values(src, row))
        finding = inspection.finding()
        if finding.problem is None:
            return finding
    # A few rows are not enough to reject a file.
    inspection = _Inspection(bands, header)
    for window in _windows(src):
        inspection.add(*bands.numbers_and_values(src, window))
    return inspection.finding()


def _windows(src: DatasetReader) -> Iterator[Window]:
    """Yield windows that cover a file, in whole blocks where possible."""
    height, width = src.block_shapes[0]
    cols = max(width, _AT_ONCE // (height * src.count) // width * width)
    rows = max(1, _AT_ONCE // (min(cols, src.width) * src.count) // height) * height
    for row in range(0, src.height, rows):
        for col in range(0, src.width, cols):
            yield Window(col, row, min(cols, src.width - col), min(rows, src.height - row))


class _Inspection:
    """What the windows of a file that were read so far show."""

    def __init__(self, bands: SensorBands, header: Header) -> None:
        self._bands, self._header = bands, header
        self._gaps = False
        self._any_number = self._any_valid = False
        self._pixels = self._beyond = 0
        self._fills: set[float] = set()
        self._some: list[npt.NDArray[np.float32]] = []

    def add(self, numbers: npt.NDArray[Any], values: npt.NDArray[np.float32], valid: Bools) -> None:
        """Inspect a window: numbers of the file, values (C, H, W), and which are valid."""
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
        """Whether the data type is one that files of the sensor may have."""
        dtype = self._header.dtype
        # Integers may encode decibels if the file has a scale.
        scaled = self._bands.scale is not None and np.dtype(dtype).kind in 'iu'
        types = self._bands.sensor.dtypes
        return scaled or not types or dtype in types

    def finding(self) -> Finding:
        """Return the result."""
        return Finding(self._header, self.problem, self._gaps)
