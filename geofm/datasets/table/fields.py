"""Read the fields of a table of rasters from a file.

Required columns are ``path``, ``sensor`` and ``datetime`` (ISO 8601, or empty). Optional columns
are ``place``, ``band`` (one name, or the names of all bands of the file separated by blanks, with
'-' for unused bands), ``index`` (number of the band in the file, from 1), ``scene`` (common to rows
without a place that belong together), ``scale``, ``offset``, ``unit``, ``nodata``, ``cloud_cover``
(0 to 1) and ``split``. Scanning adds ``crs``, ``transform``, ``height``, ``width``, ``west``,
``south``, ``east``, ``north`` and ``problem``. Other columns are ignored.
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from rasterio.crs import CRS
from rasterio.errors import CRSError

from geofm.datasets.footprints import SEARCH_CRS, corners, extents
from geofm.datasets.memory.path_list import PathList
from geofm.datasets.table.columns import (
    Coded,
    as_text,
    first_row,
    integers,
    numbers,
    parse_values,
    shorten,
    text_codes,
    times,
)
from geofm.datasets.table.error import TableError, refuse_rows, row_error
from geofm.datasets.table.files import Columns, CsvColumns, ParquetColumns
from geofm.printing import one_line, printable
from geofm.sensors import SENSORS, Sensor
from geofm.suggestions import did_you_mean

#: Columns that a table must have.
REQUIRED = ('path', 'sensor', 'datetime')

#: Columns that a table may have.
OPTIONAL = (
    *('place', 'scene', 'band', 'index', 'scale', 'offset', 'unit', 'nodata', 'cloud_cover'),
    *('split', 'crs', 'transform', 'height', 'width', 'west', 'south', 'east', 'north', 'problem'),
)

#: Suffixes of GeoParquet files.
PARQUET = ('.parquet', '.geoparquet')

#: Most different values of a column whose codes are int8.
_MOST_CODES = 127


def read_fields(path: Path) -> dict[str, Any]:
    """Read the fields of a :class:`~geofm.datasets.table.RasterTable`.

    Args:
        path: The file.

    Returns:
        The fields by name.

    Raises:
        FileNotFoundError: If there is no such file.
        TableError: If the file is not a table of rasters. The message is one line that names the
            row and says what to do.
    """
    source = printable(path)
    if not path.is_file():
        raise FileNotFoundError(f'{source}: no such file; `geofm index` creates a table')
    kind = path.suffix.lower()
    if kind not in (*PARQUET, '.csv'):
        raise TableError(f'{source}: a table must end in .csv, .parquet or .geoparquet')
    try:
        columns: Columns = CsvColumns(path) if kind == '.csv' else ParquetColumns(path)
    except (pa.ArrowException, ValueError, OSError) as error:
        what = 'CSV' if kind == '.csv' else 'Parquet'
        raise TableError(
            f'{source}: cannot be read as {what}: {printable(one_line(error))}'
        ) from error
    return fields_of(columns, source, os.path.abspath(path.parent))  # noqa: PTH100 - links stay


def fields_of(columns: Columns, source: str, root: str) -> dict[str, Any]:
    """Read the fields of a :class:`~geofm.datasets.table.RasterTable` from columns.

    Args:
        columns: The columns.
        source: Source of the columns, for messages.
        root: Absolute folder that relative paths start from.

    Returns:
        The fields by name.

    Raises:
        TableError: If they are not a table of rasters. The message is one line that names the row
            and says what to do.
    """
    _check_names(columns, source)
    try:
        return _Fields(columns, source, root).read()
    except pa.ArrowException as error:
        raise TableError(f'{source}: is damaged: {printable(one_line(error))}') from error


def _check_names(columns: Columns, source: str) -> None:
    """Check that required columns exist, and that no column exists twice."""
    names = columns.names
    for name in REQUIRED:
        if name not in names:
            others = [other for other in names if other not in (*REQUIRED, *OPTIONAL)]
            near = next((o for o in others if o.strip().lower() == name), None)
            guess = f"; did you mean '{near}'?" if near else did_you_mean(name, others)
            raise TableError(
                f"{source}: no column '{name}': a table needs the columns {', '.join(REQUIRED)}, "
                f'this one has {shorten(", ".join(names))}{printable(guess)}'
            )
    for name in (*REQUIRED, *OPTIONAL):
        if names.count(name) > 1:
            raise TableError(f"{source}: column '{name}' exists twice; remove one")


class _Fields:
    """Reader of the fields of a table."""

    def __init__(self, columns: Columns, source: str, root: str) -> None:
        self._columns, self._source, self._root = columns, source, root

    def read(self) -> dict[str, Any]:
        """Read all fields."""
        sensors, sensor = self._sensors()
        band_lists, band = self._bands(sensors, sensor)
        places = self._codes('place')
        epsg, transform, shape = self._grids()
        units, unit = self._few('unit')
        splits, split = self._few('split')
        problems, problem = self._few('problem')
        index = self._whole('index', 1, 32767, np.int16)
        self._check_index(index, band, band_lists)
        parts = self._is_part(band, band_lists, sensors, sensor) & (places.codes < 0)
        return {
            'source': self._source,
            'root': self._root,
            'paths': PathList(self._paths()),
            'sensors': tuple(s.name for s in sensors),
            'sensor': sensor,
            'places': PathList([places.values]),
            'place': places.codes,
            'time': times(self._columns.column('datetime'), 'datetime', self._source),
            'band_lists': band_lists,
            'band': band,
            'index': index,
            'scene': self._scene(parts),
            'scale': self._numbers('scale', lambda v: v != 0, 'a finite number other than 0'),
            'offset': self._numbers('offset', np.isfinite, 'a finite number'),
            'nodata': self._optional('nodata'),
            'units': units,
            'unit': unit if 'unit' in self._columns.names else None,
            'cloud_cover': self._cloud_cover(),
            'splits': splits,
            'split': split if 'split' in self._columns.names else None,
            'epsg': epsg,
            'transform': transform,
            'height': shape[0],
            'width': shape[1],
            'bounds': self._bounds(epsg, transform, shape),
            'problems': problems,
            'problem': problem,
        }

    def _sensors(self) -> tuple[list[Sensor], npt.NDArray[np.int8]]:
        """Return the sensors, and the index of the sensor of each row."""
        codes, keys = self._codes('sensor')
        refuse_rows(self._source, codes < 0, f'has no sensor; known are {", ".join(SENSORS)}')
        names = keys.to_pylist()
        for code, key in enumerate(names):
            if key not in SENSORS:
                raise row_error(
                    self._source,
                    first_row(codes == code),
                    f"unknown sensor '{shorten(key)}': known are {', '.join(SENSORS)}; define "
                    f'others in a YAML file (--sensors){did_you_mean(key, SENSORS)}',
                )
        # In canonical order, independent of the order of the rows.
        ordered = [sensor for key, sensor in SENSORS.items() if key in names]
        if len(ordered) > 127:
            raise TableError(f'{self._source}: has more than 127 sensors; split the table')
        new = np.array([ordered.index(SENSORS[key]) for key in names], np.int8)
        return ordered, new[codes] if len(new) else codes.astype(np.int8)

    def _bands(
        self, sensors: list[Sensor], sensor: npt.NDArray[np.int8]
    ) -> tuple[tuple[tuple[str, ...], ...], npt.NDArray[np.int16]]:
        """Return the lists of bands, and the index of the list of each row."""
        if 'band' not in self._columns.names:
            return (), np.full(self._columns.rows, -1, np.int16)
        codes, texts = self._codes('band')
        # The meaning of a text depends on the sensor.
        pairs = codes.astype(np.int64) * len(sensors) + sensor
        found, firsts, inverse = np.unique(pairs, return_index=True, return_inverse=True)
        lists: dict[tuple[str, ...], int] = {}
        new = np.full(len(found), -1, np.int64)
        for i, row in enumerate(firsts.tolist()):
            if codes[row] < 0:
                continue
            names = self._band_list(row, texts[int(codes[row])].as_py(), sensors[sensor[row]])
            new[i] = lists.setdefault(names, len(lists))
        if len(lists) > 32767:
            raise TableError(f'{self._source}: has more than 32,767 different lists of bands')
        return tuple(lists), new[inverse].astype(np.int16)

    def _band_list(self, row: int, text: str, sensor: Sensor) -> tuple[str, ...]:
        """Parse a list of band names."""
        names = []
        for part in text.replace(',', ' ').split():
            name = '-' if part == '-' else sensor.find_band(part)
            if name is None:
                guess = did_you_mean(part, sensor.band_names)
                raise row_error(
                    self._source,
                    row,
                    f"{sensor.name} has no band '{shorten(part)}': its bands are "
                    f'{shorten(", ".join(sensor.band_names))}{guess}',
                )
            if name != '-' and name in names:
                raise row_error(self._source, row, f'band {name} is listed twice; remove one')
            names.append(name)
        if not any(name != '-' for name in names):
            raise row_error(
                self._source,
                row,
                'the band list has no band; leave it empty for all bands of the file',
            )
        return tuple(names)

    def _check_index(
        self,
        index: npt.NDArray[np.int64],
        band: npt.NDArray[np.int16],
        band_lists: tuple[tuple[str, ...], ...],
    ) -> None:
        """Check that rows with an index have one band."""
        many = np.array([*(len(names) > 1 for names in band_lists), False])
        bad = (index > 0) & many[band]
        refuse_rows(self._source, bad, 'an index needs one band; write a row per band')

    def _is_part(
        self,
        band: npt.NDArray[np.int16],
        band_lists: tuple[tuple[str, ...], ...],
        sensors: list[Sensor],
        sensor: npt.NDArray[np.int8],
    ) -> npt.NDArray[np.bool_]:
        """Return which rows are one of several bands of a scene."""
        single = np.array([*(sum(n != '-' for n in names) == 1 for names in band_lists), False])
        several = np.array([*(len(s.bands) > 1 for s in sensors), False])
        return np.asarray(single[band] & several[sensor])

    def _paths(self) -> Iterator[pa.StringArray]:
        """Yield the paths in parts."""
        start = 0
        for part in self._columns.batches('path'):
            texts = as_text(part, 'path', self._source).cast(pa.string())
            bad = pc.or_(
                pc.fill_null(pc.equal(pc.binary_length(texts), 0), True),
                pc.fill_null(pc.match_substring(texts, '\0'), True),
            )
            if pc.any(bad).as_py():
                row = start + first_row(bad.to_numpy())
                raise row_error(self._source, row, 'has no path, or a path with a NUL character')
            yield from texts.chunks
            start += len(texts)

    def _scene(self, parts: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32] | None:
        """Return the scene of rows without a place: by default, the folder of the file."""
        if 'scene' in self._columns.names:
            return self._codes('scene').codes
        if not parts.any():
            return None
        texts = as_text(self._columns.column('path'), 'path', self._source).cast(pa.string())
        folders = pc.replace_substring_regex(texts, '[^/]*$', '/')
        codes = text_codes(folders, 'path', self._source).codes
        codes[~parts] = -1
        return codes

    def _codes(self, name: str) -> Coded:
        """Read a column of texts; all are missing if there is no such column."""
        if name not in self._columns.names:
            return Coded(np.full(self._columns.rows, -1, np.int32), pa.array([], pa.string()))
        return text_codes(self._columns.column(name), name, self._source)

    def _few(self, name: str) -> tuple[tuple[str, ...], npt.NDArray[np.int8]]:
        """Read a column with few distinct texts."""
        codes, values = self._codes(name)
        if len(values) > _MOST_CODES:
            raise TableError(
                f"{self._source}: column '{name}' has {len(values):,} different values, but at "
                f'most {_MOST_CODES} are possible'
            )
        return tuple(values.to_pylist()), codes.astype(np.int8)

    def _optional(self, name: str) -> npt.NDArray[np.float64] | None:
        """Read a column of numbers; None if there is no such column."""
        if name not in self._columns.names:
            return None
        return numbers(self._columns.column(name), name, self._source)

    def _numbers(
        self, name: str, is_good: Callable[[Any], Any], expected: str
    ) -> npt.NDArray[np.float64] | None:
        """Read a column of finite numbers that meet a condition."""
        values = self._optional(name)
        if values is not None:
            bad = np.isinf(values) | (~np.isnan(values) & ~np.asarray(is_good(values)))
            refuse_rows(self._source, bad, f'{name} {{:g}} is not {expected}', values)
        return values

    def _cloud_cover(self) -> npt.NDArray[np.float32] | None:
        """Read the cloud-covered fraction."""
        values = self._optional('cloud_cover')
        if values is None:
            return None
        wrong = 'cloud_cover {:g} is not a fraction from 0 to 1; divide percentages by 100'
        refuse_rows(self._source, (values < 0) | (values > 1), wrong, values)
        return values.astype(np.float32)

    def _whole(self, name: str, lowest: int, highest: int, dtype: type[Any]) -> npt.NDArray[Any]:
        """Read a column of integers; -1 where missing."""
        if name not in self._columns.names:
            return np.full(self._columns.rows, -1, dtype)
        column = self._columns.column(name)
        return integers(column, name, self._source, lowest, highest).astype(dtype)

    def _grids(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64], Any]:
        """Read EPSG codes, transforms, and heights and widths."""
        rows = self._columns.rows
        epsg = np.full(rows, -1, np.int32)
        if 'crs' in self._columns.names:
            codes, values = parse_values(
                self._columns.column('crs'),
                'crs',
                self._source,
                _epsg,
                'a CRS with an EPSG code, e.g. EPSG:32631',
            )
            epsg = np.array([*values, -1], np.int32)[codes]
        transform = np.full((rows, 6), np.nan)
        if 'transform' in self._columns.names:
            transform = self._transform()
        shape = [self._whole(name, 0, 2**31 - 1, np.int32) for name in ('height', 'width')]
        shape = [np.maximum(size, 0) for size in shape]
        bad = (epsg >= 0) & (shape[0] > 0) & ~np.isfinite(transform).all(axis=1)
        wrong = 'has a crs and a height but no transform; remove these columns to scan the file'
        refuse_rows(self._source, bad, wrong)
        return epsg, transform, shape

    def _transform(self) -> npt.NDArray[np.float64]:
        """Read the affine coefficients of each row."""
        if not self._columns.rows:
            return np.empty((0, 6))
        kind = next(iter(self._columns.batches('transform'))).type
        if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)):
            codes, values = parse_values(
                self._columns.column('transform'),
                'transform',
                self._source,
                _coefficients,
                'six numbers, e.g. 10 0 5e5 0 -10 4e6',
            )
            return np.array([*values, [math.nan] * 6], np.float64)[codes]
        if not pa.types.is_floating(kind.value_type) and not pa.types.is_integer(kind.value_type):
            raise TableError(f"{self._source}: column 'transform' has the type {kind}, not numbers")
        # Read in parts, as ten million rows take half a gigabyte.
        found = np.full((self._columns.rows, 6), np.nan)
        start = 0
        for part in self._columns.batches('transform'):
            for chunk in part.chunks:
                known = chunk.is_valid()
                lengths = pc.fill_null(pc.list_value_length(chunk), 6).to_numpy()
                if (lengths != 6).any():
                    raise TableError(
                        f"{self._source}: column 'transform' must have six numbers per row"
                    )
                flat = chunk.filter(known).flatten().cast(pa.float64())
                rows = np.flatnonzero(known.to_numpy(zero_copy_only=False)) + start
                found[rows] = flat.to_numpy(zero_copy_only=False).reshape(-1, 6)
                start += len(chunk)
        return found

    def _bounds(
        self, epsg: npt.NDArray[np.int32], transform: npt.NDArray[np.float64], shape: Any
    ) -> npt.NDArray[np.float64]:
        """Read west, south, east and north."""
        names = ('west', 'south', 'east', 'north')
        if not set(names) & set(self._columns.names):
            points = corners(epsg, transform, np.stack(shape, axis=1))
            points[shape[0] == 0] = np.nan
            return _extents(points)
        bounds = np.full((self._columns.rows, 4), np.nan)
        for i, name in enumerate(names):
            if name not in self._columns.names:
                raise TableError(f"{self._source}: other bounds need the column '{name}'")
            bounds[:, i] = numbers(self._columns.column(name), name, self._source)
        west, south, east, north = bounds.T
        missing = np.isnan(bounds)
        with np.errstate(invalid='ignore'):
            good = (south <= north) & (west <= east) & (np.abs(bounds) <= 540).all(axis=1)
        bad = ~missing.all(axis=1) & ~good
        if bad.any():
            raise row_error(
                self._source,
                first_row(bad),
                'west, south, east and north must be degrees with west <= east (beyond 180 across '
                'the antimeridian) and south <= north',
            )
        return bounds


def _extents(points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Compute the bounds of files, NaN where corners are unknown."""
    bounds = np.full((len(points), 4), np.nan)
    known = np.isfinite(points).all(axis=(1, 2))
    if known.any():
        bounds[known] = extents(points[known], SEARCH_CRS)
    return bounds


def _epsg(text: str) -> int:
    try:
        code = CRS.from_user_input(int(text) if text.isdigit() else text).to_epsg()
    except (CRSError, OverflowError) as error:
        raise ValueError(text) from error
    if code is None:
        raise ValueError(text)
    return int(code)


def _coefficients(text: str) -> list[float]:
    values = [float(part) for part in text.replace(',', ' ').split()]
    if len(values) != 6:
        raise ValueError(text)
    return values
