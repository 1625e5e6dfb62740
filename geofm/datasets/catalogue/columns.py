"""The catalogue's table in memory, and as GeoParquet stores it."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import shapely

from geofm.datasets.footprints import SEARCH_CRS, corners, extents, shapes_on_ground
from geofm.lonlat import bounding_box

#: Affine coefficients, one column each while in memory.
AFFINE = ['a', 'b', 'c', 'd', 'e', 'f']

#: Version of the format.
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

#: Columns that are stored, but for the geometry, which the others tell.
STORED = list(_FACTS.names)

#: Columns whose values are few, and may be read as such.
NAMES = ['sensor', 'season', 'names', 'problem']

#: Columns in memory, in order, with their types; -1 and NaN where nothing is known.
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
    """A table without rows.

    Returns:
        The table.
    """
    return pd.DataFrame({name: pd.Series([], dtype=kind) for name, kind in COLUMNS.items()})


def facts_to_arrow(table: pd.DataFrame) -> pa.Table:
    """Table with all columns that are stored but the geometry.

    Args:
        table: As it is in memory.

    Returns:
        Columns of Arrow.
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
    """Table as GeoParquet stores it, https://geoparquet.org/releases/v1.0.0/.

    Args:
        table: As it is in memory.
        state: What else is to be kept, as JSON has it.

    Returns:
        The table with its metadata.
    """
    shape = table[['height', 'width']].to_numpy()
    # None for rows without CRS and for those whose corners lie nowhere.
    points = corners(table['epsg'].to_numpy(), table[AFFINE].to_numpy(), shape)
    # Cut at 180 degrees, which GeoParquet's readers expect.
    shapes = shapes_on_ground(points, SEARCH_CRS)
    known = shapely.is_geometry(shapes)
    box = bounding_box(extents(points[known], SEARCH_CRS)) if known.any() else None
    geometry = {
        'encoding': 'WKB',
        'geometry_types': geometry_types(shapes[known]),
        'crs': SEARCH_CRS.to_json_dict(),
        **({} if box is None else {'bbox': list(box)}),
    }
    geo = {'version': '1.0.0', 'primary_column': 'geometry', 'columns': {'geometry': geometry}}
    stored = facts_to_arrow(table).append_column(
        'geometry', pa.array(shapely.to_wkb(shapes), pa.binary())
    )
    content = {'version': VERSION, **state}
    return stored.replace_schema_metadata({'geo': json.dumps(geo), 'geofm': json.dumps(content)})


def check_schema(schema: pa.Schema) -> None:
    """Check that a file has all columns that are stored, with their types.

    Args:
        schema: Schema of the file.

    Raises:
        ValueError: If it does not.
    """
    types = dict(zip(schema.names, schema.types, strict=True))
    if missing := [field.name for field in _FACTS if field.name not in types]:
        raise ValueError(f'it has no {missing}')
    for field in _FACTS:
        if types[field.name] != field.type:
            raise ValueError(f"'{field.name}' is {types[field.name]}, not {field.type}")


def geometry_types(shapes: npt.NDArray[np.object_]) -> list[str]:
    """Types of geometries, as GeoParquet lists them.

    Args:
        shapes: Geometries.

    Returns:
        Their names, each once; those of outlines if there is none.
    """
    return sorted({shape.geom_type for shape in shapes}) or ['Polygon']


def from_arrow(stored: pa.Table) -> pd.DataFrame:
    """Table as it is in memory.

    Args:
        stored: The columns :data:`STORED`.

    Returns:
        A column for each of :data:`COLUMNS`.
    """
    columns: dict[str, Any] = {}
    for name in stored.column_names:
        column = stored.column(name)
        if name == 'transform':
            values = column.combine_chunks()
            # Not flatten(), which leaves out those that are missing.
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
