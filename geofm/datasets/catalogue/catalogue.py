"""The catalogue of the files below a folder: what they show, and what is wrong with them.

A catalogue is a GeoParquet file with one row per file. Reading it takes about a second, whereas
scanning a million files takes minutes. :func:`update_catalogue` creates and updates it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from rasterio.errors import RasterioError
from rich.progress import track

from geofm.atomic import atomic_file, temporary_file
from geofm.datasets.catalogue.clouds import cloud_cover
from geofm.datasets.catalogue.columns import (
    NAMES,
    STORED,
    VERSION,
    check_schema,
    empty_table,
    facts_to_arrow,
    from_arrow,
    to_arrow,
)
from geofm.datasets.catalogue.inspection import GAPS
from geofm.datasets.catalogue.scan import (
    changed,
    file_state,
    in_threads,
    listing_table,
    renew,
    scan_rows,
    walk,
)
from geofm.datasets.catalogue.scenes import Source
from geofm.locking import locked_name
from geofm.printing import one_line, warn
from geofm.sensors import SENTINEL2

#: File name of a catalogue in the folder of the data.
CATALOGUE_NAME = '.geofm-catalogue.parquet'

#: Folder in the user's cache for the catalogues of read-only data.
CACHE_FOLDER = 'geofm'

#: Default number of threads that read files. On a network file system most of the time is latency.
JOBS = 8

#: Number of files after which computed cloud covers are saved. A file takes about 0.1 s.
CLOUDS_AT_ONCE = 1000

#: Number of files from which a catalogue is used without checking every file, which would take a
#: second or more.
SMALL = 5000

#: Arguments for reading Parquet: a page with a wrong checksum is an error.
_CHECKED: dict[str, Any] = {'page_checksum_verification': True}

#: Number of rows per row group, and per batch when reading.
GROUP, AT_ONCE = 1 << 16, 1 << 14


class CatalogueError(ValueError):
    """A file is not a catalogue, or cannot be used as one."""


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Catalogue of the files below a folder.

    Attributes:
        root: The folder.
        file: Path of the catalogue.
        table: One row per file, sorted by path: ``path`` (below the root), ``size`` (bytes),
            ``mtime`` (ns), ``sensor``, ``season``, ``roi``, ``patch``, ``time_step``, ``date``,
            ``epsg``, affine coefficients ``a`` to ``f``, ``width``, ``height``, ``bands`` (their
            number), ``dtype``, ``cloud_cover`` (0 to 1), ``gaps`` (whether pixels without data were
            found), ``names`` (of the bands, separated by spaces; '' if the file has none),
            ``problem`` (a :class:`~geofm.datasets.catalogue.inspection.Problem`). Unknown integers
            are -1, other unknown values are missing.
        folders: Modification time of each folder (ns).
    """

    root: Path
    file: Path
    table: pd.DataFrame
    folders: dict[str, int]

    @classmethod
    def read(cls, file: Path, root: Path) -> Self:
        """Read a catalogue.

        Args:
            file: The catalogue.
            root: Folder of the files.

        Returns:
            The catalogue.

        Raises:
            CatalogueError: If the file is not a catalogue or is damaged.
        """
        state = read_state(file, root)
        with _naming_file(file, root), pq.ParquetFile(file, **_CHECKED) as stored:
            return cls(root, file, from_arrow(stored.read(STORED)), state.folders)

    def source(self) -> Source:
        """Return the rows as a source for :class:`~geofm.datasets.catalogue.Scenes`.

        Returns:
            The source.
        """
        facts = facts_to_arrow(self.table)
        return Source(str(self.root), lambda columns: iter(facts.select(columns).to_batches()))

    def problems(self) -> pd.DataFrame:
        """Summarise the problems of the files.

        Returns:
            One row per kind of problem, with the columns ``problem``, ``files`` (number of files)
            and ``first`` (path of the first one).
        """
        kinds = self.table['problem'].where(
            self.table['problem'].notna() | ~self.table['gaps'], GAPS
        )
        bad = self.table.assign(problem=kinds)[kinds.notna()]
        groups = bad.groupby('problem', sort=True)['path']
        return groups.agg(files='size', first='first').reset_index()

    def write(self) -> None:
        """Write the catalogue atomically."""
        state = {'folders': self.folders, 'root': str(self.root.resolve())}
        table = to_arrow(self.table, state)
        with atomic_file(self.file) as part:
            # Small row groups, so that a reader does not need the whole file in memory.
            pq.write_table(
                table, part, compression='zstd', row_group_size=GROUP, write_page_checksum=True
            )


