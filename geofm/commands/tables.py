"""Indexing an archive in a table of rasters."""

from pathlib import Path

import numpy as np

from geofm.datasets import find_layout
from geofm.datasets.table import (
    NO_TIME,
    Indexed,
    Observations,
    RasterTable,
    check_places,
    count_problems,
    index_folder,
    index_stac,
    scan_table,
)
from geofm.printing import counted, say
from geofm.sensors import SENSORS


def index_table(root: Path, output: Path | None, layout: str | None, stac: bool, jobs: int) -> None:
    """Make the table of an archive, scan its files, and print a summary.

    Args:
        root: Folder of the archive; with *stac* a STAC item, collection, item collection or
            stac-geoparquet file; without *stac* and *layout* a table to scan.
        output: The table to write; by default beside *root*, with the suffix ``.parquet``.
        layout: File of a layout, or name of a built-in layout.
        stac: Whether *root* is STAC metadata.
        jobs: Number of threads that read files.

    Raises:
        ValueError: If there is nothing to index, no file can be used, or rows contradict each
            other.
    """
    if stac:
        table = _report(index_stac(root))
    elif layout is not None:
        table = _report(index_folder(root, find_layout(layout)))
    else:
        table = RasterTable.read(root)
    scan = scan_table(table, jobs, again=not stac and layout is None)
    for problem, rows, example in count_problems(scan.table):
        say(f'left out: {counted(rows, "row")}: {problem}, e.g. {example}')
        message = scan.messages.get(problem, '')
        if message and problem not in message:
            say(f'  {message}')
    for key, (files, example) in scan.unnamed.items():
        order = ' '.join(SENSORS[key].band_names)
        say(
            f'{key}: {counted(files, "file")} without names of bands, assumed to have {order}, in '
            f'this order, e.g. {example}'
        )
    if not (scan.table.problem < 0).any():
        raise ValueError(f'{root}: no usable file')
    check_places(scan.table)
    _summarise(scan.table, Observations.of(scan.table))
    file = output or root.with_suffix('.parquet')
    scan.table.write(file)
    say(f'{file}: {counted(len(scan.table), "row")}')


def _report(indexed: Indexed) -> RasterTable:
    """Print the files that were left out because of their names."""
    if indexed.unmatched:
        say(
            f'left out: {counted(indexed.unmatched, "file")} that no regex of the layout matches, '
            f'e.g. {indexed.example}'
        )
    if indexed.unknown_bands:
        files = counted(indexed.unknown_bands, 'file')
        say(f'left out: {files} of other bands, e.g. {indexed.band_example}')
    return indexed.table


def _summarise(table: RasterTable, observations: Observations) -> None:
    """Print the observations, places and dates of each sensor."""
    for number, key in enumerate(table.sensors):
        own = observations.sensor == number
        if not own.any():
            continue
        rows = counted(int(observations.count[own].sum()), 'row')
        times = observations.time[own & (observations.time != NO_TIME)]
        first, last = (_day(int(t)) for t in (times.min(), times.max())) if len(times) else ('', '')
        dates = f'{first} to {last}' if len(times) else 'no date'
        named = observations.place[own & (observations.place >= 0)]
        places = f', {counted(len(np.unique(named)), "place")}' if len(named) else ''
        say(f'{key}: {counted(int(own.sum()), "observation")} in {rows}{places}, {dates}')


def _day(time: int) -> str:
    """Return the date of a time."""
    return str(np.datetime64(time, 'us').astype('datetime64[D]'))
