"""Table of rasters as arrays: the path, sensor, time and place of each file."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import shapely
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm.atomic import atomic_file
from geofm.datasets.footprints import SEARCH_CRS, corners, geoparquet_metadata, shapes_on_ground
from geofm.datasets.memory.path_list import PathList
from geofm.datasets.memory.shared_array import SharedFields
from geofm.datasets.table.address import relative, resolve
from geofm.datasets.table.columns import NO_TIME
from geofm.datasets.table.error import TableError
from geofm.datasets.table.fields import OPTIONAL, PARQUET, REQUIRED, read_fields
from geofm.grid import Grid
from geofm.lonlat import bounding_box
from geofm.printing import printable
from geofm.sensors import SENSORS, Sensor

__all__ = ['NO_TIME', 'RasterTable']

#: Number of rows per row group of Parquet.
_GROUP = 1 << 18

type Ints = npt.NDArray[np.integer[Any]]
type Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class RasterTable(SharedFields):
    """Table of rasters of any sensors, with one row per file or per band of a file.

    All arrays have one entry per row, and are shared with worker processes.

    Attributes:
        source: File of the table, for messages.
        root: Folder that paths are relative to.
        paths: Path or URL of each file, see :mod:`geofm.datasets.table.address`.
        sensors: Keys of the sensors.
        sensor: Index into *sensors*, int8.
        places: Names of the places.
        place: Index into *places*, int32; -1 where the row has no place.
        time: Microseconds since 1970-01-01 UTC, int64; :data:`NO_TIME` where missing.
        band_lists: Lists of channel names, e.g. ``('B02', 'B03')``. '-' stands for an unused band.
        band: Index into *band_lists* for the bands of the file in order, int16. -1: the file has
            band descriptions, or all bands of the sensor in order.
        index: Number of the band in the file, from 1, int16; -1 for all bands.
        scene: Number of the scene of rows without a place, int32; -1 if the row is a scene by
            itself. None if all rows have a place or are scenes by themselves.
        scale: Factor of the numbers in the file, float64; NaN for that of the file. None if the
            table has no such column, as for the following attributes.
        offset: Offset, added after scaling, float64.
        nodata: Nodata value, float64; NaN for that of the file.
        units: Names of the units.
        unit: Index into *units*, int8, for the unit of numbers * scale + offset; -1 for that of the
            file or else of the sensor.
        cloud_cover: Cloud-covered fraction, 0 to 1, float32; NaN where unknown.
        splits: Names of the splits.
        split: Index into *splits*, int8.
        epsg: EPSG code of the CRS, int32; -1 if there is none or the file is not scanned.
        transform: Affine coefficients a to f, float64 (N, 6); NaN where missing.
        height: Number of rows, int32; 0 if not scanned.
        width: Number of columns, int32; 0 if not scanned.
        bounds: West, south, east and north in degrees, float64 (N, 4); NaN where unknown. East
            exceeds 180 for a raster across the antimeridian.
        problems: Descriptions of problems.
        problem: Index into *problems*, int8; -1 for no problem.
    """

    source: str
    root: str
    paths: PathList
    sensors: tuple[str, ...]
    sensor: Ints
    places: PathList
    place: Ints
    time: npt.NDArray[np.int64]
    band_lists: tuple[tuple[str, ...], ...]
    band: Ints
    index: Ints
    scene: Ints | None
    scale: Floats | None
    offset: Floats | None
    nodata: Floats | None
    units: tuple[str, ...]
    unit: Ints | None
    cloud_cover: Floats | None
    splits: tuple[str, ...]
    split: Ints | None
    epsg: Ints
    transform: npt.NDArray[np.float64]
    height: Ints
    width: Ints
    bounds: npt.NDArray[np.float64]
    problems: tuple[str, ...]
    problem: Ints

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a table.

        Args:
            path: A GeoParquet (``.parquet``, ``.geoparquet``) or CSV file with the columns
                ``path``, ``sensor`` and ``datetime``, see :mod:`geofm.datasets.table.fields`.

        Returns:
            The table.

        Raises:
            FileNotFoundError: If there is no such file.
            TableError: If the file is not a table of rasters. The message is one line that names
                the row and says what to do.
        """
        return cls(**read_fields(Path(path)))

    def write(self, path: str | Path) -> None:
        """Write the table atomically.

        Args:
            path: A file whose name ends in ``.parquet``, ``.geoparquet`` or ``.csv``. Paths in its
                folder or below are written relative to it.

        Raises:
            TableError: If the name has another suffix.
        """
        _write(self, Path(path))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.paths)

    def path(self, row: int) -> str:
        """Return the path or URL of a file.

        Args:
            row: Index of the row.

        Returns:
            The absolute path, or the URL.
        """
        return resolve(self.paths[row], self.root)

    def sensor_of(self, row: int) -> Sensor:
        """Return the sensor of a file.

        Args:
            row: Index of the row.

        Returns:
            The sensor.
        """
        return SENSORS[self.sensors[self.sensor[row]]]

    def bands_of(self, row: int) -> tuple[str, ...] | None:
        """Return the bands of a file in the table.

        Args:
            row: Index of the row.

        Returns:
            Names of channels, with '-' for unused bands; None if the table does not list bands.
        """
        return None if self.band[row] < 0 else self.band_lists[self.band[row]]

    def grid(self, row: int) -> Grid | None:
        """Return the grid of a file.

        Args:
            row: Index of the row.

        Returns:
            Its grid; None if it is not georeferenced, or not scanned.
        """
        if self.epsg[row] < 0:
            return None
        transform = Affine(*self.transform[row].tolist())
        return Grid(
            CRS.from_epsg(int(self.epsg[row])),
            transform,
            int(self.height[row]),
            int(self.width[row]),
        )

    @property
    def is_scanned(self) -> bool:
        """Whether the size or a problem of every file is known."""
        return bool(((self.height > 0) | (self.problem >= 0)).all())

    def take(self, rows: Ints) -> Self:
        """Select rows of the table.

        Args:
            rows: Indices of the rows, in the requested order.

        Returns:
            A table of these rows.
        """
        rows = np.asarray(rows)
        arrays: dict[str, Any] = {
            field.name: value[rows]
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), np.ndarray)
        }
        return dataclasses.replace(self, **arrays, paths=PathList.of(self.paths.take(rows)))


