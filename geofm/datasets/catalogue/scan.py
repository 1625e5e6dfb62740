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

#: Files from which a scan takes seconds, so that progress is shown.
PROGRESS_FROM = 2000

#: What is known of a file's place and time.
KEY = ['season', 'roi', 'patch', 'time_step']


def walk(root: Path) -> tuple[pd.DataFrame, dict[str, int]]:
    """List the scenes below a folder.

    Hidden files and folders are left out, and land-cover maps, which share the tree.

    Args:
        root: The folder.

    Returns:
        ``path`` (below the root), ``size`` (bytes) and ``mtime`` (ns) of each file, -1 for what
        cannot be looked at; and the time at which each folder was last changed, for
        :func:`changed`.
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
    # The catalogue itself changes the root: that counts by its entries.
    folders[''] = _entries(root)
    return as_listing(rows), folders


def folders_below(
    root: Path, whole: tuple[str, ...] = ()
) -> Iterator[tuple[str, int, list[os.DirEntry[str]] | None]]:
    """Walk a folder and those below it, through links too, each of them once.

    Hidden folders are left out. A folder that is reached by a link and without one is walked where
    it lies.

    Args:
        root: The folder.
        whole: Endings, in lower case, of names of folders that are taken for files.

    Yields:
        Path below the root, time of change (ns), and all entries that are no folders, in the order
        of their names; None if the folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    # Links come last.
    waiting, links = [''], list[str]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop(0)
        path = os.path.join(root, folder) if folder else str(root)  # noqa: PTH118 - in the loop
        state = os.stat(path)  # noqa: PTH116
        if (state.st_dev, state.st_ino) in seen:
            # A link to a folder above, or two links to one folder.
            continue
        seen.add((state.st_dev, state.st_ino))
        prefix = f'{folder}/' if folder else ''
        try:
            with os.scandir(path) as found:
                # Arrow and Parquet have no place for other names, and no scene has one.
                entries = sorted((e for e in found if _is_text(e.name)), key=lambda e: e.name)
        except PermissionError:
            yield folder, state.st_mtime_ns, None
            continue
        files = []
        for entry in entries:
            if not _is_folder(entry) or entry.name.lower().endswith(whole):
                files.append(entry)
            # Snapshots and caches hold copies, which are no scenes of their own.
            elif not entry.name.startswith('.'):
                (links if entry.is_symlink() else waiting).append(prefix + entry.name)
        yield folder, state.st_mtime_ns, files


def as_listing(rows: list[tuple[str, int, int]]) -> pd.DataFrame:
    """Table of files.

    Args:
        rows: Path, size and time of change of each.

    Returns:
        Columns ``path``, ``size`` and ``mtime``.
    """
    listing = pd.DataFrame(rows, columns=['path', 'size', 'mtime'])
    return listing.astype({'path': 'str', 'size': np.int64, 'mtime': np.int64})


def file_state(path: 'str | os.DirEntry[str]') -> tuple[int, int]:
    """Size and time of change of a file.

    Args:
        path: The file.

    Returns:
        Bytes and nanoseconds; -1 if it cannot be looked at, or is no regular file but a pipe, say.
    """
    try:
        # An entry of a folder may know without asking the system.
        state = os.stat(path) if isinstance(path, str) else path.stat()  # noqa: PTH116
    except OSError:
        return -1, -1
    return (state.st_size, state.st_mtime_ns) if stat.S_ISREG(state.st_mode) else (-1, -1)


def changed(root: Path, folder: str, mtime: int) -> bool:
    """Whether something came into a folder or left it.

    Args:
        root: The folder that was walked.
        folder: A folder below it.
        mtime: What :func:`walk` noted of that folder.

    Returns:
        Whether it has changed; files changed in place are not noticed.
    """
    try:
        if not folder:
            return _entries(root) != mtime
        return os.stat(os.path.join(root, folder)).st_mtime_ns != mtime  # noqa: PTH116, PTH118
    except OSError:
        return True


def _is_text(name: str) -> bool:
    """Whether a name is UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_scene(name: str) -> bool:
    """Whether a file is one of those that are catalogued; land-cover maps share the tree."""
    return name.endswith('.tif') and not name.startswith(('.', 'lc_')) and '_lc_' not in name


def _entries(root: Path) -> int:
    """A number that changes when a scene or folder of the root comes or goes."""
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
    """Bring a table of files up to date.

    Args:
        root: Folder of the files.
        old: The table, see :class:`geofm.datasets.catalogue.Catalogue`.
        listing: The files that there are, as of :func:`geofm.datasets.catalogue.scan.walk`.
        jobs: Number of threads that read.

    Returns:
        The new table, and whether it differs from the old one.
    """
    where = pd.Index(old['path']).get_indexer(pd.Index(listing['path']))
    known = where >= 0
    for column in ('size', 'mtime'):
        known[known] = old[column].to_numpy()[where[known]] == listing[column].to_numpy()[known]
    # Neither time nor size tell when a permission is given.
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
    """Read the headers and some rows of files.

    Args:
        root: Folder of the files.
        listing: The files.
        jobs: Number of threads that read.

    Returns:
        Rows of a table.
    """
    items = zip(repeat(root), *(listing[c] for c in listing), strict=False)
    rows = _progress(
        in_threads(_row, items, jobs),
        'Reading headers',
        len(listing),
    )
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def in_threads(function: Callable[[Any], Any], items: Iterator[Any], jobs: int) -> Iterator[Any]:
    """Call a function in threads, each of which gets many items at a time.

    Args:
        function: The function.
        items: What to call it with.
        jobs: Number of threads.

    Yields:
        Its results, in order.
    """
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
    """Sensor, season, ROI, patch, time step and date from a name of either data set."""
    scene = SceneName.parse(path)
    if scene is not None:
        return scene.sensor, *scene.key, scene.date
    patch = PatchName.parse(path)
    if patch is None:
        return None
    step = TIME_STEP['cloudy' if patch.kind == 's2_cloudy' else 'clear']
    return patch.kind[:2], patch.season, patch.roi, patch.patch, step, None


def mark_duplicates(root: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Mark files that have one key; which of them is meant is not ours to guess.

    Args:
        root: Folder of the files.
        table: The files.

    Returns:
        The table with these problems only.
    """
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
