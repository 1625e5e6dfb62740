"""Is a file of Sentinel-1 or Sentinel-2 what it should be?"""

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.errors import RasterioError
from rasterio.windows import Window

from geofm.datasets.catalogue.scan import DTYPES
from geofm.datasets.catalogue.tiff_header import (
    Header,
    NotPlainError,
    parse_header,
    read_header,
    read_rows,
)
from geofm.sensors import SENSORS

#: Where rows are looked at, as shares of the height.
_ROWS = (0.1, 0.5, 0.9)

#: GDAL's word for no transform.
_NO_TRANSFORM: tuple[float, ...] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

#: Values beyond which a file is no patch: one that says so has a broken header.
_MOST_VALUES = 1 << 31

#: No coordinate of the Earth is as large, in degrees, metres or feet.
_FARTHEST = 1e9


class Problem(StrEnum):
    """Why a file must not be used."""

    NAME = 'name is not that of a scene'
    EMPTY = 'no bytes'
    PERMISSION = 'no permission to read'
    UNREADABLE = 'not readable as a raster'
    TRUNCATED = 'shorter than its header says'
    BAND_COUNT = 'wrong number of bands'
    DTYPE = 'wrong type of pixels'
    NO_EPSG = 'no CRS with an EPSG code'
    TRANSFORM = 'transform that leads to no place on the ground'
    DUPLICATE = 'another file has the same sensor, ROI, patch and time step'
    NO_DATA = 'every pixel is NaN or nodata'
    ZEROS = 'every pixel is 0'
    LINEAR = 'S1 in linear power, not in dB'


#: What the table of problems says of files that are used, their invalid pixels masked.
GAPS = 'some pixels are NaN or nodata (used: they are masked)'


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out about a file.

    Attributes:
        header: Its header, if it could be read.
        problem: Why it must not be used, None if it may be.
        gaps: Whether NaN or nodata were seen in the rows that were looked at.
    """

    header: Header | None
    problem: Problem | None
    gaps: bool = False


def inspect(path: str | os.PathLike[str], sensor: str) -> Finding:
    """Look at the header and at some rows of a file, and at all of it if these look bad.

    Args:
        path: Path of the file.
        sensor: ``'s1'`` or ``'s2'``.

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
                header = parse_header(descriptor)
            except NotPlainError:
                header = read_header(path)
            problem = _header_problem(header, sensor, size)
            if problem is not None:
                return Finding(header, problem)
            return _content(path, descriptor, header, sensor)
    except PermissionError:
        return Finding(header, Problem.PERMISSION)
    except (OSError, RasterioError, ValueError, MemoryError):
        return Finding(header, Problem.UNREADABLE)


def _header_problem(header: Header, sensor: str, size: int) -> Problem | None:
    """What is wrong with a header."""
    if header.bands != len(SENSORS[sensor].bands):
        return Problem.BAND_COUNT
    if header.dtype not in DTYPES[sensor]:
        return Problem.DTYPE
    if header.epsg is None:
        return Problem.NO_EPSG
    if not _leads_somewhere(header.transform):
        return Problem.TRANSFORM
    if size < header.end:
        return Problem.TRUNCATED
    many = header.width * header.height * header.bands > _MOST_VALUES
    return Problem.UNREADABLE if many else None


def _leads_somewhere(transform: tuple[float, ...]) -> bool:
    """Whether a transform can be inverted and stays within what any CRS of the Earth covers."""
    a, b, _, d, e, _ = transform
    return (
        transform != _NO_TRANSFORM
        and all(abs(value) < _FARTHEST for value in transform)
        and a * e != b * d
    )


def _content(path: str | os.PathLike[str], descriptor: int, header: Header, sensor: str) -> Finding:
    """What the pixels tell."""
    pixels = _some_rows(path, descriptor, header)
    problem, gaps = _judge(pixels, header.nodata, sensor)
    if problem is not None:
        # A few rows are no proof.
        with rasterio.open(path) as src:
            pixels = np.moveaxis(src.read(), 0, -1).reshape(-1, src.count)
        problem, gaps = _judge(pixels, header.nodata, sensor)
    return Finding(header, problem, gaps)


def _some_rows(
    path: str | os.PathLike[str], descriptor: int, header: Header
) -> npt.NDArray[np.generic]:
    """Pixels (N, C) of some rows."""
    rows = [int(share * header.height) for share in _ROWS]
    if header.strips is not None:
        strips = sorted({row // header.rows_per_strip for row in rows})
        parts = [read_rows(descriptor, header, strip) for strip in strips]
    else:
        with rasterio.open(path) as src:
            windows = [Window(0, row, src.width, 1) for row in rows]
            parts = [np.moveaxis(src.read(window=window), 0, -1) for window in windows]
    return np.concatenate([part.reshape(-1, header.bands) for part in parts])


def _judge(
    pixels: npt.NDArray[np.generic], nodata: float | None, sensor: str
) -> tuple[Problem | None, bool]:
    """What is wrong with pixels (N, C), and whether some of them have no data."""
    if not pixels.any():
        return (Problem.ZEROS if nodata != 0 else Problem.NO_DATA), True
    gone = np.zeros(len(pixels), bool)
    if pixels.dtype.kind == 'f':
        gone |= ~np.isfinite(pixels).all(axis=1)
    if nodata is not None and nodata == nodata:
        same = pixels == np.asarray(nodata, pixels.dtype)
        # As in reading: one band of S2 may well be at the nodata value, B10 at 0 above all.
        gone |= same.any(axis=1) if sensor == 's1' else same.all(axis=1)
    if gone.all():
        return Problem.NO_DATA, True
    gaps = bool(gone.any())
    if sensor == 's1':
        kept = pixels[~gone] if gaps else pixels
        # Open water and most land lie below 0 dB; power is never below 0.
        if kept.any() and kept.min() >= 0:  # type: ignore[operator]
            return Problem.LINEAR, gaps
    return None, gaps
