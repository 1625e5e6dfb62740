"""From the files of a SEN12MS-CR-TS tree to a table of S1/S2 pairs."""

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from enum import StrEnum
from pathlib import PurePath
from typing import NamedTuple, Self

import pandas as pd
import rasterio
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rich.progress import track

from geofm.datasets.regions import Roi
from geofm.grid import Grid
from geofm.sensors import SENSORS

#: Geometries of all pairs are searched in this CRS, that of the real data set.
SEARCH_CRS = CRS.from_epsg(4326)

#: Number of pairs from which reading the headers takes seconds, so that progress is shown.
PROGRESS_FROM = 2000

#: Types of pixels that a sensor's files may have: dB are floats, DN integers.
DTYPES = {
    's1': ('float32', 'float64'),
    's2': ('uint16', 'int16', 'uint32', 'int32'),
}

#: Opening a file is mostly waiting for the file system.
SCAN_THREADS = 8

_SCENE_NAME = re.compile(
    r'(?P<sensor>s1|s2)_(?P<season>ROIs\d{4})_(?P<roi>\d+)_ImgNo_(?P<time_step>\d+)'
    r'_(?P<date>\d{4}-\d{2}-\d{2})_patch_(?P<patch>\d+)\.tif',
    re.ASCII,
)

# Land-cover maps share the tree but are no scenes.
_LAND_COVER_PREFIX = 'lc_'


class PairKey(NamedTuple):
    """What the S1 and the S2 file of a pair have in common; keys sort as the pairs do.

    Attributes:
        season: Season folder, e.g. ``'ROIs2017'``.
        roi: Number of the ROI.
        patch: Number of the patch in the ROI.
        time_step: Number of the time step, 0 to 29 in the real data set.
    """

    season: str
    roi: int
    patch: int
    time_step: int


@dataclass(frozen=True, slots=True)
class SceneName:
    """What the name of a file says.

    Attributes:
        sensor: ``'s1'`` or ``'s2'``.
        key: Place and time step.
        date: Day of acquisition.
    """

    sensor: str
    key: PairKey
    date: date

    @classmethod
    def parse(cls, path: str | os.PathLike[str]) -> Self | None:
        """Read a file's name; its folders say nothing that the name does not.

        Args:
            path: Path of the file.

        Returns:
            What the name says, or None if it is not the name of an S1 or S2 patch.
        """
        match = _SCENE_NAME.fullmatch(PurePath(path).name)
        if match is None:
            return None
        try:
            day = date.fromisoformat(match['date'])
        except ValueError:
            return None
        numbers = (int(match[name]) for name in ('roi', 'patch', 'time_step'))
        return cls(match['sensor'], PairKey(match['season'], *numbers), day)

    @property
    def filename(self) -> str:
        """The name itself, e.g. ``s1_ROIs2017_32_ImgNo_4_2018-02-28_patch_12.tif``."""
        season, roi, patch, time_step = self.key
        return f'{self.sensor}_{season}_{roi}_ImgNo_{time_step}_{self.date}_patch_{patch}.tif'

    @property
    def folder(self) -> str:
        """Folder of the file below the root of the tree, e.g. ``ROIs2017/32/S1/4``."""
        season, roi, _, time_step = self.key
        return f'{season}/{roi}/{self.sensor.upper()}/{time_step}'


class Reason(StrEnum):
    """Why files are left out of the pairs."""

    NAME = 'not named like a scene of SEN12MS-CR-TS'
    ONLY_S1 = 'S1 without S2'
    ONLY_S2 = 'S2 without S1'
    AMBIGUOUS = 'another file has the same sensor, ROI, patch and time step'
    UNREADABLE = 'not readable as a raster'
    BAND_COUNT = 'wrong number of bands'
    NO_EPSG = 'no CRS with an EPSG code'
    DTYPE = 'wrong type of pixels'
    APART = 'S1 and S2 do not overlap on the ground'
    BAD = 'marked as bad in the catalogue'


@dataclass
class Skipped:
    """Files that were left out, by reason.

    Attributes:
        files: Paths for each reason that occurred. One file stands for a pair that is left out
            because of that file.
    """

    files: dict[Reason, list[str]] = field(default_factory=dict)

    def add(self, reason: Reason, *paths: str) -> None:
        """Note files that are left out.

        Args:
            reason: Why.
            *paths: The files.
        """
        self.files.setdefault(reason, []).extend(paths)

    def __len__(self) -> int:
        """Number of files noted."""
        return sum(len(paths) for paths in self.files.values())

    def count(self, *reasons: Reason) -> int:
        """Number of files left out for any of the reasons.

        Args:
            *reasons: The reasons.

        Returns:
            The number of files.
        """
        return sum(len(self.files.get(reason, ())) for reason in reasons)

    def __str__(self) -> str:
        """Counts and the first example of each reason."""
        return '; '.join(
            f'{len(paths)} {reason} (first: {paths[0]})' for reason, paths in self.files.items()
        )

    def warn(self) -> None:
        """Report what was left out in one warning, if anything was."""
        if self.files:
            warnings.warn(f'files left out: {self}', UserWarning, stacklevel=4)


@dataclass(frozen=True, slots=True)
class Scene:
    """A file and the day it shows.

    Attributes:
        path: Path of the file.
        date: Day of acquisition.
    """

    path: str
    date: date


#: Scenes of a pair by sensor, ``'s1'`` and ``'s2'``.
type Pair = Mapping[str, Scene]


