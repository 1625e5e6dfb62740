"""Find the scenes of a dataset: in folders, a catalogue, single files, or a list of pairs."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from geofm.datasets.catalogue.catalogue import open_catalogue, open_file, scan_files
from geofm.datasets.catalogue.inspection import Problem
from geofm.datasets.catalogue.scenes import NO_DAY, SENSOR_NUMBERS, Rows, Scenes
from geofm.datasets.pairs.skipped import Reason, Skipped
from geofm.printing import warn

type AnyPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Listing:
    """Files, and the pairs among them if these are given by a list.

    Attributes:
        scenes: The files.
        pairs: Indices of the files of each pair, by sensor; None if the pairs are not given.
    """

    scenes: Scenes
    pairs: dict[str, Rows] | None = None

    def rows(self, dated: bool) -> Rows:
        """Select the files of one data set.

        Args:
            dated: True for SEN12MS-CR-TS, whose file names have a date; False for SEN12MS-CR.

        Returns:
            Indices of the files, including files with problems.
        """
        scenes = self.scenes
        named = (scenes.sensor >= 0) & ((scenes.day != NO_DAY) == dated)
        return np.flatnonzero(named).astype(np.int32)

    def record_problems(self, rows: Rows, skipped: Skipped) -> None:
        """Record the files that must not be used.

        Args:
            rows: Indices of the requested files.
            skipped: Receives the files with problems, and the files whose names cannot be parsed.
        """
        scenes = self.scenes
        wanted: npt.NDArray[np.bool_] = scenes.sensor < 0
        wanted[rows] = True
        wanted &= scenes.problem >= 0
        for number, problem in enumerate(scenes.problems):
            files = np.flatnonzero(wanted & (scenes.problem == number))
            if len(files):
                skipped.add(_REASONS.get(problem, Reason.BAD), *scenes.paths.take(files))


# All other problems count as BAD. The table that ``geofm index`` prints distinguishes them.
_REASONS = {str(reason): reason for reason in Reason} | {str(Problem.NAME): Reason.NAME}


def list_scenes(paths: AnyPath | Iterable[AnyPath], catalogue: AnyPath | None = None) -> Listing:
    """Find the scenes of a dataset.

    Args:
        paths: Folders or files; or the path of a list of pairs (``.json``) or of a catalogue
            (``.parquet``).
        catalogue: Catalogue of *paths*, which must be one folder, if it is not at one of the
            default locations.

    Returns:
        The scenes.

    Raises:
        ValueError: If a list of pairs or a catalogue cannot be used.
    """
    if not isinstance(paths, str | os.PathLike):
        paths = list(paths)
        if len(paths) == 1:
            return list_scenes(paths[0], catalogue)
    if catalogue is not None:
        if not isinstance(paths, str | os.PathLike) or not Path(paths).is_dir():
            raise ValueError(f'catalogue {catalogue} needs one folder as paths, not {paths}')
        return Listing(Scenes.read([open_file(Path(catalogue), Path(paths))]))
    if isinstance(paths, str | os.PathLike):
        if os.fspath(paths).endswith('.json'):
            return _read_pairs(Path(paths))
        if os.fspath(paths).endswith('.parquet'):
            return Listing(Scenes.read([open_file(Path(paths))]))
        paths = [paths]
    roots = [Path(path) for path in paths]
    sources = [open_catalogue(root) for root in roots if root.is_dir()]
    files = [str(path) for path in roots if not path.is_dir()]
    for missing in (file for file in files if not os.path.lexists(file)):
        warn(f'{missing}: no such file or folder')
    there = sorted({file for file in files if os.path.lexists(file)})
    return Listing(Scenes.read([*sources, scan_files(there)] if there else sources))


def _read_pairs(file: Path) -> Listing:
    """Read the scenes of a list of pairs."""
    try:
        content = json.loads(file.read_text())
        pairs = [(str(s1), str(s2)) for s1, s2 in content]
    except (OSError, ValueError, TypeError) as err:
        raise ValueError(f'{file}: not a list [[s1, s2], ...] of paths ({err})') from err
    # Paths are relative to the list, so that list and data can be moved together.
    numbers: dict[str, int] = {}
    rows = [
        [numbers.setdefault(str(file.parent / p), len(numbers)) for p in pair] for pair in pairs
    ]
    listing = Listing(Scenes.read([scan_files(list(numbers))]))
    s1, s2 = np.array(rows, np.intp).reshape(-1, 2).T
    scenes = listing.scenes
    found = dict(zip(SENSOR_NUMBERS, (s1, s2), strict=True))
    for sensor, files in found.items():
        wrong = np.flatnonzero(scenes.sensor[files] != SENSOR_NUMBERS[sensor])
        if len(wrong):
            path = pairs[int(wrong[0])][SENSOR_NUMBERS[sensor]]
            raise ValueError(f'{file}: {path} is not named like an {sensor} scene')
    keys = scenes.keys(s2)
    order = np.argsort(keys, kind='stable')
    again = np.flatnonzero(np.diff(keys[order]) == 0)
    if len(again):
        path = scenes.paths[int(s2[order[again[0] + 1]])]
        raise ValueError(f'{file}: {path} is listed twice')
    return Listing(scenes, {sensor: files[order] for sensor, files in found.items()})


def without_problems(scenes: Scenes, pairs: dict[str, Rows]) -> dict[str, Rows]:
    """Select the pairs without a file that has problems.

    Args:
        scenes: The files.
        pairs: Indices of the files of each pair, by sensor.

    Returns:
        The remaining pairs.
    """
    kept = np.logical_and.reduce([scenes.problem[rows] < 0 for rows in pairs.values()])
    return {sensor: rows[kept] for sensor, rows in pairs.items()}
