"""Find the scenes below a folder, and read their headers and some of their pixels."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.progress import track

from geofm.datasets.catalogue.columns import COLUMNS
from geofm.datasets.catalogue.inspection import Finding, Problem, inspect
from geofm.sen12ms import TIME_STEP, PatchName, SceneName

#: Number of files from which a progress bar is shown, since the scan takes seconds.
PROGRESS_FROM = 2000

#: Columns that identify the place and time of a file.
KEY = ['season', 'roi', 'patch', 'time_step']


def walk(root: Path) -> tuple[pd.DataFrame, dict[str, int]]:
    """List the scenes below a folder.

    Hidden files and folders are left out, as are land-cover maps, which are in the same tree.

    Args:
        root: The folder.

    Returns:
        ``path`` (below the root), ``size`` (bytes) and ``mtime`` (ns) of each file, -1 where they
        cannot be read; and the modification time of each folder, for :func:`changed`.
    """
    rows: list[tuple[str, int, int]] = []
    folders: dict[str, int] = {}
    for folder, mtime, entries in folders_below(root):
        folders[folder] = mtime
        prefix = f'{folder}/' if folder else ''
        if entries is None:
            rows.append((folder, -1, -1))
            continue
        rows += [(prefix + e.name, *file_state(e)) for e in entries if _is_scene(e.name)]
    # Writing the catalogue changes the modification time of the root, so use its entries instead.
    folders[''] = _entries(root)
    return listing_table(rows), folders


def folders_below(
    root: Path, whole: tuple[str, ...] = ()
) -> Iterator[tuple[str, int, list[os.DirEntry[str]] | None]]:
    """Walk a folder and its subfolders, also through links, visiting each folder once.

    Hidden folders are left out. A folder that is reached both directly and through a link is
    visited under its direct path.

    Args:
        root: The folder.
        whole: Suffixes, in lower case, of folders that are treated as files.

    Yields:
        Path below the root, modification time (ns), and the entries that are not folders, sorted by
        name; None instead of the entries if the folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    # Links are followed last.
    waiting, links = [''], list[str]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        path = os.path.join(root, folder) if folder else str(root)  # noqa: PTH118 - in the loop
        state = os.stat(path)  # noqa: PTH116
        if (state.st_dev, state.st_ino) in seen:
            # A link to a parent folder, or a second link to one folder.
            continue
        seen.add((state.st_dev, state.st_ino))
        prefix = f'{folder}/' if folder else ''
        try:
            with os.scandir(path) as found:
                # Arrow and Parquet cannot store names that are not UTF-8, and no scene has one.
                entries = sorted((e for e in found if _is_text(e.name)), key=lambda e: e.name)
        except PermissionError:
            yield folder, state.st_mtime_ns, None
            continue
        files = []
        for entry in entries:
            if not _is_folder(entry) or entry.name.lower().endswith(whole):
                files.append(entry)
            # Hidden folders such as snapshots and caches hold copies of scenes.
            elif not entry.name.startswith('.'):
                (links if entry.is_symlink() else waiting).append(prefix + entry.name)
        yield folder, state.st_mtime_ns, files


def listing_table(rows: list[tuple[str, int, int]]) -> pd.DataFrame:
    """Make a table of files.

    Args:
        rows: Path, size and modification time of each file.

    Returns:
        Table with the columns ``path``, ``size`` and ``mtime``.
    """
    listing = pd.DataFrame(rows, columns=['path', 'size', 'mtime'])
    return listing.astype({'path': 'str', 'size': np.int64, 'mtime': np.int64})


def file_state(path: 'str | os.DirEntry[str]') -> tuple[int, int]:
    """Return size and modification time of a file.

    Args:
        path: The file.

    Returns:
        Bytes and nanoseconds; -1 if they cannot be read, or it is not a regular file.
    """
    try:
        # A DirEntry may have cached the result.
        state = os.stat(path) if isinstance(path, str) else path.stat()  # noqa: PTH116
    except OSError:
        return -1, -1
    return (state.st_size, state.st_mtime_ns) if stat.S_ISREG(state.st_mode) else (-1, -1)


def changed(root: Path, folder: str, mtime: int) -> bool:
    """Check whether entries were added to a folder or removed from it.

    Args:
        root: Folder that was walked.
        folder: A folder below it.
        mtime: Value that :func:`walk` returned for that folder.

    Returns:
        Whether entries were added or removed. Files changed in place are not noticed.
    """
    try:
        if not folder:
            return _entries(root) != mtime
        return os.stat(os.path.join(root, folder)).st_mtime_ns != mtime  # noqa: PTH116, PTH118
    except OSError:
        return True


