"""Tables of rasters: making them, and taking scenes out of them."""

import re
from pathlib import Path

import numpy as np

from geofm.datasets.archive.scene_files import write_scene
from geofm.datasets.layouts import find_layout
from geofm.datasets.table.columns import NO_TIME
from geofm.datasets.table.indexing import Indexed, index_folder
from geofm.datasets.table.observations import Observations
from geofm.datasets.table.raster_table import RasterTable
from geofm.datasets.table.scanning import (
    JOBS,
    check_places,
    count_problems,
    open_table,
    scan_table,
)
from geofm.datasets.table.stac import index_stac
from geofm.printing import say
from geofm.sensors import SENSORS

#: Endings of files that are tables themselves.
TABLES = ('.csv', '.parquet', '.geoparquet')


def index_table(
    root: Path,
    output: Path | None = None,
    layout: str | None = None,
    stac: bool = False,
    jobs: int = JOBS,
) -> None:
    """Make the table of an archive, scan its files, and print what is in it.

    Args:
        root: Folder of the archive; with *stac* a STAC item, collection, item collection or
            stac-geoparquet file; else a table that is to be scanned.
        output: The table to write; by default beside *root*, with the ending ``.parquet``.
        layout: File of a layout, or name of one that is built in. None: *root* is a table.
        stac: Whether *root* is of STAC.
        jobs: Number of threads that read.

    Raises:
        ValueError: If there is nothing to index, no file can be used, or rows contradict each
            other.
    """
    if stac and layout is not None:
        raise ValueError('give --stac or --layout, not both')
    if stac:
        table = _report(index_stac(root))
    elif layout is not None:
        table = _report(index_folder(root, find_layout(layout)))
    else:
        table = RasterTable.read(root)
    scan = scan_table(table, jobs, again=not stac and layout is None)
    for problem, rows, example in count_problems(scan.table):
        say(f'left out: {rows} rows: {problem}, e.g. {example}')
        message = scan.messages.get(problem, '')
        if message and problem not in message:
            say(f'  {message}')
    for key, (files, example) in scan.unnamed.items():
        order = ' '.join(SENSORS[key].band_names)
        say(
            f'{key}: {files} files do not name their bands and are taken to have {order}, in this '
            f'order, e.g. {example}'
        )
    if not (scan.table.problem < 0).any():
        raise ValueError(f'{root}: no file of it can be used')
    check_places(scan.table)
    _summarise(scan.table, Observations.of(scan.table))
    file = output or root.with_suffix('.parquet')
    scan.table.write(file)
    say(f'{file}: {len(scan.table)} rows')


def _report(indexed: Indexed) -> RasterTable:
    """Say what was left out for its name."""
    if indexed.unmatched:
        say(
            f'left out: {indexed.unmatched} files match no regex of the layout, '
            f'e.g. {indexed.example}'
        )
    if indexed.unknown_bands:
        say(f'left out: {indexed.unknown_bands} files of other bands, e.g. {indexed.band_example}')
    return indexed.table


def _summarise(table: RasterTable, observations: Observations) -> None:
    """Say what each sensor has."""
    for number, key in enumerate(table.sensors):
        own = observations.sensor == number
        if not own.any():
            continue
        files = int(observations.count[own].sum())
        times = observations.time[own & (observations.time != NO_TIME)]
        first, last = (_day(int(t)) for t in (times.min(), times.max())) if len(times) else ('', '')
        dates = f'{first} to {last}' if len(times) else 'no date'
        named = observations.place[own & (observations.place >= 0)]
        places = f', {len(np.unique(named))} places' if len(named) else ''
        say(f'{key}: {int(own.sum())} observations in {files} rows{places}, {dates}')


def _day(time: int) -> str:
    """Day of a time."""
    return str(np.datetime64(time, 'us').astype('datetime64[D]'))


def scene(table: Path, place: str, output: Path | None = None, date: str | None = None) -> None:
    """Write the observations of a place as one GeoTIFF per sensor, for the map commands.

    Bands from separate files, netCDF files or product folders become one raster per sensor, all on
    the grid of the reference sensor.

    Args:
        table: Table of rasters, as `geofm index` writes it.
        place: Name of the place, from the column 'place' of the table.
        output: Folder to write; by default named like the place.
        date: Day as YYYY-MM-DD: the observation nearest to it is taken; the first by default.
    """
    # Names of places are not trusted as paths.
    folder = output or Path(re.sub(r'[^\w-]', '_', place))
    found = write_scene(open_table(table), place, folder, date)
    for key, file in found.files.items():
        say(f'{file}: {SENSORS[key].title}{f", {found.dates[key]}" if key in found.dates else ""}')
    options = ' '.join(f'--scene {key}={file}' for key, file in found.files.items())
    say(f'Map it: geofm map CHECKPOINT {options}')
