"""A catalogue of all files below a folder: what they show, and whether they are sound.

It is one GeoParquet file with one row a file. Reading it takes a second where opening a million
files takes an hour. :func:`update_catalogue` makes it, and brings it up to date.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from itertools import repeat
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import shapely
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rich.progress import track

from geofm.datasets.clouds import cloud_cover
from geofm.datasets.inspection import GAPS, Finding, Problem, inspect
from geofm.datasets.scan import SEARCH_CRS, SceneName

#: Name of the catalogue beside the data.
CATALOGUE_NAME = '.geofm-catalogue.parquet'

#: Folder of catalogues of data that are read-only, below the user's cache.
CACHE_FOLDER = 'geofm'

#: Threads that read files by default: on a network file system a file is mostly waited for.
JOBS = 8

#: Files from which a scan takes seconds, so that progress is shown.
PROGRESS_FROM = 2000

#: Clouds take a tenth of a second a file; the catalogue is saved each time so many are done.
CLOUDS_AT_ONCE = 1000

#: What is known of a file's place and time.
KEY = ['season', 'roi', 'patch', 'time_step']

#: Affine coefficients, one column each while in memory.
AFFINE = ['a', 'b', 'c', 'd', 'e', 'f']

#: Columns that say on which grid a file is.
GRID = ['epsg', *AFFINE, 'height', 'width']

_VERSION = 1

_SCHEMA = pa.schema(
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
        ('problem', pa.string()),
        ('geometry', pa.binary()),
    ]
)

#: Columns in memory, in order, with their types; -1 and NaN where nothing is known.
_COLUMNS: dict[str, Any] = {
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
    'problem': 'str',
}

_INTEGERS = [name for name, kind in _COLUMNS.items() if kind is np.int32]


@dataclass(frozen=True)
class Catalogue:
    """All files below a folder.

    Attributes:
        root: The folder.
        file: Where the catalogue lies.
        table: One row a file, sorted by path: ``path`` (below the root), ``size`` (bytes),
            ``mtime`` (ns), ``sensor``, ``season``, ``roi``, ``patch``, ``time_step``, ``date``,
            ``epsg``, affine coefficients ``a`` to ``f``, ``width``, ``height``, ``bands`` (their
            number), ``dtype``, ``cloud_cover`` (0 to 1), ``gaps`` (whether pixels without data
            were seen), ``problem`` (a :class:`~geofm.datasets.inspection.Problem`). Where
            nothing is known, integers are -1 and others missing.
        folders: Time at which each folder was last changed (ns).
    """

    root: Path
    file: Path
    table: pd.DataFrame
    folders: dict[str, int]

    @classmethod
    def read(cls, file: Path, root: Path, columns: Sequence[str] | None = None) -> Self:
        """Read a catalogue.

        Args:
            file: The catalogue.
            root: The folder that it is of.
            columns: Columns of the table to read, all by default.

        Returns:
            The catalogue.

        Raises:
            ValueError: If the file is no catalogue.
        """
        try:
            names = None if columns is None else _stored_columns(columns)
            stored = pq.read_table(file, columns=names or _stored_columns(list(_COLUMNS)))
            state = json.loads(stored.schema.metadata[b'geofm'])
        except (pa.ArrowException, KeyError, TypeError, ValueError) as err:
            raise ValueError(
                f"{file}: not a catalogue ({err}); delete it and run 'geofm index' anew"
            ) from err
        if state['version'] != _VERSION:
            raise ValueError(
                f'{file}: a catalogue of version {state["version"]}, but this is version '
                f"{_VERSION} of the format; run 'geofm index' anew"
            )
        return cls(root, file, _from_arrow(stored), state['folders'])

    @property
    def is_stale(self) -> bool:
        """Whether files came or went since; files changed in place are not noticed.

        Only the times of the folders are looked at, which takes some microseconds each.
        """
        return any(_changed(self.root, name, mtime) for name, mtime in self.folders.items())

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
        self.file.parent.mkdir(parents=True, exist_ok=True)
        for left_over in self.file.parent.glob(f'{self.file.name}.*.part'):
            # A running process may own it; then its renaming fails, with an error that says so.
            if not _is_running(left_over.suffixes[-2][1:]):
                left_over.unlink(missing_ok=True)
        part = self.file.with_name(f'{self.file.name}.{os.getpid()}.part')
        try:
            pq.write_table(_to_arrow(self.table, self.folders), part, compression='zstd')
            with part.open('rb+') as file:
                os.fsync(file.fileno())
            part.replace(self.file)
        finally:
            part.unlink(missing_ok=True)


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

    Only files that are new, or whose size or time of change differ, are read. A file that is
    gone loses its row. Until the new catalogue is whole, the old one stays as it is.

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
    """
    if not root.is_dir():
        raise ValueError(f'{root}: no such folder')
    if jobs < 1:
        raise ValueError(f'jobs must be at least 1, not {jobs}')
    file = output or find_catalogue(root) or _writable(root)
    listing, folders = _walk(root)
    old, old_folders = _empty(), None
    if file.is_file():
        with suppress(ValueError):
            before = Catalogue.read(file, root)
            old, old_folders = before.table, before.folders
    table, changed = _renew(root, old, listing, jobs)
    catalogue = Catalogue(root, file, table, folders)
    if changed or folders != old_folders:
        catalogue.write()
    if clouds:
        _add_clouds(catalogue, jobs)
    return catalogue


