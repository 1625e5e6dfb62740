"""The scenes that a dataset can draw on: from a catalogue, a list, or the names of files."""

import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import shapely

from geofm.datasets.catalogue import (
    AFFINE,
    GRID,
    KEY,
    Catalogue,
    find_catalogue,
    footprints,
    update_catalogue,
)
from geofm.datasets.scan import (
    PairKey,
    Reason,
    Scene,
    SceneName,
    Skipped,
    match_pairs,
    scan_headers,
)
from geofm.grid import ALIGNMENT_TOLERANCE

#: Number of files from which a folder without a catalogue gets one. A smaller one is read in
#: seconds each time, and a catalogue would only be one more thing that can be out of date.
CATALOGUE_FROM = 5000

_COLUMNS = ['path', 'sensor', *KEY, 'date']


@dataclass(frozen=True)
class Listing:
    """Files, by what their names say.

    Attributes:
        scenes: One row a file: ``path``, ``sensor``, ``season``, ``roi``, ``patch``,
            ``time_step``, ``date``; from a catalogue its further columns.
        catalogued: Whether the scenes come from a catalogue.
        pairs: Rows of the scenes that make the pairs, if a list says so: ``s1`` and ``s2``.
    """

    scenes: pd.DataFrame
    catalogued: bool = False
    pairs: pd.DataFrame | None = None

    def describe(self, pairs: pd.DataFrame, skipped: Skipped) -> pd.DataFrame:
        """Table of pairs, see :func:`geofm.datasets.scan.scan_headers`.

        Args:
            pairs: ``s1`` and ``s2``, rows of the scenes, -1 for a sensor that is not needed.
            skipped: Takes the files that make a pair unusable.

        Returns:
            One row a pair.
        """
        if self.catalogued:
            return _describe(self.scenes, pairs, skipped)
        return scan_headers(self._as_mapping(pairs), skipped)

    def _as_mapping(self, pairs: pd.DataFrame) -> dict[PairKey, dict[str, Scene]]:
        """Pairs by their keys."""
        found = {}
        columns = {name: self.scenes[name].to_dict() for name in (*KEY, 'path', 'date')}
        for rows in zip(pairs['s1'], pairs['s2'], strict=True):
            present = {s: row for s, row in zip(('s1', 's2'), rows, strict=True) if row >= 0}
            key = PairKey(*(columns[name][present[max(present)]] for name in KEY))
            found[key] = {
                sensor: Scene(columns['path'][row], columns['date'][row].date())
                for sensor, row in present.items()
            }
        return found


def list_scenes(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    files: Callable[[], Sequence[str]],
    skipped: Skipped,
) -> Listing:
    """Find scenes.

    Args:
        paths: Folders or files, or the path of a list of pairs (``.json``).
        files: Lists the files below the paths.
        skipped: Takes the files that are no scenes, or bad ones.

    Returns:
        The scenes.

    Raises:
        ValueError: If a list of pairs or a catalogue cannot be used.
    """
    if isinstance(paths, str | os.PathLike):
        if os.fspath(paths).endswith('.json'):
            return _read_pairs(Path(paths))
        paths = [paths]
    roots = [Path(path) for path in paths]
    folders = bool(roots) and all(root.is_dir() for root in roots)
    if folders and any(find_catalogue(root) for root in roots):
        return _from_catalogues(roots, skipped)
    found = files()
    if folders and len(found) >= CATALOGUE_FROM:
        return _from_catalogues(roots, skipped)
    return _from_names(found, skipped)


def _from_names(files: Sequence[str], skipped: Skipped) -> Listing:
    """Scenes by the names of files."""
    rows = [
        (scene.path, sensor, *key, scene.date)
        for key, sensors in match_pairs(files, skipped).items()
        for sensor, scenes in sensors.items()
        for scene in scenes
    ]
    table = pd.DataFrame(rows, columns=_COLUMNS)
    return Listing(table.assign(date=pd.to_datetime(table['date'])))


def _read_pairs(file: Path) -> Listing:
    """Pairs that a file lists."""
    try:
        listed = json.loads(file.read_text())
        names = [(os.fspath(s1), os.fspath(s2)) for s1, s2 in listed]
    except (OSError, ValueError, TypeError) as err:
        raise ValueError(f'{file}: not a list [[s1, s2], ...] of paths ({err})') from err
    rows = []
    for pair in names:
        for sensor, path in zip(('s1', 's2'), pair, strict=True):
            name = SceneName.parse(path)
            if name is None or name.sensor != sensor:
                raise ValueError(f'{file}: {path} is not named like an {sensor} scene')
            # Relative to the list, so that both can be moved together.
            rows.append((str(file.parent / path), sensor, *name.key, name.date))
    table = pd.DataFrame(rows, columns=_COLUMNS)
    again = table[table['sensor'] == 's2'].duplicated(KEY)
    if again.any():
        raise ValueError(f'{file}: {table["path"][again.index[again][0]]} is listed twice')
    first = np.arange(0, len(table), 2)
    return Listing(
        table.assign(date=pd.to_datetime(table['date'])),
        pairs=pd.DataFrame({'s1': first, 's2': first + 1}),
    )