class State(NamedTuple):
    """Metadata of a catalogue.

    Attributes:
        root: Folder of the files.
        folders: Modification time of each folder (ns).
        rows: Number of files.
    """

    root: Path
    folders: dict[str, int]
    rows: int

    @property
    def is_stale(self) -> bool:
        """Whether files were added or removed since; files changed in place are not noticed.

        Only the modification times of the folders are checked, which takes microseconds per folder.
        """
        return any(changed(self.root, name, mtime) for name, mtime in self.folders.items())


def read_state(file: Path, root: Path | None = None) -> State:
    """Read the metadata of a catalogue.

    Args:
        file: The catalogue.
        root: Folder of the files. Default: the folder that the catalogue was made from.

    Returns:
        The metadata.

    Raises:
        CatalogueError: If the file is not a catalogue or is damaged, or its folder does not exist.
    """
    with _naming_file(file, root):
        footer = pq.read_metadata(file)
        state = json.loads(footer.metadata[b'geofm'])
        version = int(state['version'])
        folders = {}
        if version == VERSION:
            check_schema(footer.schema.to_arrow_schema())
            folders = {str(name): int(mtime) for name, mtime in state['folders'].items()}
        folder = root or Path(state.get('root', file.parent))
        is_there = folder.is_dir()
    if version != VERSION:
        raise CatalogueError(
            f'{file}: has version {version} of the catalogue format, but this geofm reads version '
            f'{VERSION}; {_advice(root)}'
        )
    if not is_there:
        raise CatalogueError(
            f'{file}: is the catalogue of {folder}, which does not exist; give the folder as '
            f"'paths' and this file as 'catalogue'"
        )
    return State(folder, folders, footer.num_rows)


@contextmanager
def _naming_file(file: Path, root: Path | None) -> Iterator[None]:
    """Turn any error of reading a file into a CatalogueError that names the file."""
    try:
        yield
    except Exception as error:
        # Damaged files raise about a dozen types of error.
        raise CatalogueError(
            f'{file}: is not a catalogue, or is damaged ({one_line(error)}); {_advice(root)}'
        ) from error


def _advice(root: Path | None) -> str:
    return f"recreate it with 'geofm index {root or 'FOLDER'}'"


def open_catalogue(root: Path) -> Source:
    """Open the catalogue of a folder, and create it if there is none.

    A catalogue of fewer than :data:`SMALL` files is updated, which takes milliseconds. A larger one
    is used as it is, with a warning if it is stale.

    Args:
        root: The folder.

    Returns:
        The rows of its files.

    Raises:
        CatalogueError: If the file of that name is not a catalogue or is damaged.
    """
    file = find_catalogue(root)
    before = None
    if file is not None:
        if read_state(file, root).rows >= SMALL:
            return open_file(file, root)
        before = Catalogue.read(file, root)
    made = _updated(root, file or _writable(root), before, JOBS)
    if made is not before and made.table['sensor'].notna().any():
        if before is not None and made.table is not before.table:
            warn(f'{file}: was older than the data and has been updated')
        try:
            made.write()
        except OSError as err:
            warn(f'{root}: no catalogue can be saved, so all headers are read each time ({err})')
        else:
            if len(made.table) >= SMALL:
                # Takes less memory than the table.
                return open_file(made.file, root)
    return made.source()