def _write(table: RasterTable, path: Path) -> None:
    """Write a table.

    Args:
        table: The table.
        path: A CSV or GeoParquet file.

    Raises:
        TableError: If the name has another suffix.
    """
    kind = path.suffix.lower()
    if kind not in (*PARQUET, '.csv'):
        raise TableError(f'{printable(path)}: a table must end in .csv, .parquet or .geoparquet')
    folder = os.path.abspath(path.parent)  # noqa: PTH100 - links stay
    with atomic_file(path) as part:
        if kind == '.csv':
            pacsv.write_csv(_as_csv(_to_arrow(table, folder)), part)
            return
        groups = range(0, max(len(table), 1), _GROUP)
        first = _with_geometry(table, folder, 0)
        schema = first.schema.with_metadata(_geo_metadata(table))
        with pq.ParquetWriter(part, schema, compression='zstd') as writer:
            for start in groups:
                rows = first if start == 0 else _with_geometry(table, folder, start)
                writer.write_table(rows.cast(schema))


def _with_geometry(table: RasterTable, folder: str, start: int) -> pa.Table:
    """Make a group of rows for GeoParquet."""
    rows = np.arange(start, min(start + _GROUP, len(table)))
    shapes = _shapes(table, rows)
    return _to_arrow(table, folder, rows).append_column(
        'geometry', pa.array(shapely.to_wkb(shapes), pa.binary())
    )


def _shapes(table: RasterTable, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.object_]:
    """Return footprints in longitude and latitude, or bounds where the grid is unknown."""
    points = corners(
        table.epsg[rows],
        table.transform[rows],
        np.stack([table.height[rows], table.width[rows]], axis=1),
    )
    west, south, east, north = table.bounds[rows].T
    boxes = np.stack(
        [np.stack([west, east, east, west], 1), np.stack([south, south, north, north], 1)], axis=2
    )
    unknown = ~np.isfinite(points).all(axis=(1, 2))
    points[unknown] = boxes[unknown]
    return shapes_on_ground(points, SEARCH_CRS)


