"""All that reading needs to know of half a million pairs, in arrays that processes share."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyproj
import shapely
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm.datasets.footprints import SEARCH_CRS, corners, outlines
from geofm.datasets.pairing import Rows
from geofm.datasets.path_list import PathList
from geofm.datasets.scan import Reason, Skipped
from geofm.datasets.scenes import NO_DAY, Scenes
from geofm.datasets.shared_array import SharedArray
from geofm.grid import ALIGNMENT_TOLERANCE, Grid

#: A pair. The grid is that of S2, if there is one; files are numbers of a list of paths.
PAIR = np.dtype(
    [
        ('transform', np.float64, 6),
        ('season', np.int32),
        ('roi', np.int32),
        ('patch', np.int32),
        ('time_step', np.int32),
        ('s1', np.int32),
        ('s2', np.int32),
        ('s1_day', np.int32),
        ('s2_day', np.int32),
        ('epsg', np.int32),
        ('height', np.int32),
        ('width', np.int32),
    ],
    align=True,
)

#: What a pair shows, but for the date.
PLACE = ('season', 'roi', 'patch')

#: Where the pixels of a file lie.
_GRID = np.dtype([(name, PAIR[name]) for name in ('transform', 'epsg', 'height', 'width')])

#: Number of a file that a pair has not.
_NONE = -1

#: Pairs that are looked at together.
_AT_ONCE = 1 << 16

#: First and last day of pairs whose files do not say when they were taken.
Period = tuple[str, str]


class PairTable:
    """Pairs of files, by number.

    Attributes:
        seasons: Names of the seasons.
    """

    def __init__(
        self,
        records: npt.NDArray[np.void],
        paths: PathList,
        seasons: Sequence[str],
        period: Period | None = None,
    ) -> None:
        """Initialize a new PairTable instance.

        Args:
            records: The pairs, of type :data:`PAIR`, those of one place side by side.
            paths: Paths of the files.
            seasons: Names of the seasons.
            period: First and last day of pairs without dates.
        """
        self._records = SharedArray(records)
        self._paths = paths
        self.seasons = tuple(seasons)
        self._period = period

    @classmethod
    def of_frame(cls, frame: gpd.GeoDataFrame) -> 'PairTable':
        """Make a table of the rows of an index.

        Args:
            frame: As of :meth:`frame`, in whatever order, rows left out or repeated.

        Returns:
            The pairs.
        """
        records = np.zeros(len(frame), PAIR)
        season, seasons = pd.factorize(frame['season'], sort=True)
        records['season'] = season
        for name in ('roi', 'patch', 'time_step', 'epsg', 'height', 'width'):
            records[name] = frame[name].to_numpy()
        records['transform'] = np.array(frame['transform'].tolist(), float).reshape(-1, 6)
        paths: list[str] = []
        for sensor in ('s1', 's2'):
            there = frame[sensor].notna().to_numpy()
            records[sensor] = _NONE
            records[sensor][there] = len(paths) + np.arange(there.sum())
            paths += frame[sensor][there].tolist()
            days = frame[f'{sensor}_date'].to_numpy('datetime64[D]')
            known = np.where(np.isnat(days), np.datetime64(0, 'D'), days).astype(np.int64)
            records[f'{sensor}_day'] = np.where(np.isnat(days), NO_DAY, known)
        return cls(records, PathList.of(paths), [str(name) for name in seasons])

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.records)

    @property
    def records(self) -> npt.NDArray[np.void]:
        """The pairs, of type :data:`PAIR`."""
        return self._records.array

    def path(self, position: int, sensor: str) -> str | None:
        """Path of a file.

        Args:
            position: Number of the pair.
            sensor: ``'s1'`` or ``'s2'``.

        Returns:
            The path, None if the pair has no such file.
        """
        number = int(self.records[position][sensor])
        return None if number == _NONE else self._paths[number]

    def grid(self, position: int) -> tuple[Grid, int]:
        """Where the pixels of a pair lie.

        Args:
            position: Number of the pair.

        Returns:
            The grid, and the EPSG code of its CRS.
        """
        record = self.records[position]
        epsg = int(record['epsg'])
        transform = Affine(*record['transform'].tolist())
        return Grid(_crs(epsg), transform, int(record['height']), int(record['width'])), epsg

    def days(self, position: int) -> npt.NDArray[np.int64]:
        """Days of S1 and S2.

        Args:
            position: Number of the pair.

        Returns:
            Days since 1970-01-01, shape (2,); for a day that is not known, what NumPy makes of a
            missing date.
        """
        record = self.records[position]
        days = np.array([record['s1_day'], record['s2_day']], np.int64)
        return np.where(days == NO_DAY, np.iinfo(np.int64).min, days)

    def corners(self, rows: Rows | slice, crs: pyproj.CRS) -> npt.NDArray[np.float64]:
        """Corners of pairs.

        Args:
            rows: Numbers of the pairs.
            crs: CRS of the corners.

        Returns:
            See :func:`geofm.datasets.footprints.corners`.
        """
        return _corners(self.records[rows], crs)

    def spans(self, rows: Rows | slice) -> tuple[npt.NDArray[np.datetime64], ...]:
        """When pairs were taken.

        Args:
            rows: Numbers of the pairs.

        Returns:
            From the start of the earlier day to the end of the later one.
        """
        part = self.records[rows]
        days = np.stack((part['s1_day'], part['s2_day']))
        known = np.where(days == NO_DAY, days[::-1], days)
        first, last = known.min(axis=0).astype(np.int64), known.max(axis=0).astype(np.int64)
        if self._period is not None:
            days = (np.datetime64(day, 'D').astype(np.int64) for day in self._period)
            unknown = last == NO_DAY
            first[unknown], last[unknown] = days
        start, stop = (edge.astype('datetime64[D]') for edge in (first, last))
        # A date means the whole day, to its last microsecond, as in TorchGeo.
        whole = np.timedelta64(1, 'D') - np.timedelta64(1, 'us')
        return start.astype('datetime64[us]'), stop.astype('datetime64[us]') + whole

    def frame(self, crs: pyproj.CRS) -> gpd.GeoDataFrame:
        """The pairs as TorchGeo's samplers want them.

        Args:
            crs: CRS of the geometries.

        Returns:
            One row a pair: ``s1`` and ``s2`` (paths, missing for a sensor that the pair has not),
            ``season``, ``roi``, ``patch``, ``time_step``, ``s1_date`` and ``s2_date``; ``epsg``,
            ``transform`` (a, b, c, d, e, f), ``height`` and ``width`` of the grid; the outline of
            the grid in *crs*; and as index the interval in which both were taken.
        """
        records, every = self.records, slice(None)
        start, stop = self.spans(every)
        transforms = np.empty(len(self), dtype=object)
        transforms[:] = list(map(tuple, records['transform'].tolist()))
        columns = {
            **{sensor: self._column(sensor) for sensor in ('s1', 's2')},
            'season': np.array(self.seasons, object)[records['season']].astype(str),
            **{name: records[name].astype(np.int64) for name in ('roi', 'patch', 'time_step')},
            **{f'{sensor}_date': self._dates(sensor) for sensor in ('s1', 's2')},
            'epsg': records['epsg'].astype(np.int64),
            'transform': transforms,
            **{name: records[name].astype(np.int64) for name in ('height', 'width')},
            'geometry': outlines(self.corners(every, crs)),
        }
        intervals = pd.IntervalIndex.from_arrays(
            pd.DatetimeIndex(start), pd.DatetimeIndex(stop), closed='both', name='datetime'
        )
        return gpd.GeoDataFrame(columns, index=intervals, geometry='geometry', crs=crs)

    def _column(self, sensor: str) -> Any:
        """Paths of a sensor."""
        numbers = self.records[sensor]
        if not (numbers == _NONE).any():
            return pd.array(self._paths.take(numbers), dtype='str')
        return [self.path(i, sensor) for i in range(len(self))]

    def _dates(self, sensor: str) -> npt.NDArray[np.datetime64]:
        """Dates of a sensor, as pandas has them."""
        days = self.records[f'{sensor}_day']
        dates = days.astype('datetime64[D]').astype('datetime64[s]')
        dates[days == NO_DAY] = np.datetime64('NaT')
        return dates


def describe(
    scenes: Scenes, files: Mapping[str, Rows], skipped: Skipped, period: Period | None = None
) -> PairTable:
    """Make the table of pairs.

    Args:
        scenes: The files.
        files: Numbers of the files of each pair, by sensor.
        skipped: Takes the S1 of each pair whose files show different ground.
        period: First and last day of pairs without dates.

    Returns:
        The other pairs.
    """
    # S2, where there is one, gives the grid.
    main = files[max(files)]
    records = np.zeros(len(main), PAIR)
    for name in ('season', 'roi', 'patch', 'time_step'):
        records[name] = getattr(scenes, name)[main]
    for sensor in ('s1', 's2'):
        records[sensor] = files.get(sensor, _NONE)
        records[f'{sensor}_day'] = scenes.day[files[sensor]] if sensor in files else NO_DAY
    other = np.zeros(len(main), _GRID) if len(files) == 2 else None
    order, s1_order = np.argsort(main), np.argsort(files['s1']) if len(files) == 2 else None
    for first, epsg, transform, shape in scenes.grids():
        last = first + len(epsg)
        for rows, by, target in ((main, order, records), (files.get('s1'), s1_order, other)):
            if target is None or rows is None or by is None:
                continue
            low, high = np.searchsorted(rows, [first, last], sorter=by)
            here = by[low:high]
            target['epsg'][here] = epsg[rows[here] - first]
            target['transform'][here] = transform[rows[here] - first]
            target['height'][here], target['width'][here] = shape[rows[here] - first].T
    if other is not None:
        # Some at a time: what is compared takes as much memory as the table.
        parts = range(0, len(main), _AT_ONCE)
        apart = [_apart(other[i : i + _AT_ONCE], records[i : i + _AT_ONCE]) for i in parts]
        gone = np.concatenate([np.zeros(0, bool), *apart])
        if gone.any():
            skipped.add(Reason.APART, *scenes.paths.take(files['s1'][gone]))
            records = records[~gone]
    return PairTable(records, scenes.paths, scenes.seasons, period)


def _apart(s1: npt.NDArray[np.void], s2: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
    """Whether the files of each pair show different ground."""
    # By rounding alone the corners of files on one grid differ, far less than by a pixel.
    pixel = np.abs(s2['transform'][:, [1, 2, 4, 5]]).max(axis=1, keepdims=True)
    other = (np.abs(s1['transform'] - s2['transform']) > ALIGNMENT_TOLERANCE * pixel).any(axis=1)
    for name in ('epsg', 'height', 'width'):
        other |= s1[name] != s2[name]
    apart = np.zeros(len(s1), bool)
    if other.any():
        first, second = (outlines(_corners(part[other])) for part in (s1, s2))
        apart[other] = ~shapely.intersects(first, second)
    return apart


def _corners(
    records: npt.NDArray[np.void], crs: pyproj.CRS = SEARCH_CRS
) -> npt.NDArray[np.float64]:
    """Corners of records that have a grid."""
    shape = np.stack((records['height'], records['width']), axis=1)
    return corners(records['epsg'], records['transform'], shape, crs)


@lru_cache(maxsize=256)
def _crs(epsg: int) -> CRS:
    """CRS of an EPSG code; making one takes longer than all else about a file."""
    return CRS.from_epsg(epsg)