def footprints(table: pd.DataFrame, crs: CRS = SEARCH_CRS) -> npt.NDArray[np.object_]:
    """Outlines of files.

    Args:
        table: Rows with the columns :data:`GRID`.
        crs: CRS of the outlines.

    Returns:
        Polygons through the four corners, as of :meth:`geofm.grid.Grid.footprint`; None for rows
        without CRS, and for those whose corners lie nowhere in *crs*.
    """
    a, b, c, d, e, f, height, width = (
        table[name].to_numpy(float)[:, None] for name in (*AFFINE, 'height', 'width')
    )
    cols, rows = width * [0, 1, 1, 0], height * [0, 0, 1, 1]
    corners = np.stack((a * cols + b * rows + c, d * cols + e * rows + f), axis=-1)
    epsg = table['epsg'].to_numpy()
    corners[epsg <= 0] = np.nan
    for code in np.unique(epsg[epsg > 0]).tolist():
        if _crs(code) != crs:
            there = epsg == code
            corners[there] = _project(corners[there], _crs(code), crs)
    shapes = np.full(len(table), None, dtype=object)
    known = np.isfinite(corners).all(axis=(1, 2))
    shapes[known] = shapely.polygons(corners[known])
    return shapes


def _project(corners: npt.NDArray[np.float64], source: CRS, crs: CRS) -> npt.NDArray[np.float64]:
    """Points (N, 4, 2) in another CRS; not finite where there is none."""
    # Not rasterio's, which refuses all points if one lies outside of the projection's domain.
    transformer = pyproj.Transformer.from_crs(source.to_epsg(), crs.to_epsg(), always_xy=True)
    xs, ys = transformer.transform(corners[..., 0], corners[..., 1])
    return np.stack((xs, ys), axis=-1)


def grid_numbers(table: pd.DataFrame) -> npt.NDArray[np.int64]:
    """Number of the grid of each file, from 0.

    Args:
        table: Rows with the columns :data:`GRID`.

    Returns:
        Numbers; rows on the same grid have the same.
    """
    # A file without header has no transform, which must not make it a group of its own.
    return np.asarray(table.groupby(GRID, sort=False, dropna=False).ngroup(), dtype=np.int64)


_CRS: dict[int, CRS] = {}


def _crs(epsg: int) -> CRS:
    """CRS of an EPSG code; making one takes longer than all else about a file."""
    if epsg not in _CRS:
        _CRS[epsg] = CRS.from_epsg(epsg)
    return _CRS[epsg]


def _is_running(process: str) -> bool:
    """Whether a process of this machine is alive."""
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _writable(root: Path) -> Path:
    """Where a new catalogue of a folder can be written."""
    try:
        # Asking for permission alone does not tell a file system that is mounted read-only.
        probe = root / f'{CATALOGUE_NAME}.{os.getpid()}.part'
        probe.touch()
        probe.unlink()
    except OSError:
        return in_cache(root)
    return beside(root)


# Listing -----------------------------------------------------------------------------------------


def _is_scene(name: str) -> bool:
    """Whether a file is one of those that are catalogued; land-cover maps share the tree."""
    return name.endswith('.tif') and not name.startswith('lc_') and '_lc_' not in name