def open_file(file: Path, root: Path | None = None) -> Source:
    """Open a catalogue as it is, with a warning if it is stale.

    Args:
        file: The catalogue.
        root: Folder of the files. Default: the folder that the catalogue was made from.

    Returns:
        The rows of its files.

    Raises:
        CatalogueError: If the file is not a catalogue or is damaged, or its folder does not exist.
    """
    state = read_state(file, root)
    if state.is_stale:
        warn(
            f'{file}: is older than the data: files were added or removed. It is used as it is; '
            f"update it with 'geofm index {state.root}'"
        )

    def batches(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with _naming_file(file, root):
            stored = pq.ParquetFile(
                file, memory_map=True, read_dictionary=NAMES, pre_buffer=False, **_CHECKED
            )
            yield from stored.iter_batches(AT_ONCE, columns=columns, use_threads=False)

    return Source(str(state.root), batches)


def scan_files(paths: Sequence[str]) -> Source:
    """Read the headers of files in any folders.

    Args:
        paths: The files.

    Returns:
        Their rows.
    """
    rows = [(path, *file_state(path)) for path in paths]
    facts = facts_to_arrow(scan_rows(Path(), listing_table(rows), JOBS))
    return Source('', lambda columns: iter(facts.select(columns).to_batches()))


def find_catalogue(root: Path) -> Path | None:
    """Find the catalogue of a folder.

    Args:
        root: The folder.

    Returns:
        Path of the catalogue in the folder, or else of that in the cache; None if there is neither.
    """
    return next((file for file in (beside(root), in_cache(root)) if file.is_file()), None)


def beside(root: Path) -> Path:
    """Return the path of a folder's catalogue in the folder itself.

    Args:
        root: The folder.

    Returns:
        Path of the catalogue.
    """
    return root / CATALOGUE_NAME


def in_cache(root: Path) -> Path:
    """Return the path of a folder's catalogue in the user's cache.

    Args:
        root: The folder.

    Returns:
        Path of the catalogue, in ``$XDG_CACHE_HOME/geofm`` or ``~/.cache/geofm``.
    """
    home = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    return Path(home) / CACHE_FOLDER / f'catalogue-{name}.parquet'


def update_catalogue(
    root: Path, output: Path | None = None, jobs: int = JOBS, clouds: bool = False
) -> Catalogue:
    """Create or update the catalogue of a folder.

    Only files that are new, or whose size or modification time differs, are read. Rows of deleted
    files are removed. A damaged catalogue is replaced. The new catalogue is written atomically.

    Args:
        root: The folder.
        output: Path of the catalogue. Default: in the folder, or in the user's cache if the folder
            is not writable.
        jobs: Number of threads.
        clouds: Whether to compute the cloud cover of S2 files for which it is not known yet.

    Returns:
        The catalogue.

    Raises:
        ValueError: If the folder does not exist, *jobs* is below 1, or s2cloudless is needed but
            not installed.
        LockedError: If another process is writing this catalogue.
    """
    if not root.is_dir():
        raise ValueError(f'{root}: no such folder')
    if jobs < 1:
        raise ValueError(f'jobs must be at least 1, not {jobs}')
    file = output or find_catalogue(root) or _writable(root)
    read_only = file.parent.exists() and not os.access(file.parent, os.W_OK)
    with nullcontext() if read_only else locked_name(file):
        before = None
        if file.is_file():
            with suppress(CatalogueError):
                before = Catalogue.read(file, root)
        catalogue = _updated(root, file, before, jobs)
        if catalogue is not before:
            catalogue.write()
        if clouds:
            _add_clouds(catalogue, jobs)
    return catalogue


def _updated(root: Path, file: Path, before: Catalogue | None, jobs: int) -> Catalogue:
    """Return the updated catalogue; the old one if nothing changed."""
    listing, folders = walk(root)
    table, is_new = renew(root, empty_table() if before is None else before.table, listing, jobs)
    if before is not None and not is_new and folders == before.folders:
        return before
    return Catalogue(root, file, table, folders)


def _writable(root: Path) -> Path:
    """Return a path at which a new catalogue of a folder can be written."""
    # The superuser may write to a folder whose permissions forbid it.
    if not root.stat().st_mode & 0o222:
        return in_cache(root)
    try:
        # Permissions do not reveal a file system that is mounted read-only.
        with temporary_file(beside(root)) as probe:
            probe.touch()
    except OSError:
        return in_cache(root)
    return beside(root)


def _add_clouds(catalogue: Catalogue, jobs: int) -> None:
    """Compute the cloud cover of S2 files without one, and save it at intervals."""
    table = catalogue.table
    todo = table.index[
        (table['sensor'] == SENTINEL2.name) & table['problem'].isna() & table['cloud_cover'].isna()
    ]
    covers = in_threads(
        lambda path: _cloud_cover(catalogue.root / path), iter(table['path'][todo]), jobs
    )
    tracked = track(covers, description='Finding clouds', total=len(todo), disable=todo.empty)
    for n, (row, cover) in enumerate(zip(todo, tracked, strict=True), 1):
        table.loc[row, 'cloud_cover'] = cover
        if n % CLOUDS_AT_ONCE == 0:
            catalogue.write()
    if len(todo):
        catalogue.write()


def _cloud_cover(path: Path) -> float:
    """Return the cloud cover, or NaN if the file cannot be read."""
    try:
        return cloud_cover(path)
    except RasterioError:
        return float('nan')
