"""Reading the headers of many files."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from itertools import repeat
from pathlib import Path
from typing import Any

import pandas as pd
from rich.progress import track

from geofm.datasets.catalogue.geoparquet import COLUMNS
from geofm.datasets.catalogue.inspection import Finding, Problem, inspect
from geofm.datasets.catalogue.scan import SceneName

#: Files from which a scan takes seconds, so that progress is shown.
PROGRESS_FROM = 2000

#: What is known of a file's place and time.
KEY = ['season', 'roi', 'patch', 'time_step']


def renew(
    root: Path, old: pd.DataFrame, listing: pd.DataFrame, jobs: int
) -> tuple[pd.DataFrame, bool]:
    """Bring a table of files up to date.

    Args:
        root: Folder of the files.
        old: The table, see :class:`geofm.datasets.catalogue.Catalogue`.
        listing: The files that there are, as of :func:`geofm.datasets.catalogue.walking.walk`.
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