def _walk(root: Path) -> tuple[pd.DataFrame, dict[str, int]]:
    """Path, size and time of all files, and the times of all folders."""
    rows: list[tuple[str, int, int]] = []
    folders: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    waiting = ['']
    while waiting:
        folder = waiting.pop()
        path = os.path.join(root, folder) if folder else str(root)  # noqa: PTH118 - in the loop
        state = os.stat(path)  # noqa: PTH116
        if (state.st_dev, state.st_ino) in seen:
            # A link to a folder above, or two links to one folder.
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[folder] = state.st_mtime_ns
        prefix = f'{folder}/' if folder else ''
        try:
            entries = os.scandir(path)
        except PermissionError:
            rows.append((folder, -1, -1))
            continue
        with entries:
            for entry in entries:
                if entry.is_dir():
                    # Snapshots and caches hold copies, which are no scenes of their own.
                    if entry.name.startswith('.'):
                        continue
                    waiting.append(prefix + entry.name)
                elif _is_scene(entry.name):
                    try:
                        file = entry.stat()
                        rows.append((prefix + entry.name, file.st_size, file.st_mtime_ns))
                    except OSError:
                        rows.append((prefix + entry.name, -1, -1))
    # The catalogue itself changes the root: that counts by its entries.
    folders[''] = _entries(root)
    listing = pd.DataFrame(rows, columns=['path', 'size', 'mtime'])
    return listing.astype({'path': 'str', 'size': np.int64, 'mtime': np.int64}), folders


def _entries(root: Path) -> int:
    """A number that changes when a scene or folder of the root comes or goes."""
    with os.scandir(root) as entries:
        names = sorted(
            e.name
            for e in entries
            if _is_scene(e.name) or (e.is_dir() and not e.name.startswith('.'))
        )
    return int.from_bytes(hashlib.sha256('\0'.join(names).encode()).digest()[:6], 'big')


def _changed(root: Path, folder: str, mtime: int) -> bool:
    """Whether something came into a folder or left it."""
    try:
        if not folder:
            return _entries(root) != mtime
        return os.stat(os.path.join(root, folder)).st_mtime_ns != mtime  # noqa: PTH116, PTH118
    except OSError:
        return True


# Scanning ----------------------------------------------------------------------------------------


def _renew(
    root: Path, old: pd.DataFrame, listing: pd.DataFrame, jobs: int
) -> tuple[pd.DataFrame, bool]:
    """The new table, and whether it differs from the old one."""
    where = pd.Index(old['path']).get_indexer(pd.Index(listing['path']))
    known = where >= 0
    for column in ('size', 'mtime'):
        known[known] = old[column].to_numpy()[where[known]] == listing[column].to_numpy()[known]
    # Neither time nor size tell when a permission is given.
    unsure = old['problem'].isin([Problem.PERMISSION, Problem.UNREADABLE]).to_numpy()
    known[known] = ~unsure[where[known]]
    scanned = _scan(root, listing[~known], jobs)
    kept = old.iloc[where[known]]
    if not len(scanned) and len(kept) == len(old):
        return old, False
    table = scanned if kept.empty else pd.concat([kept, scanned], ignore_index=True)
    table = table.sort_values('path', ignore_index=True)
    return _mark_duplicates(root, table), True


def _scan(root: Path, listing: pd.DataFrame, jobs: int) -> pd.DataFrame:
    """Rows of files that are read."""
    rows = _progress(
        _in_threads(_row, zip(repeat(root), *(listing[c] for c in listing)), jobs),
        'Reading headers',
        len(listing),
    )
    return pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS)


def _in_threads(function: Callable[[Any], Any], items: Iterator[Any], jobs: int) -> Iterator[Any]:
    """Results of a function, in order; threads get many items at a time."""
    work = list(items)
    chunks = [work[i : i + 64] for i in range(0, len(work), 64)]
    with ThreadPoolExecutor(jobs) as pool:
        for results in pool.map(lambda chunk: [function(item) for item in chunk], chunks):
            yield from results


def _progress(items: Iterator[Any], description: str, total: int) -> list[Any]:
    """Collect results behind a progress bar."""
    return list(track(items, description=description, total=total, disable=total < PROGRESS_FROM))


def _row(item: tuple[Path, str, int, int]) -> tuple[Any, ...]:
    """Row of a file."""
    root, path, size, mtime = item
    name = _parse(path)
    if size < 0:
        finding = Finding(None, Problem.PERMISSION if name is None else Problem.UNREADABLE)
    elif name is None:
        finding = Finding(None, Problem.NAME)
    else:
        finding = inspect(f'{root}/{path}', name[0])
    header, nothing = finding.header, float('nan')
    return (
        path,
        size,
        mtime,
        *(name or (None, None, -1, -1, -1, None)),
        -1 if header is None or header.epsg is None else header.epsg,
        *([nothing] * 6 if header is None else header.transform),
        *((-1, -1, -1) if header is None else (header.width, header.height, header.bands)),
        None if header is None else header.dtype,
        nothing,
        finding.gaps,
        None if finding.problem is None else str(finding.problem),
    )