def match_pairs(files: Iterable[str], skipped: Skipped) -> dict[PairKey, dict[str, list[Scene]]]:
    """Group files by what their names say.

    Args:
        files: Paths, in any order.
        skipped: Takes the files that are not named like scenes.

    Returns:
        For each key the scenes of each sensor. A file reached by two paths counts once.
    """
    found: dict[PairKey, dict[str, dict[str, Scene]]] = defaultdict(lambda: {'s1': {}, 's2': {}})
    for path in sorted(files):
        name = SceneName.parse(path)
        if name is not None:
            found[name.key][name.sensor].setdefault(os.path.realpath(path), Scene(path, name.date))
        elif not PurePath(path).name.startswith(_LAND_COVER_PREFIX):
            skipped.add(Reason.NAME, path)
    return {
        key: {sensor: list(scenes.values()) for sensor, scenes in sensors.items()}
        for key, sensors in found.items()
    }


def rois_of(keys: Iterable[PairKey]) -> list[Roi]:
    """ROIs that occur in keys.

    Args:
        keys: Keys of pairs.

    Returns:
        The ROIs, sorted, each once.
    """
    return sorted({(key.season, key.roi) for key in keys})


def complete_pairs(
    candidates: Mapping[PairKey, Mapping[str, list[Scene]]], skipped: Skipped
) -> dict[PairKey, Pair]:
    """Keep the keys that have exactly one scene of each sensor.

    Args:
        candidates: Scenes of each sensor for each key.
        skipped: Takes the files of the other keys.

    Returns:
        The pairs, sorted by key.
    """
    pairs: dict[PairKey, Pair] = {}
    for key, sensors in sorted(candidates.items()):
        s1, s2 = sensors['s1'], sensors['s2']
        if len(s1) > 1 or len(s2) > 1:
            # Which of them is meant is not ours to guess.
            skipped.add(Reason.AMBIGUOUS, *(scene.path for scene in s1 + s2))
        elif not s2:
            skipped.add(Reason.ONLY_S1, s1[0].path)
        elif not s1:
            skipped.add(Reason.ONLY_S2, s2[0].path)
        else:
            pairs[key] = {'s1': s1[0], 's2': s2[0]}
    return pairs


class _LeftOutError(Exception):
    """A pair cannot be used: the reason and the file."""


def _read_header(sensor: str, path: str) -> tuple[Grid, int]:
    """Grid and EPSG code of a file, or an error that says why it cannot be used."""
    try:
        with rasterio.open(path) as src:
            if src.count != len(SENSORS[sensor].bands):
                raise _LeftOutError(Reason.BAND_COUNT, path)
            if not set(src.dtypes) <= set(DTYPES[sensor]):
                raise _LeftOutError(Reason.DTYPE, path)
            epsg = src.crs.to_epsg() if src.crs else None
            if epsg is None:
                raise _LeftOutError(Reason.NO_EPSG, path)
            return Grid.of(src), epsg
    except RasterioError as err:
        raise _LeftOutError(Reason.UNREADABLE, path) from err


def _describe(key: PairKey, pair: Pair) -> dict[str, object]:
    """Row of the table of pairs."""
    headers = {sensor: _read_header(sensor, scene.path) for sensor, scene in pair.items()}
    # S2, where there is one, gives the grid.
    grid, epsg = headers[max(headers)]
    footprint = grid.footprint(SEARCH_CRS)
    if any(
        other != grid and not footprint.intersects(other.footprint(SEARCH_CRS))
        for other, _ in headers.values()
    ):
        raise _LeftOutError(Reason.APART, pair['s1'].path)
    return {
        's1': pair['s1'].path if 's1' in pair else None,
        's2': pair['s2'].path if 's2' in pair else None,
        **key._asdict(),
        's1_date': pd.Timestamp(pair['s1'].date) if 's1' in pair else pd.NaT,
        's2_date': pd.Timestamp(pair['s2'].date) if 's2' in pair else pd.NaT,
        'epsg': epsg,
        'transform': tuple(grid.transform)[:6],
        'height': grid.height,
        'width': grid.width,
        'geometry': footprint,
    }


def scan_headers(pairs: Mapping[PairKey, Pair], skipped: Skipped) -> pd.DataFrame:
    """Open each file once and describe the pairs.

    Args:
        pairs: The pairs, in the order of the rows to return.
        skipped: Takes the files that make a pair unusable: unreadable, with a wrong number of
            or type of bands, without an EPSG code, or with S1 and S2 of different ground.

    Returns:
        One row a pair: ``s1`` and ``s2`` (paths, missing for a sensor that the pair has not),
        ``season``, ``roi``, ``patch``, ``time_step``,
        ``s1_date`` and ``s2_date``; of the S2 file ``epsg``, ``transform`` (a, b, c, d, e, f),
        ``height``, ``width`` and ``geometry`` (outline in EPSG:4326).
    """

    def describe(item: tuple[PairKey, Pair]) -> dict[str, object] | _LeftOutError:
        try:
            return _describe(*item)
        except _LeftOutError as err:
            return err

    rows = []
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        results = track(
            pool.map(describe, pairs.items()),
            description='Reading headers',
            total=len(pairs),
            disable=len(pairs) < PROGRESS_FROM,
        )
        for result in results:
            if isinstance(result, _LeftOutError):
                skipped.add(*result.args)
            else:
                rows.append(result)
    return pd.DataFrame(rows)