def _is_text(name: str) -> bool:
    """Check whether a name is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Check whether an entry is a folder or a link to one; a link to itself is neither."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_scene(name: str) -> bool:
    """Check whether a file belongs in the catalogue; land-cover maps in the tree do not."""
    return name.endswith('.tif') and not name.startswith(('.', 'lc_')) and '_lc_' not in name


def _entries(root: Path) -> int:
    """Return a number that changes when a scene or folder is added to the root or removed."""
    with os.scandir(root) as entries:
        names = sorted(
            e.name
            for e in entries
            if _is_scene(e.name) or (_is_folder(e) and not e.name.startswith('.'))
        )
    content = '\0'.join(names).encode(errors='surrogateescape')
    return int.from_bytes(hashlib.sha256(content).digest()[:6], 'big')


def renew(
    root: Path, old: pd.DataFrame, listing: pd.DataFrame, jobs: int
) -> tuple[pd.DataFrame, bool]:
    """Update a table of files.

    Args:
        root: Folder of the files.
        old: The table, see :class:`geofm.datasets.catalogue.Catalogue`.
        listing: The existing files, as returned by :func:`walk`.
        jobs: Number of threads.

    Returns:
        The new table, and whether it differs from the old one.
    """
    where = pd.Index(old['path']).get_indexer(pd.Index(listing['path']))
    known = where >= 0
    for column in ('size', 'mtime'):
        known[known] = old[column].to_numpy()[where[known]] == listing[column].to_numpy()[known]
    # A new permission changes neither modification time nor size.
    unsure = old['problem'].isin([Problem.PERMISSION, Problem.UNREADABLE]).to_numpy()
    known[known] = ~unsure[where[known]]
    scanned = scan_rows(root, listing[~known], jobs)
    kept = old.iloc[where[known]]
    if not len(scanned) and len(kept) == len(old):
        return old, False
    table = scanned if kept.empty else pd.concat([kept, scanned], ignore_index=True)
    table = table.sort_values('path', ignore_index=True)
    return mark_duplicates(root, table), True


def scan_rows(root: Path, listing: pd.DataFrame, jobs: int) -> pd.DataFrame:
    """Read the headers and some pixels of files.

    Args:
        root: Folder of the files.
        listing: The files.
        jobs: Number of threads.

    Returns:
        Table with one row per file.
    """
    items = zip(repeat(root), *(listing[c] for c in listing), strict=False)
    rows = _progress(
        in_threads(_row, items, jobs),
        'Reading headers',
        len(listing),
    )
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def in_threads(function: Callable[[Any], Any], items: Iterator[Any], jobs: int) -> Iterator[Any]:
    """Call a function in threads, with many items per task.

    Args:
        function: The function.
        items: Its arguments, one per call.
        jobs: Number of threads.

    Yields:
        The results, in order.
    """
    work = list(items)
    chunks = [work[i : i + 64] for i in range(0, len(work), 64)]
    with ThreadPoolExecutor(jobs) as pool:
        for results in pool.map(lambda chunk: [function(item) for item in chunk], chunks):
            yield from results


def _progress(items: Iterator[Any], description: str, total: int) -> list[Any]:
    """Collect results and show a progress bar."""
    return list(track(items, description=description, total=total, disable=total < PROGRESS_FROM))


def _row(item: tuple[Path, str, int, int]) -> tuple[Any, ...]:
    """Return the row of a file."""
    root, path, size, mtime = item
    name = _parse(path)
    if size < 0:
        finding = Finding(None, Problem.PERMISSION if name is None else Problem.UNREADABLE)
    elif name is None:
        finding = Finding(None, Problem.NAME)
    else:
        finding = inspect(os.path.join(root, path), name[0])  # noqa: PTH118 - in the loop
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
        finding.names,
        None if finding.problem is None else str(finding.problem),
    )


type _Place = tuple[str, str, int, int, int, date | None]


def _parse(path: str) -> _Place | None:
    """Parse sensor, season, ROI, patch, time step and date from a name of either data set."""
    scene = SceneName.parse(path)
    if scene is not None:
        return scene.sensor, *scene.key, scene.date
    patch = PatchName.parse(path)
    if patch is None:
        return None
    step = TIME_STEP['cloudy' if patch.kind == 's2_cloudy' else 'clear']
    return patch.kind[:2], patch.season, patch.roi, patch.patch, step, None


def mark_duplicates(root: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Mark files with the same key as duplicates, since none can be preferred.

    Args:
        root: Folder of the files.
        table: The files.

    Returns:
        The table with exactly these files marked as duplicates.
    """
    problem = table['problem'].mask(table['problem'] == Problem.DUPLICATE)
    named = table[table['sensor'].notna()]
    twice = named[named.duplicated(['sensor', *KEY], keep=False)]
    # Two paths may lead to the same file, which is then not a duplicate of itself.
    real = twice['path'].map(lambda path: os.path.realpath(root / path))
    again = twice[real.duplicated(keep=False)]
    one = twice[~real.duplicated()].duplicated(['sensor', *KEY], keep=False)
    doubled = one[one].index.union(again.index[real[again.index].duplicated()])
    problem[doubled] = problem[doubled].fillna(str(Problem.DUPLICATE))
    return table.assign(problem=problem.astype('str'))
