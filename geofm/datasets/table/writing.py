"""Writing a table of rasters as CSV or GeoParquet."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import shapely

from geofm.atomic import atomic_file
from geofm.datasets.catalogue.footprints import SEARCH_CRS, corners, shapes_on_ground
from geofm.datasets.table.address import relative
from geofm.datasets.table.columns import NO_TIME
from geofm.datasets.table.error import TableError
from geofm.datasets.table.fields import OPTIONAL, PARQUET, REQUIRED
from geofm.lonlat import bounding_box
from geofm.printing import printable

if TYPE_CHECKING:
    from geofm.datasets.table.raster_table import RasterTable

#: Rows of a group of Parquet.
_GROUP = 1 << 18


def write_table(table: 'RasterTable', path: Path) -> None:
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


def _with_geometry(table: 'RasterTable', folder: str, start: int) -> pa.Table:
    """A group of rows as GeoParquet stores them."""
    rows = np.arange(start, min(start + _GROUP, len(table)))
    shapes = _shapes(table, rows)
    return _to_arrow(table, folder, rows).append_column(
        'geometry', pa.array(shapely.to_wkb(shapes), pa.binary())
    )


def _shapes(table: 'RasterTable', rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.object_]:
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


def _geo_metadata(table: 'RasterTable') -> dict[str, str]:
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
    table: 'RasterTable', folder: str, rows: npt.NDArray[np.integer[Any]] | None = None
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
