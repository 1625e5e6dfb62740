"""Columns of the catalogue in memory and in its GeoParquet file."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import shapely

from geofm.datasets.footprints import (
    SEARCH_CRS,
    corners,
    extents,
    geoparquet_metadata,
    shapes_on_ground,
)
from geofm.lonlat import bounding_box

#: Columns of the affine coefficients in memory.
AFFINE = ['a', 'b', 'c', 'd', 'e', 'f']

#: Version of the file format.
VERSION = 2

_FACTS = pa.schema(
    [
        ('path', pa.string()),
        ('size', pa.int64()),
        ('mtime', pa.int64()),
        ('sensor', pa.string()),
        ('season', pa.string()),
        ('roi', pa.int32()),
        ('patch', pa.int32()),
        ('time_step', pa.int32()),
        ('date', pa.date32()),
        ('epsg', pa.int32()),
        ('transform', pa.list_(pa.float64(), 6)),
        ('width', pa.int32()),
        ('height', pa.int32()),
        ('bands', pa.int32()),
        ('dtype', pa.string()),
        ('cloud_cover', pa.float32()),
        ('gaps', pa.bool_()),
        ('names', pa.string()),
        ('problem', pa.string()),
    ]
)

#: Stored columns, except the geometry, which is derived from the others.
STORED = list(_FACTS.names)

#: Columns with few distinct values, which can be read as dictionaries.
NAMES = ['sensor', 'season', 'names', 'problem']

#: Columns in memory, in order, with their types. Unknown values are -1 or NaN.
COLUMNS: dict[str, Any] = {
    'path': 'str',
    'size': np.int64,
    'mtime': np.int64,
    'sensor': 'str',
    'season': 'str',
    'roi': np.int32,
    'patch': np.int32,
    'time_step': np.int32,
    'date': 'datetime64[s]',
    'epsg': np.int32,
    **dict.fromkeys(AFFINE, np.float64),
    'width': np.int32,
    'height': np.int32,
    'bands': np.int32,
    'dtype': 'str',
    'cloud_cover': np.float32,
    'gaps': np.bool_,
    'names': 'str',
    'problem': 'str',
}

_INTEGERS = [name for name, kind in COLUMNS.items() if kind is np.int32]


def empty_table() -> pd.DataFrame:
    """Return a table without rows.

    Returns:
        The table.
    """
    return pd.DataFrame({name: pd.Series([], dtype=kind) for name, kind in COLUMNS.items()})


def facts_to_arrow(table: pd.DataFrame) -> pa.Table:
    """Convert a table to Arrow, without the geometry.

    Args:
        table: Table in memory.

    Returns:
        The Arrow table.
    """
    arrays = []
    for field in _FACTS:
        if field.name == 'transform':
            values = pa.array(table[AFFINE].to_numpy().ravel(), pa.float64())
            unknown = (table['epsg'] < 0).to_numpy()
            arrays.append(pa.FixedSizeListArray.from_arrays(values, 6, mask=pa.array(unknown)))
        elif field.name in _INTEGERS:
            column = table[field.name].to_numpy()
            arrays.append(pa.array(column, field.type, mask=column < 0))
        else:
            arrays.append(pa.array(table[field.name], field.type, from_pandas=True))
    return pa.table(arrays, schema=_FACTS)


def to_arrow(table: pd.DataFrame, state: Mapping[str, Any]) -> pa.Table:
    """Convert a table to Arrow as GeoParquet, https://geoparquet.org/releases/v1.0.0/.

    Args:
        table: Table in memory.
        state: Further metadata to store, as JSON values.

    Returns:
        The table with its metadata.
    """
    shape = table[['height', 'width']].to_numpy()
    # None for rows without a CRS and for rows whose corners have no position.
    points = corners(table['epsg'].to_numpy(), table[AFFINE].to_numpy(), shape)
    # Readers of GeoParquet expect outlines that are cut at 180 degrees.
    shapes = shapes_on_ground(points, SEARCH_CRS)
    known = shapely.is_geometry(shapes)
    box = bounding_box(extents(points[known], SEARCH_CRS)) if known.any() else None
    geo = geoparquet_metadata(geometry_types(shapes[known]), box)
    stored = facts_to_arrow(table).append_column(
        'geometry', pa.array(shapely.to_wkb(shapes), pa.binary())
    )
    content = {'version': VERSION, **state}
    return stored.replace_schema_metadata({'geo': geo, 'geofm': json.dumps(content)})


def check_schema(schema: pa.Schema) -> None:
    """Check that a file has all stored columns, with their types.

    Args:
        schema: Schema of the file.

    Raises:
        ValueError: If a column is missing or has another type.
    """
    types = dict(zip(schema.names, schema.types, strict=True))
    if missing := [field.name for field in _FACTS if field.name not in types]:
        raise ValueError(f'the columns {missing} are missing')
    for field in _FACTS:
        if types[field.name] != field.type:
            raise ValueError(f"'{field.name}' is {types[field.name]}, not {field.type}")


def geometry_types(shapes: npt.NDArray[np.object_]) -> list[str]:
    """List the types of geometries as GeoParquet does.

    Args:
        shapes: Geometries.

    Returns:
        Their names without duplicates; the type of outlines if there is no geometry.
    """
    return sorted({shape.geom_type for shape in shapes}) or ['Polygon']


def from_arrow(stored: pa.Table) -> pd.DataFrame:
    """Convert an Arrow table to a table in memory.

    Args:
        stored: The columns :data:`STORED`.

    Returns:
        Table with the columns :data:`COLUMNS`.
    """
    columns: dict[str, Any] = {}
    for name in stored.column_names:
        column = stored.column(name)
        if name == 'transform':
            values = column.combine_chunks()
            # flatten() would leave out missing values.
            flat = values.values.to_numpy(zero_copy_only=False).reshape(-1, 6)
            rows = np.where(values.is_null().to_numpy(zero_copy_only=False)[:, None], np.nan, flat)
            columns.update({axis: rows[:, i] for i, axis in enumerate(AFFINE)})
        elif name in _INTEGERS:
            columns[name] = column.fill_null(-1).to_numpy()
        elif name == 'date':
            columns[name] = column.cast(pa.timestamp('s')).to_numpy()
        elif COLUMNS[name] == 'str':
            columns[name] = pd.array(column.combine_chunks(), dtype='str')
        else:
            columns[name] = column.to_numpy()
    return pd.DataFrame({name: columns[name] for name in COLUMNS}, copy=False)
