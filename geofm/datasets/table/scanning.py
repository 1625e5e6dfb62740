"""Scan the files of a table for their grids and problems."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.progress import track

from geofm.datasets.catalogue.inspection import Problem, inspect_bands, is_on_earth
from geofm.datasets.catalogue.scan import PROGRESS_FROM, in_threads
from geofm.datasets.footprints import SEARCH_CRS, corners, extents
from geofm.datasets.readers.opening import open_source
from geofm.datasets.readers.source import Source, as_dataset
from geofm.datasets.readers.tiff_header import Header
from geofm.datasets.table.address import file_of
from geofm.datasets.table.error import refuse_rows, row_error
from geofm.datasets.table.raster_table import RasterTable
from geofm.datasets.table.reading import view_of
from geofm.printing import counted, printable
from geofm.rasters import RASTER_ERRORS
from geofm.sensor_rasters import SensorBands, UnitError
from geofm.sensors import BandError

#: Problem of a missing file.
NO_FILE = 'no such file'

#: Problem of a file whose bands are not those of the sensor or the table.
BANDS = 'bands are not those of the sensor or the table'

#: Default number of threads that read files. Most of the time is spent waiting.
JOBS = 8


class Found(NamedTuple):
    """Result of scanning the file of a row.

    Attributes:
        epsg: EPSG code; -1 if there is none.
        transform: Affine coefficients a to f; NaN if it is not georeferenced.
        height: Number of rows; 0 if the file could not be opened.
        width: Number of columns.
        problem: Why it must not be used; None if it can be used.
        message: Detailed message about the problem.
        unnamed: Whether neither the file nor the table names the bands, so that the band order of
            the sensor is assumed.
    """

    epsg: int = -1
    transform: tuple[float, ...] = (np.nan,) * 6
    height: int = 0
    width: int = 0
    problem: str | None = None
    message: str = ''
    unnamed: bool = False


class Scan(NamedTuple):
    """Scanned table.

    Attributes:
        table: The table.
        messages: First message about each problem that occurred.
        unnamed: By sensor with several bands, the number of files whose bands are named neither in
            the file nor in the table, and the first of them. They are assumed to have the band
            order of the sensor.
    """

    table: RasterTable
    messages: dict[str, str]
    unnamed: dict[str, tuple[int, str]]


def scan_table(table: RasterTable, jobs: int = JOBS, again: bool = False) -> Scan:
    """Open the files of a table to read their grids, and inspect some of their pixels.

    Args:
        table: The table.
        jobs: Number of threads.
        again: Whether to scan files again that have been scanned before.

    Returns:
        The table with all scanned columns. Files that must not be used have a problem. Files never
        cause an error.
    """
    todo = np.ones(len(table), bool) if again else (table.height == 0) & (table.problem < 0)
    rows = np.flatnonzero(todo)
    if not len(rows):
        return Scan(table, {}, {})
    files = _files(table, rows)
    items = in_threads(lambda group: _scan_file(table, *group), iter(files), jobs)
    progress = track(
        items, description='Scanning', total=len(files), disable=len(files) < PROGRESS_FROM
    )
    found = [one for group in progress for one in group]
    epsg, height, width = (a.astype(np.int32) for a in (table.epsg, table.height, table.width))
    transform, bounds = table.transform.copy(), table.bounds.copy()
    epsg[rows] = [one.epsg for one in found]
    transform[rows] = np.array([one.transform for one in found], np.float64)
    height[rows], width[rows] = [one.height for one in found], [one.width for one in found]
    points = corners(epsg[rows], transform[rows], np.stack([height[rows], width[rows]], axis=1))
    bounds[rows] = np.nan
    known = np.isfinite(points).all(axis=(1, 2))
    bounds[rows[known]] = extents(points[known], SEARCH_CRS)
    problems, problem, messages = _problems(table, rows, found)
    scanned = dataclasses.replace(
        table,
        epsg=epsg,
        transform=transform,
        height=height,
        width=width,
        bounds=bounds,
        problems=problems,
        problem=problem,
    )
    return Scan(scanned, messages, _unnamed(table, rows, found))


def _files(table: RasterTable, rows: npt.NDArray[np.integer[Any]]) -> list[tuple[str, list[int]]]:
    """Group rows by file."""
    return [(path, list(same)) for path, same in groupby(rows.tolist(), table.path)]


def _problems(
    table: RasterTable, rows: npt.NDArray[np.integer[Any]], found: list[Found]
) -> tuple[tuple[str, ...], npt.NDArray[np.int8], dict[str, str]]:
    """Return the problems, the problem of each row, and a message about each problem."""
    codes = {text: i for i, text in enumerate(table.problems)}
    problem, messages = table.problem.astype(np.int8), dict[str, str]()
    for row, one in zip(rows.tolist(), found, strict=True):
        problem[row] = -1 if one.problem is None else codes.setdefault(one.problem, len(codes))
        if one.problem is not None:
            messages.setdefault(one.problem, printable(one.message or one.problem))
    return tuple(codes), problem, messages


def _unnamed(
    table: RasterTable, rows: npt.NDArray[np.integer[Any]], found: Sequence[Found]
) -> dict[str, tuple[int, str]]:
    """Return number and first example of files without band names, by sensor."""
    counts: dict[str, tuple[int, str]] = {}
    for row, one in zip(rows.tolist(), found, strict=True):
        if one.unnamed and one.problem is None:
            count, first = counts.get(table.sensor_of(row).name, (0, table.path(row)))
            counts[table.sensor_of(row).name] = (count + 1, first)
    return counts


def _scan_file(table: RasterTable, path: str, rows: list[int]) -> list[Found]:
    """Scan the rows of a file."""
    try:
        file = file_of(path)
        if file is not None and not os.path.exists(file):  # noqa: PTH110 - of a million files
            return [Found(problem=NO_FILE, message=f'{path}: no such file')] * len(rows)
        source = open_source(path, table.sensor_of(rows[0]).name)
    except PermissionError as error:
        return [Found(problem=Problem.PERMISSION, message=str(error))] * len(rows)
    except (*RASTER_ERRORS, MemoryError) as error:
        return [Found(problem=Problem.UNREADABLE, message=str(error))] * len(rows)
    try:
        return [_scan_row(table, row, source, may_look=file is not None) for row in rows]
    finally:
        source.close()


def _scan_row(table: RasterTable, row: int, source: Source, may_look: bool) -> Found:
    """Scan a row of a file. Pixels of remote files are not inspected (*may_look* is False)."""
    found = Found(height=source.height, width=source.width)
    try:
        if source.crs is not None:
            epsg = source.crs.to_epsg()
            if epsg is None:
                return found._replace(problem=Problem.NO_EPSG)
            transform = tuple(source.transform)[:6]
            if not is_on_earth(transform):
                return found._replace(problem=Problem.TRANSFORM)
            found = found._replace(epsg=epsg, transform=transform)
        view = as_dataset(view_of(table, row, source))
        names = [name for name in table.bands_of(row) or () if name != '-']
        bands = SensorBands.of(view, table.sensor_of(row), names or None)
        found = found._replace(unnamed=not bands.named and len(bands.sensor.bands) > 1)
        if may_look:
            dtype = np.result_type(*(np.dtype(_plain(kind)) for kind in view.dtypes)).name
            header = Header(
                view.width,
                view.height,
                view.count,
                dtype,
                found.epsg if found.epsg > 0 else None,
                found.transform,
                view.nodatavals[0],
            )
            finding = inspect_bands(view, header, bands)
            if not _may_be_dark(finding.problem, bands, dtype):
                return found._replace(problem=finding.problem and str(finding.problem))
    except BandError as error:
        return found._replace(problem=BANDS, message=str(error))
    except UnitError as error:
        return found._replace(problem=Problem.SCALE, message=str(error))
    except (*RASTER_ERRORS, MemoryError) as error:
        return found._replace(problem=Problem.UNREADABLE, message=str(error))
    return found


def _may_be_dark(problem: Problem | None, bands: SensorBands, dtype: str) -> bool:
    """Check whether an apparent problem may be due to a dark band, such as Sentinel-2's B10."""
    is_one = len(bands.indices) == 1 < len(bands.sensor.bands)
    dark = problem in (Problem.ZEROS, Problem.NO_DATA, Problem.REFLECTANCE)
    return is_one and dark and bands.sensor.measures_zero and np.dtype(dtype).kind in 'iu'


