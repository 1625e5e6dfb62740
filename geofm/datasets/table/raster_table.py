"""The table of rasters as arrays: which file, of which sensor, from when and where."""

import dataclasses
import json
import os
from collections.abc import Mapping
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
from geofm.datasets.footprints import SEARCH_CRS, corners, shapes_on_ground
from geofm.datasets.memory.path_list import PathList
from geofm.datasets.memory.shared_array import SharedArray
from geofm.datasets.table.address import relative, resolve
from geofm.datasets.table.columns import NO_TIME
from geofm.datasets.table.error import TableError
from geofm.datasets.table.fields import OPTIONAL, PARQUET, REQUIRED, read_fields
from geofm.grid import Grid
from geofm.lonlat import bounding_box
from geofm.printing import printable
from geofm.sensors import SENSORS, Sensor

__all__ = ['NO_TIME', 'RasterTable']

#: Rows of a group of Parquet.
_GROUP = 1 << 18

type Ints = npt.NDArray[np.integer[Any]]
type Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class RasterTable:
    """Rasters of any sensors, one row per file or per band of a file.

    All arrays have one entry per row. Processes that read share them.

    Attributes:
        source: File of the table, for messages.
        root: Folder that relative paths start from.
        paths: Path or address of each file, as of :mod:`geofm.datasets.table.address`.
        sensors: Keys of the sensors.
        sensor: Index into *sensors*, int8.
        places: Names of the places.
        place: Index into *places*, int32; -1 where the row names no place.
        time: Microseconds since 1970-01-01 UTC, int64; :data:`NO_TIME` where there is none.
        band_lists: Lists of channel names, e.g. ``('B02', 'B03')``. '-' is a band of the file that
            is not used.
        band: Index into *band_lists*, int16: the bands of the file, in its order. -1: the file
            says which they are, or has all bands of the sensor in their order.
        index: Number of the band in the file, from 1, int16; -1: all of them.
        scene: Which rows without a place are of one scene, int32; -1: the row is a scene of its
            own. None if all rows are that, or have a place.
        scale: Factor for the numbers of the file, float64; NaN: as the file says. None if the
            table has no such column; so for the next ones.
        offset: What is added after scaling, float64.
        nodata: Number that means "no data", float64; NaN: as the file says.
        units: Units.
        unit: Index into *units*, int8: unit of numbers * scale + offset; -1: as the file says, or
            the sensor's.
        cloud_cover: Fraction of clouds, 0 to 1, float32; NaN where unknown.
        splits: Names of the splits.
        split: Index into *splits*, int8.
        epsg: EPSG code of the CRS, int32; -1: none, or not scanned.
        transform: Affine coefficients a to f, float64 (N, 6); NaN where there is none.
        height: Rows, int32; 0: not scanned.
        width: Columns, int32; 0: not scanned.
        bounds: West, south, east and north in degrees, float64 (N, 4); NaN where there are none.
            East is beyond 180 for a raster across the antimeridian.
        problems: What can be wrong with files.
        problem: Index into *problems*, int8; -1: nothing.
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
            TableError: If it is no table of rasters; one line that names the row and what to do.
        """
        return cls(**read_fields(Path(path)))

    def write(self, path: str | Path) -> None:
        """Write the table: all of it, or nothing if that fails.

        Args:
            path: A file whose name ends in ``.parquet``, ``.geoparquet`` or ``.csv``. Paths of
                files in its folder or below are written relative to it.

        Raises:
            TableError: If the name has another ending.
        """
        _write(self, Path(path))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.paths)

    def __getstate__(self) -> dict[str, Any]:
        """State for a worker process, with arrays in shared memory."""
        return {
            name: self._shared(name, value) if isinstance(value, np.ndarray) else value
            for name, value in list(vars(self).items())
            if name != '_memory'
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(
            {k: v.array if isinstance(v, SharedArray) else v for k, v in state.items()}
        )

    def _shared(self, name: str, array: npt.NDArray[Any]) -> SharedArray:
        """The same memory for each worker."""
        memory: dict[str, SharedArray] = vars(self).setdefault('_memory', {})
        return memory.setdefault(name, SharedArray(array))

    def path(self, row: int) -> str:
        """Path or address of a file.

        Args:
            row: Index of the row.

        Returns:
            The absolute path, or an address.
        """
        return resolve(self.paths[row], self.root)

    def sensor_of(self, row: int) -> Sensor:
        """Sensor of a file.

        Args:
            row: Index of the row.

        Returns:
            The sensor.
        """
        return SENSORS[self.sensors[self.sensor[row]]]

    def bands_of(self, row: int) -> tuple[str, ...] | None:
        """Bands of a file as the table has them.

        Args:
            row: Index of the row.

        Returns:
            Names of channels, '-' for those that are not used; None if the table says nothing.
        """
        return None if self.band[row] < 0 else self.band_lists[self.band[row]]

    def grid(self, row: int) -> Grid | None:
        """Grid of a file.

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
        """Whether size and problems of all files are known."""
        return bool(((self.height > 0) | (self.problem >= 0)).all())

    def take(self, rows: Ints) -> Self:
        """Some rows of the table.

        Args:
            rows: Their indices, in the order to have them in.

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
        TableError: If the name has another ending.
    """
    kind = path.suffix.lower()
    if kind not in (*PARQUET, '.csv'):
        raise TableError(f'{printable(path)}: a table ends in .csv, .parquet or .geoparquet')
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
    """A group of rows as GeoParquet stores them."""
    rows = np.arange(start, min(start + _GROUP, len(table)))
    shapes = _shapes(table, rows)
    return _to_arrow(table, folder, rows).append_column(
        'geometry', pa.array(shapely.to_wkb(shapes), pa.binary())
    )


def _shapes(table: RasterTable, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.object_]:
    """Footprints in longitude and latitude; the bounds where the grid is not known."""
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
    """What GeoParquet says of the geometry, https://geoparquet.org/releases/v1.0.0/."""
    known = np.isfinite(table.bounds).all(axis=1)
    box = bounding_box(table.bounds[known]) if known.any() else None
    crossing = bool(known.any() and (table.bounds[known, 2] > 180).any())
    geometry = {
        'encoding': 'WKB',
        'geometry_types': ['MultiPolygon', 'Polygon'] if crossing else ['Polygon'],
        'crs': SEARCH_CRS.to_json_dict(),
        **({} if box is None else {'bbox': list(box)}),
    }
    geo = {'version': '1.0.0', 'primary_column': 'geometry', 'columns': {'geometry': geometry}}
    return {'geo': json.dumps(geo)}


def _to_arrow(
    table: RasterTable, folder: str, rows: npt.NDArray[np.integer[Any]] | None = None
) -> pa.Table:
    """Rows as Arrow has them, without the geometry."""
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
    """A column of few distinct texts."""
    indices = pa.array(codes.astype(np.int32), mask=codes < 0)
    return pa.DictionaryArray.from_arrays(indices, pa.array(list(values), pa.string()))


def _as_csv(table: pa.Table) -> pa.Table:
    """The columns that say something, as CSV can hold them."""
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