def _geo_metadata(table: RasterTable) -> dict[str, str]:
    """Return the metadata of GeoParquet, https://geoparquet.org/releases/v1.0.0/."""
    known = np.isfinite(table.bounds).all(axis=1)
    box = bounding_box(table.bounds[known]) if known.any() else None
    crossing = bool(known.any() and (table.bounds[known, 2] > 180).any())
    types = ['MultiPolygon', 'Polygon'] if crossing else ['Polygon']
    return {'geo': geoparquet_metadata(types, box)}


def _to_arrow(
    table: RasterTable, folder: str, rows: npt.NDArray[np.integer[Any]] | None = None
) -> pa.Table:
    """Convert rows to Arrow, without the geometry."""
    rows = np.arange(len(table)) if rows is None else rows
    paths = [relative(p, table.root, folder) for p in table.paths.take(rows)]
    codes = table.place[rows]
    used, inverse = np.unique(codes[codes >= 0], return_inverse=True)
    place = np.full(len(rows), -1)
    place[codes >= 0] = inverse
    short = [' '.join(n.rpartition('.')[2] for n in names) for names in table.band_lists]
    columns = {
        'path': pa.array(paths, pa.string()),
        'sensor': _coded(table.sensor[rows], table.sensors),
        'datetime': pa.array(
            table.time[rows], pa.timestamp('us', 'UTC'), mask=table.time[rows] == NO_TIME
        ),
        'place': _coded(place, table.places.take(used)),
        'band': _coded(table.band[rows], short),
        'index': pa.array(table.index[rows], mask=table.index[rows] < 0),
    }
    if table.scene is not None:
        scene = table.scene[rows]
        columns['scene'] = pa.array(scene, mask=scene < 0).cast(pa.string())
    for name in ('scale', 'offset', 'nodata', 'cloud_cover'):
        if (values := getattr(table, name)) is not None:
            columns[name] = pa.array(values[rows], mask=np.isnan(values[rows]))
    for name, few in (('unit', table.units), ('split', table.splits), ('problem', table.problems)):
        if (values := getattr(table, name)) is not None:
            columns[name] = _coded(values[rows], few)
    for name in ('height', 'width'):
        values = getattr(table, name)[rows]
        columns[name] = pa.array(values, mask=values == 0)
    epsg = table.epsg[rows]
    kinds, number = np.unique(epsg, return_inverse=True)
    texts = [f'EPSG:{code}' for code in np.maximum(kinds, 0).tolist()]
    columns['crs'] = _coded(np.where(epsg < 0, -1, number), texts)
    transform = table.transform[rows]
    columns['transform'] = pa.FixedSizeListArray.from_arrays(
        pa.array(transform.ravel()), 6, mask=pa.array(np.isnan(transform).any(axis=1))
    )
    for i, name in enumerate(('west', 'south', 'east', 'north')):
        values = table.bounds[rows, i]
        columns[name] = pa.array(values, mask=np.isnan(values))
    order = [*REQUIRED, *OPTIONAL]
    return pa.table({name: columns[name] for name in order if name in columns})


def _coded(codes: npt.NDArray[Any], values: Any) -> pa.Array:
    """Make a column with few distinct texts."""
    indices = pa.array(codes.astype(np.int32), mask=codes < 0)
    return pa.DictionaryArray.from_arrays(indices, pa.array(list(values), pa.string()))


def _as_csv(table: pa.Table) -> pa.Table:
    """Convert columns for CSV, without empty columns."""
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(pa.string())
        elif pa.types.is_fixed_size_list(column.type):
            texts = [None if v is None else ' '.join(map(repr, v)) for v in column.to_pylist()]
            column = pa.chunked_array([pa.array(texts, pa.string())])
        if name in REQUIRED or column.null_count < len(column):
            columns[name] = column
    return pa.table(columns)