def _from_catalogues(roots: Sequence[Path], skipped: Skipped) -> Listing:
    """Scenes that the catalogues of folders list."""
    tables = [_usable(_open(root), skipped) for root in roots]
    if len(tables) == 1:
        return Listing(tables[0], catalogued=True)
    scenes = pd.concat(tables)
    real = scenes['path'].map(os.path.realpath)
    return Listing(scenes[~real.duplicated()].reset_index(drop=True), catalogued=True)


def listing_of(catalogue: Catalogue, skipped: Skipped) -> Listing:
    """Scenes that a catalogue lists.

    Args:
        catalogue: The catalogue.
        skipped: Takes the files that it marks as bad.

    Returns:
        The scenes.
    """
    return Listing(_usable(catalogue, skipped), catalogued=True)


def _usable(catalogue: Catalogue, skipped: Skipped) -> pd.DataFrame:
    """Files of a catalogue that are sound scenes of SEN12MS-CR-TS, with their whole paths."""
    table = catalogue.table
    paths = f'{catalogue.root}/' + table['path']
    bad = table['problem'].notna()
    for problem, files in paths[bad].groupby(table['problem'][bad]):
        # The table that ``geofm index`` prints tells the rest apart.
        known = [reason for reason in Reason if reason == problem]
        skipped.add(known[0] if known else Reason.BAD, *files)
    # Names without a date are those of SEN12MS-CR.
    good = ~bad & table['date'].notna()
    return table.assign(path=paths)[good].reset_index(drop=True)


def _open(root: Path) -> Catalogue:
    """Catalogue of a folder; made if there is none."""
    file = find_catalogue(root)
    if file is None:
        return update_catalogue(root)
    columns = [*_COLUMNS, *GRID, 'cloud_cover', 'problem']
    catalogue = Catalogue.read(file, root, columns)
    if catalogue.is_stale:
        warnings.warn(
            f'{file}: older than the data: files came or went since. It is used as it is; '
            f"'geofm index {root}' brings it up to date",
            UserWarning,
            stacklevel=6,
        )
    return catalogue


def _describe(scenes: pd.DataFrame, pairs: pd.DataFrame, skipped: Skipped) -> pd.DataFrame:
    """Table of pairs, from the columns of the catalogue."""
    s1, s2 = (_Side(scenes, pairs[sensor].to_numpy()) for sensor in ('s1', 's2'))
    main = s2 if s2.is_there else s1
    shapes = footprints(main.table[GRID])
    if s1.is_there and s2.is_there:
        apart = _apart(s1.table, s2.table, shapes)
        if apart.any():
            skipped.add(Reason.APART, *s1.table['path'][apart])
            kept = pairs[~apart].reset_index(drop=True)
            return _describe(scenes, kept, skipped)
    columns = {
        's1': s1.column('path', None),
        's2': s2.column('path', None),
        **{name: main.table[name] for name in KEY},
        's1_date': s1.column('date', pd.NaT),
        's2_date': s2.column('date', pd.NaT),
        'epsg': main.table['epsg'],
        'transform': _transforms(main.table),
        'height': main.table['height'],
        'width': main.table['width'],
        'geometry': shapes,
    }
    rows = pd.DataFrame(columns, index=main.table.index)
    integers = dict.fromkeys([*KEY[1:], 'epsg', 'height', 'width'], np.int64)
    return rows.astype({**integers, 's1_date': 'datetime64[s]', 's2_date': 'datetime64[s]'})


class _Side:
    """The files of one sensor in the order of the pairs."""

    def __init__(self, scenes: pd.DataFrame, rows: np.ndarray[tuple[int], np.dtype[np.int64]]):
        self.is_there = bool((rows >= 0).all())
        self.table = scenes.take(rows if self.is_there else rows[:0]).reset_index(drop=True)

    def column(self, name: str, missing: object) -> object:
        """A column, or what says that the sensor is not there."""
        return self.table[name] if self.is_there else missing


def _apart(
    s1: pd.DataFrame, s2: pd.DataFrame, shapes: np.ndarray[tuple[int], np.dtype[np.object_]]
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether the files of each pair show different ground."""
    a, b = s1[GRID].to_numpy(float), s2[GRID].to_numpy(float)
    # By rounding alone the corners of files on one grid differ, far less than by a pixel.
    pixel = np.abs(b[:, [1, 2, 4, 5]]).max(axis=1, keepdims=True)
    other = (np.abs(a - b) > ALIGNMENT_TOLERANCE * pixel).any(axis=1)
    other |= (a[:, [0, 7, 8]] != b[:, [0, 7, 8]]).any(axis=1)
    apart = np.zeros(len(s1), bool)
    if other.any():
        apart[other] = ~shapely.intersects(footprints(s1[other]), shapes[other])
    return apart


def _transforms(table: pd.DataFrame) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
    """Affine coefficients of each row."""
    tuples = np.empty(len(table), dtype=object)
    tuples[:] = list(zip(*(table[name].tolist() for name in AFFINE), strict=True))
    return tuples