type _Place = tuple[str, str, int, int, int, date | None]


def _parse(path: str) -> _Place | None:
    """Sensor, season, ROI, patch, time step and date from a name of either data set."""
    # This module is part of what SEN12MS-CR's dataset is built on.
    from geofm.datasets.sen12mscr import TIME_STEP, PatchName

    scene = SceneName.parse(path)
    if scene is not None:
        return scene.sensor, *scene.key, scene.date
    patch = PatchName.parse(path)
    if patch is None:
        return None
    step = TIME_STEP['cloudy' if patch.kind == 's2_cloudy' else 'clear']
    return patch.kind[:2], patch.season, patch.roi, patch.patch, step, None


def _mark_duplicates(root: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Mark files that have one key; which of them is meant is not ours to guess."""
    problem = table['problem'].mask(table['problem'] == Problem.DUPLICATE)
    named = table[table['sensor'].notna()]
    twice = named[named.duplicated(['sensor', *KEY], keep=False)]
    # A file reached by two paths is one file: the second path is not another one.
    real = twice['path'].map(lambda path: os.path.realpath(root / path))
    again = twice[real.duplicated(keep=False)]
    one = twice[~real.duplicated()].duplicated(['sensor', *KEY], keep=False)
    doubled = one[one].index.union(again.index[real[again.index].duplicated()])
    problem[doubled] = problem[doubled].fillna(str(Problem.DUPLICATE))
    return table.assign(problem=problem.astype('str'))


def _add_clouds(catalogue: Catalogue, jobs: int) -> None:
    """Work out the cloud cover of S2 files that have none, and save it now and then."""
    table = catalogue.table
    todo = table.index[
        (table['sensor'] == 's2') & table['problem'].isna() & table['cloud_cover'].isna()
    ]
    covers = _in_threads(
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


# GeoParquet --------------------------------------------------------------------------------------


def _empty() -> pd.DataFrame:
    """A table without rows."""
    return pd.DataFrame({name: pd.Series([], dtype=kind) for name, kind in _COLUMNS.items()})


def _stored_columns(columns: Sequence[str]) -> list[str]:
    """Columns of the file that hold columns of the table."""
    return list(dict.fromkeys('transform' if name in AFFINE else name for name in columns))


def _to_arrow(table: pd.DataFrame, folders: dict[str, int]) -> pa.Table:
    """Table as GeoParquet stores it, https://geoparquet.org/releases/v1.0.0/."""
    shapes = footprints(table)
    known = (table['epsg'] >= 0).to_numpy()
    arrays = []
    for field in _SCHEMA:
        if field.name == 'transform':
            values = pa.array(table[AFFINE].to_numpy().ravel(), pa.float64())
            arrays.append(pa.FixedSizeListArray.from_arrays(values, 6, mask=pa.array(~known)))
        elif field.name == 'geometry':
            arrays.append(pa.array(shapely.to_wkb(shapes), pa.binary()))
        elif field.name in _INTEGERS:
            column = table[field.name].to_numpy()
            arrays.append(pa.array(column, field.type, mask=column < 0))
        else:
            arrays.append(pa.array(table[field.name], field.type, from_pandas=True))
    geometry = {
        'encoding': 'WKB',
        'geometry_types': ['Polygon'],
        'crs': pyproj.CRS(SEARCH_CRS.to_wkt()).to_json_dict(),
        **({'bbox': shapely.total_bounds(shapes[known]).tolist()} if known.any() else {}),
    }
    geo = {'version': '1.0.0', 'primary_column': 'geometry', 'columns': {'geometry': geometry}}
    state = {'version': _VERSION, 'folders': folders}
    return pa.table(arrays, schema=_SCHEMA).replace_schema_metadata(
        {'geo': json.dumps(geo), 'geofm': json.dumps(state)}
    )


def _from_arrow(stored: pa.Table) -> pd.DataFrame:
    """Table as it is in memory."""
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
        elif _COLUMNS[name] == 'str':
            columns[name] = pd.array(column.combine_chunks(), dtype='str')
        else:
            columns[name] = column.to_numpy()
    order = [name for name in _COLUMNS if name in columns]
    return pd.DataFrame({name: columns[name] for name in order}, copy=False)
