"""Make a table of the files below a folder by the rules of a layout."""

import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from geofm.datasets.catalogue.scan import folders_below
from geofm.datasets.readers.hdf5 import dates_of, variables_of
from geofm.datasets.readers.safe import is_product, read_product
from geofm.datasets.table.columns import NO_TIME
from geofm.datasets.table.error import TableError
from geofm.datasets.table.fields import REQUIRED, fields_of
from geofm.datasets.table.files import MemoryColumns
from geofm.datasets.table.layout import Files, Layout, Row, UnknownBandError
from geofm.datasets.table.raster_table import RasterTable
from geofm.printing import counted
from geofm.sensors import SENSORS

#: Suffixes of folders that are products or stores, which layouts treat as files.
WHOLE_FOLDERS = ('.safe', '.zarr')

_SCHEMA = pa.schema(
    [
        ('path', pa.string()),
        ('sensor', pa.string()),
        ('datetime', pa.timestamp('us')),
        ('place', pa.string()),
        ('scene', pa.string()),
        ('band', pa.string()),
        ('index', pa.int32()),
        ('scale', pa.float64()),
        ('offset', pa.float64()),
        ('unit', pa.string()),
        ('nodata', pa.float64()),
        ('cloud_cover', pa.float64()),
        ('split', pa.string()),
    ]
)


class Indexed(NamedTuple):
    """Table of a folder, and what was left out.

    Attributes:
        table: The table, which is not scanned.
        unmatched: Number of files that match no rule of the layout.
        example: One of them.
        unknown_bands: Number of files with a band that the sensor does not have.
        band_example: Message about one of them.
    """

    table: RasterTable
    unmatched: int
    example: str
    unknown_bands: int
    band_example: str


def index_folder(root: str | Path, layout: Layout) -> Indexed:
    """Make a table of the files below a folder.

    Hidden files and folders are left out.

    Args:
        root: The folder.
        layout: Layout of the files.

    Returns:
        The table, sorted by path, and the counts of files left out.

    Raises:
        TableError: If the folder does not exist, or no file matches.
        LayoutError: If a date does not match the format of the layout.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise TableError(f'{folder}: no such folder')
    values: list[dict[str, Any]] = []
    unmatched, example, unknown, band_example = 0, '', 0, ''
    for path, name in sorted(_paths(folder)):
        try:
            rows = list(layout.rows(path))
        except UnknownBandError as error:
            unknown, band_example = unknown + 1, band_example or str(error)
            continue
        if not rows and not path.lower().endswith('.zip'):
            unmatched, example = unmatched + 1, example or path
        for kind, row in rows:
            values += _expand(str(folder / path), name, kind, row)
    if not values:
        # An example helps to correct a regular expression.
        looked = f'{counted(unmatched, "file")}, e.g. {example}' if unmatched else 'no files'
        raise TableError(f'{folder}: no file matches {layout.source} ({looked})')
    return Indexed(
        make_table(values, layout.source, folder), unmatched, example, unknown, band_example
    )


def make_table(rows: Sequence[Mapping[str, Any]], source: str, root: Path) -> RasterTable:
    """Make a table from rows.

    Args:
        rows: Values by column. Missing columns of a row are empty.
        source: Source of the rows, for messages.
        root: Folder that relative paths start from.

    Returns:
        The table, which is not scanned, without columns that are empty in all rows.

    Raises:
        TableError: If a row is invalid.
    """
    columns = {name: [row.get(name) for row in rows] for name in _SCHEMA.names}
    table = pa.table(columns, schema=_SCHEMA)
    used = [
        name
        for name in _SCHEMA.names
        if name in REQUIRED or table.column(name).null_count < len(rows)
    ]
    folder = os.path.abspath(root)  # noqa: PTH100 - links stay
    return RasterTable(**fields_of(MemoryColumns(table.select(used)), source, folder))


def _paths(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield each file below a folder, also inside zip files, with its path as written to the table.

    Folders and zip files that are products or stores are treated as files.
    """
    for below, _, entries in folders_below(folder, WHOLE_FOLDERS):
        prefix = f'{below}/' if below else ''
        for entry in entries or ():
            if entry.name.startswith('.'):
                continue
            path = prefix + entry.name
            yield path, path
            if entry.name.lower().endswith('.zip'):
                for name in _members(folder / path):
                    yield f'{path}/{name}', f'/vsizip/{path}/{name}'


def _members(path: Path) -> list[str]:
    """List the files in a zip file; none for products, stores and damaged files."""
    if path.name.lower().endswith('.zarr.zip'):
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except (OSError, zipfile.BadZipFile):
        return []
    return [] if any(name.lower().partition('/')[0].endswith('.safe') for name in names) else names


def _expand(file: str, path: str, kind: Files, row: Row) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table for a parsed file name."""
    values = {
        'path': path,
        'sensor': row.sensor,
        'datetime': row.date,
        'place': row.place,
        'scene': row.scene,
        'band': row.band,
        'index': None,
        'scale': kind.scale,
        'offset': kind.offset,
        'unit': kind.unit,
        'nodata': kind.nodata,
        'split': row.split,
    }
    try:
        if is_product(path):
            parts = _product_rows(file, path, kind, values)
        else:
            parts = [values] if kind.time is None else _dated_rows(file, path, kind.time, values)
    except (OSError, ValueError):
        # The scan will report the problem.
        parts = [values]
    yield from parts


def _dated_rows(file: str, path: str, time: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Make a row for each date and variable of a netCDF file."""
    sensor = SENSORS[values['sensor']]
    wanted = (values['band'] or '').split()
    bands = [(name, sensor.find_band(name)) for name in variables_of(file)]
    return [
        {
            **values,
            'path': f'NETCDF:"{path}":{name}',
            'band': band,
            'index': number,
            'datetime': None if when == NO_TIME else when,
            # The bands of one date belong to one scene, also without a place.
            'scene': values['scene'] or path.rpartition('/')[0] or '.',
        }
        for name, band in bands
        if band is not None and (not wanted or band in wanted)
        for number, when in enumerate(dates_of(file, time), 1)
    ]


def _product_rows(
    file: str, path: str, kind: Files, values: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Make a row for each band of a product."""
    product = read_product(file, SENSORS[values['sensor']])
    prefix = path if Path(file).is_dir() else f'/vsizip/{path}'
    return [
        {
            **values,
            'path': f'{prefix}/{part.path}',
            'band': part.band,
            'datetime': values['datetime'] or product.time,
            'scene': values['scene'] or product.name,
            # Values of the layout take precedence over the metadata.
            'scale': product.scale if kind.scale is None and product.scale != 1 else kind.scale,
            'offset': part.offset if kind.offset is None else kind.offset,
        }
        for part in product.bands
    ]
