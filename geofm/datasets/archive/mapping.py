"""Memory-map the arrays of large archives, which are shared by all processes of a machine.

The arrays are created once, in a folder next to the table. The name of the folder contains a hash
of the path, size and modification time of the table.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from geofm.datasets.archive.archive_table import Archive, ArchiveTable
from geofm.datasets.archive.building import Selection
from geofm.datasets.archive.left_out import LeftOut
from geofm.datasets.memory.mapped import Values, mapped
from geofm.datasets.memory.shared_array import SharedArray
from geofm.datasets.table import Observations, RasterTable
from geofm.datasets.table.fields import PARQUET
from geofm.datasets.table.scanning import open_table
from geofm.sensors import SENSORS

#: Tables with fewer rows are read by each process, which takes less than a second and 200 MB.
LEAST_ROWS = 1_000_000

# Must be changed whenever existing folders can no longer be used.
_FORMAT = 1


def open_archive(table: Archive | RasterTable | str) -> Archive:
    """Open a table and group its rows.

    Args:
        table: The table, or its file. The arrays of a large GeoParquet file are mapped from a
            folder next to it, which is created if necessary. An archive is returned as it is.

    Returns:
        The archive.

    Raises:
        FileNotFoundError: If there is no such table.
        TableError: If the table is invalid, or a file that has not been scanned yet is missing.
    """
    if isinstance(table, Archive):
        return table
    folder = None if isinstance(table, RasterTable) else _folder(Path(table))
    if folder is None:
        return Archive.of(open_table(table))

    def make() -> Values:
        _remove_earlier(folder)
        archive = Archive.of(open_table(table))
        return {
            'table': _fields(archive.table),
            'observations': _fields(archive.observations),
            'main': archive.main.array,
        }

    values = mapped(folder, make)
    return Archive(
        RasterTable(**values['table']),
        Observations(**values['observations']),
        SharedArray(values['main']),
        folder,
    )


def find_samples(
    archive: Archive,
    selection: Selection,
    of: tuple[Any, ...],
    find: Callable[[], tuple[ArchiveTable, LeftOut]],
) -> tuple[ArchiveTable, LeftOut]:
    """Find the samples of an archive, once for all processes if the archive is mapped.

    Args:
        archive: The archive.
        selection: Definition of the samples.
        of: Further values that the samples depend on.
        find: Function that finds the samples and what is left out.

    Returns:
        The result of *find*.
    """
    if archive.folder is None:
        return find()
    sensors = [SENSORS[key] for key in selection.sensors]
    folder = archive.folder / f'samples-{_digest(selection, sensors, *of)}'

    def make() -> Values:
        samples, left_out = find()
        return {
            'samples': samples.arrays,
            'n_places': samples.count_places(),
            'left_out': dataclasses.asdict(left_out),
        }

    values = mapped(folder, make)
    observations, offsets, overlap = values['samples']
    samples = ArchiveTable(
        archive,
        selection.sensors,
        selection.reference,
        observations,
        offsets,
        overlap,
        selection.window_size,
    )
    samples.n_places = values['n_places']
    return samples, LeftOut(**values['left_out'])


def _folder(table: Path) -> Path | None:
    """Return the folder of the arrays of a table; None if it is small or not Parquet."""
    try:
        if table.suffix.lower() not in PARQUET or pq.read_metadata(table).num_rows < LEAST_ROWS:
            return None
    except (OSError, pa.ArrowException):
        # Reading the table will raise a clear error.
        return None
    state = table.stat()
    digest = _digest(_FORMAT, table.resolve(), state.st_size, state.st_mtime_ns)
    return table.with_name(f'{table.name}.arrays-{digest}')


def _remove_earlier(folder: Path) -> None:
    """Remove the arrays of earlier versions of the table. Mapped files stay readable."""
    for other in folder.parent.glob(f'{folder.name.rpartition("-")[0]}-*'):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


def _fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass without copying."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _digest(*of: Any) -> str:
    """Return a short hash of values."""
    return hashlib.sha256(repr(of).encode()).hexdigest()[:12]
