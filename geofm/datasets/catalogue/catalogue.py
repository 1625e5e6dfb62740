"""A catalogue of all files below a folder: what they show, and whether they are sound.

It is one GeoParquet file with one row a file. Reading it takes a second where opening a million
files takes an hour. :func:`update_catalogue` makes it, and brings it up to date.
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
    as_listing,
    changed,
    file_state,
    in_threads,
    renew,
    scan_rows,
    walk,
)
from geofm.datasets.catalogue.scenes import Source
from geofm.locking import locked_name
from geofm.printing import warn
from geofm.sensors import SENTINEL2

#: Name of the catalogue beside the data.
CATALOGUE_NAME = '.geofm-catalogue.parquet'

#: Folder of catalogues of data that are read-only, below the user's cache.
CACHE_FOLDER = 'geofm'

#: Threads that read files by default: on a network file system a file is mostly waited for.
JOBS = 8

#: Clouds take a tenth of a second a file; the catalogue is saved each time so many are done.
CLOUDS_AT_ONCE = 1000

#: Files from which a catalogue is used as it is: to look at each file would take a second.
SMALL = 5000

#: How catalogues are read: pages whose checksum is wrong are an error.
_CHECKED: dict[str, Any] = {'page_checksum_verification': True}

#: Rows that are written together, and that are read together.
GROUP, AT_ONCE = 1 << 16, 1 << 14


class CatalogueError(ValueError):
    """A file is no catalogue that can be used here."""


@dataclass(frozen=True, eq=False)
class Catalogue:
    """All files below a folder.

    Attributes:
        root: The folder.
        file: Where the catalogue lies.
        table: One row a file, sorted by path: ``path`` (below the root), ``size`` (bytes),
            ``mtime`` (ns), ``sensor``, ``season``, ``roi``, ``patch``, ``time_step``, ``date``,
            ``epsg``, affine coefficients ``a`` to ``f``, ``width``, ``height``, ``bands`` (their
            number), ``dtype``, ``cloud_cover`` (0 to 1), ``gaps`` (whether pixels without data
            were seen), ``names`` (of the bands, separated by spaces, '' if the file gives none),
            ``problem`` (a :class:`~geofm.datasets.catalogue.inspection.Problem`). Where
            nothing is known, integers are -1 and others missing.
        folders: Time at which each folder was last changed (ns).
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
            root: The folder that it is of.

        Returns:
            The catalogue.

        Raises:
            CatalogueError: If the file is no catalogue, or damaged.
        """
        state = read_state(file, root)
        with _damage_named(file, root), pq.ParquetFile(file, **_CHECKED) as stored:
            return cls(root, file, from_arrow(stored.read(STORED)), state.folders)

    def source(self) -> Source:
        """The rows, for :class:`~geofm.datasets.catalogue.scenes.Scenes`.

        Returns:
            The source.
        """
        facts = facts_to_arrow(self.table)
        return Source(str(self.root), lambda columns: iter(facts.select(columns).to_batches()))

    def problems(self) -> pd.DataFrame:
        """What is wrong with files.

        Returns:
            One row a kind of problem: ``problem``, ``files`` (their number), ``first`` (the first
            one's path).
        """
        kinds = self.table['problem'].where(
            self.table['problem'].notna() | ~self.table['gaps'], GAPS
        )
        bad = self.table.assign(problem=kinds)[kinds.notna()]
        groups = bad.groupby('problem', sort=True)['path']
        return groups.agg(files='size', first='first').reset_index()

    def write(self) -> None:
        """Write the catalogue: all of it, or nothing if that fails or is interrupted."""
        state = {'folders': self.folders, 'root': str(self.root.resolve())}
        table = to_arrow(self.table, state)
        with atomic_file(self.file) as part:
            # Small groups of rows, which need not be in memory all at a time.
            pq.write_table(
                table, part, compression='zstd', row_group_size=GROUP, write_page_checksum=True
            )


class State(NamedTuple):
    """What a catalogue says of itself.

    Attributes:
        root: The folder that it is of.
        folders: Time at which each folder was last changed (ns).
        rows: Number of files.
    """

    root: Path
    folders: dict[str, int]
    rows: int

    @property
    def is_stale(self) -> bool:
        """Whether files came or went since; files changed in place are not noticed.

        Only the times of the folders are looked at, which takes some microseconds each.
        """
        return any(changed(self.root, name, mtime) for name, mtime in self.folders.items())


def read_state(file: Path, root: Path | None = None) -> State:
    """Read what a catalogue says of itself.

    Args:
        file: The catalogue.
        root: The folder that it is of; by default the one that it was made of.

    Returns:
        The state.

    Raises:
        CatalogueError: If the file is no catalogue, or damaged, or its folder is not there.
    """
    with _damage_named(file, root):
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
            f'{file}: a catalogue of version {version}, but this is version {VERSION} of the '
            f'format; {_remake(root)}'
        )
    if not is_there:
        raise CatalogueError(
            f'{file}: a catalogue of {folder}, which is not there; give the folder as paths and '
            f'this file as catalogue'
        )
    return State(folder, folders, footer.num_rows)


@contextmanager
def _damage_named(file: Path, root: Path | None) -> Iterator[None]:
    """Say what reading a file that is no catalogue, or damaged, may raise."""
    try:
        yield
    except Exception as error:
        # A dozen kinds of error, by what is damaged.
        reason = ' '.join(str(error).split())[:200] or type(error).__name__
        raise CatalogueError(
            f'{file}: not a catalogue, or damaged ({reason}); {_remake(root)}'
        ) from error


def _remake(root: Path | None) -> str:
    return f"'geofm index {root or 'FOLDER'}' makes it anew"


def open_catalogue(root: Path) -> Source:
    """Open the catalogue of a folder; make it if there is none.

    One of fewer than :data:`SMALL` files is brought up to date, which takes milliseconds. A larger
    one is used as it is, with a warning if it is stale.

    Args:
        root: The folder.

    Returns:
        The rows of its files.

    Raises:
        CatalogueError: If the file that lies there is no catalogue, or damaged.
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
            _warn(f'{file}: was older than the data, and is now up to date')
        try:
            made.write()
        except OSError as err:
            _warn(f'{root}: all headers are read each time, for no catalogue can be kept ({err})')
        else:
            if len(made.table) >= SMALL:
                # In less memory than the table takes.
                return open_file(made.file, root)
    return made.source()


def open_file(file: Path, root: Path | None = None) -> Source:
    """Open a catalogue as it is, with a warning if it is stale.

    Args:
        file: The catalogue.
        root: The folder that it is of; by default the one that it was made of.

    Returns:
        The rows of its files.

    Raises:
        CatalogueError: If the file is no catalogue, or damaged, or its folder is not there.
    """
    state = read_state(file, root)
    if state.is_stale:
        _warn(
            f'{file}: older than the data: files came or went since. It is used as it is; '
            f"'geofm index {state.root}' brings it up to date"
        )

    def batches(columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with _damage_named(file, root):
            with _system_memory():
                stored = pq.ParquetFile(
                    file, memory_map=True, read_dictionary=NAMES, pre_buffer=False, **_CHECKED
                )
            yield from stored.iter_batches(AT_ONCE, columns=columns, use_threads=False)

    return Source(str(state.root), batches)


@contextmanager
def _system_memory() -> Iterator[None]:
    """Let Arrow use memory that goes back to the system, unlike that of its own pool."""
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def scan_files(paths: Sequence[str]) -> Source:
    """Read the headers of files that need not lie together.

    Args:
        paths: The files.

    Returns:
        Their rows.
    """
    rows = [(path, *file_state(path)) for path in paths]
    facts = facts_to_arrow(scan_rows(Path(), as_listing(rows), JOBS))
    return Source('', lambda columns: iter(facts.select(columns).to_batches()))


def _warn(message: str) -> None:
    """Warn whoever made the dataset."""
    warn(message)


def find_catalogue(root: Path) -> Path | None:
    """Find the catalogue of a folder.

    Args:
        root: The folder.

    Returns:
        The one beside the data, or else the one in the cache, or None.
    """
    return next((file for file in (beside(root), in_cache(root)) if file.is_file()), None)


def beside(root: Path) -> Path:
    """Where the catalogue of a folder lies, beside the data.

    Args:
        root: The folder.

    Returns:
        Path of the catalogue.
    """
    return root / CATALOGUE_NAME


def in_cache(root: Path) -> Path:
    """Where the catalogue of a read-only folder lies.

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
    """Make the catalogue of a folder, or bring it up to date.

    Only files that are new, or whose size or time of change differ, are read. A file that is gone
    loses its row. A file that is no catalogue, or damaged, is replaced. Until the new catalogue is
    whole, the old one stays as it is.

    Args:
        root: The folder.
        output: Where the catalogue is to lie; by default beside the data, or in the user's cache
            if the folder cannot be written to.
        jobs: Number of threads that read.
        clouds: Whether to work out the cloud cover of the S2 files that have none yet.

    Returns:
        The catalogue.

    Raises:
        ValueError: If there is no such folder, *jobs* is below 1, or s2cloudless is needed and
            missing.
        LockedError: If another process is writing the same catalogue.
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
    """The catalogue as it should be; the one before if nothing changed."""
    listing, folders = walk(root)
    table, is_new = renew(root, empty_table() if before is None else before.table, listing, jobs)
    if before is not None and not is_new and folders == before.folders:
        return before
    return Catalogue(root, file, table, folders)


def _writable(root: Path) -> Path:
    """Where a new catalogue of a folder can be written."""
    # A superuser may write to what is meant to be left alone.
    if not root.stat().st_mode & 0o222:
        return in_cache(root)
    try:
        # Asking for permission alone does not tell a file system that is mounted read-only.
        with temporary_file(beside(root)) as probe:
            probe.touch()
    except OSError:
        return in_cache(root)
    return beside(root)


def _add_clouds(catalogue: Catalogue, jobs: int) -> None:
    """Work out the cloud cover of S2 files that have none, and save it now and then."""
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
    """Cloud cover, NaN for a file that breaks."""
    try:
        return cloud_cover(path)
    except RasterioError:
        return float('nan')