def _plain(dtype: str) -> str:
    """Return the NumPy name of a data type."""
    return {'complex_int16': 'complex64'}.get(dtype, dtype)


def count_problems(table: RasterTable) -> Iterator[tuple[str, int, str]]:
    """Count the problems of files.

    Args:
        table: A scanned table.

    Yields:
        Problem, number of rows, and path of the first row.
    """
    for code, problem in enumerate(table.problems):
        rows = np.flatnonzero(table.problem == code)
        if len(rows):
            yield problem, len(rows), table.path(int(rows[0]))


def open_table(table: RasterTable | str | Path, jobs: int = JOBS) -> RasterTable:
    """Read a table, and scan it if necessary.

    Args:
        table: The table, or its file.
        jobs: Number of threads.

    Returns:
        The scanned table.

    Raises:
        FileNotFoundError: If there is no such table.
        TableError: If the table is invalid, or a file that has not been scanned yet is missing.
    """
    read = table if isinstance(table, RasterTable) else RasterTable.read(table)
    if not read.is_scanned:
        before = read.problem >= 0
        read = scan_table(read, jobs).table
        if NO_FILE in read.problems:
            gone = np.flatnonzero((read.problem == read.problems.index(NO_FILE)) & ~before)
            if len(gone):
                row = int(gone[0])
                raise row_error(
                    read.source,
                    row,
                    f'no such file: {read.path(row)} ({counted(len(gone), "row")} in total); '
                    f'correct the path (paths are relative to {read.root}) or remove the row',
                )
    check_places(read)
    return read


def check_places(table: RasterTable) -> None:
    """Check that files of several sensors can be matched.

    Args:
        table: A scanned table.

    Raises:
        TableError: If a file has neither a footprint nor a place, or some files of a place are
            georeferenced and others are not.
    """
    if len(table.sensors) < 2:
        return
    good = table.problem < 0
    placed = np.isfinite(table.bounds).all(axis=1)
    lost = good & ~placed & (table.place < 0)
    refuse_rows(
        table.source,
        lost,
        'has no CRS and no place, so that it cannot be matched with other sensors: fill in place, '
        'or give the file a CRS',
    )
    named = np.flatnonzero(good & (table.place >= 0))
    on_ground = np.zeros(len(table.places), bool)
    on_ground[table.place[named[placed[named]]]] = True
    mixed = named[~placed[named] & on_ground[table.place[named]]]
    if len(mixed):
        row = int(mixed[0])
        raise row_error(
            table.source,
            row,
            f'has no CRS, but other files of place {table.places[int(table.place[row])]} have '
            'one: give all files of a place a CRS, or none',
        )
