"""All that reading needs to know of half a million pairs, in arrays that processes share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyproj
import shapely
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm.datasets.catalogue.footprints import (
    SEARCH_CRS,
    corners,
    outlines,
    shapes_on_ground,
)
from geofm.datasets.catalogue.path_list import PathList
from geofm.datasets.catalogue.scan import Reason, Skipped
from geofm.datasets.catalogue.scenes import NO_DAY, Grids, Rows, Scenes, read_grids
from geofm.datasets.catalogue.shared_array import SharedArray
from geofm.grid import ALIGNMENT_TOLERANCE, Grid
from geofm.lonlat import near

#: A pair. The grid is that of S2, if there is one; files are numbers of a list of paths; overlap is
#: the fraction of the grid that the S1 file covers, 1 for a single sensor.
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
        ('overlap', np.float32),
    ],
    align=True,
)

#: Least fraction of a pair's grid that its S1 file must cover, unless told otherwise.
MIN_OVERLAP = 0.5

#: What a pair shows, but for the date.
PLACE = ('season', 'roi', 'patch')

#: Number of a file that a pair has not.
_NONE = -1

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
        for name in ('roi', 'patch', 'time_step', 'epsg', 'height', 'width', 'overlap'):
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
            See :func:`geofm.datasets.catalogue.footprints.corners`.
        """
        return _corners(self.records[rows], crs)

    def spans(self, rows: Rows | slice) -> tuple[Any, Any]:
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
            unknown = last == NO_DAY
            for edge, day in zip((first, last), self._period, strict=True):
                edge[unknown] = np.datetime64(day, 'D').astype(np.int64)
        start, stop = (edge.astype('datetime64[D]') for edge in (first, last))
        # A date means the whole day, to its last microsecond, as in TorchGeo.
        whole = np.timedelta64(86_400_000_000 - 1, 'us')
        return start.astype('datetime64[us]'), stop.astype('datetime64[us]') + whole

    def partial_overlap(self) -> str | None:
        """Describe the pairs whose S1 file does not cover all of the grid.

        Returns:
            Their number, and the least overlap with the file that has it; None if there are none.
        """
        overlap = self.records['overlap']
        partial = np.flatnonzero(overlap < 1)
        if not len(partial):
            return None
        least = int(partial[np.argmin(overlap[partial])])
        return (
            f'{len(partial)} of {len(self)} pairs: S1 covers only a part of the S2 patch, pixels '
            f'elsewhere are not valid (least: {overlap[least]:.1%}, {self.path(least, "s1")})'
        )

    def frame(self, crs: pyproj.CRS) -> gpd.GeoDataFrame:
        """The pairs as TorchGeo's samplers want them.

        Args:
            crs: CRS of the geometries.

        Returns:
            One row a pair: ``s1`` and ``s2`` (paths, missing for a sensor that the pair has not),
            ``season``, ``roi``, ``patch``, ``time_step``, ``s1_date`` and ``s2_date``; ``epsg``,
            ``transform`` (a, b, c, d, e, f), ``height`` and ``width`` of the grid; ``overlap``, the
            fraction of the grid that the S1 file covers; the outline of the grid in *crs*; and as
            index the interval in which both were taken.
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
            'overlap': records['overlap'].astype(np.float64),
            # Samplers of TorchGeo draw from the bounds of each, so that none may be cut in two.
            'geometry': shapes_on_ground(self.corners(every, crs), crs, cut=False),
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
        dates[days == NO_DAY] = np.datetime64('NaT', 's')
        return dates


class Draft(NamedTuple):
    """Pairs whose grids are not known yet.

    Attributes:
        records: The pairs, of type :data:`PAIR`.
        paths: Paths of the files.
        seasons: Names of the seasons.
        grids: Reads the grids of the files.
    """

    records: npt.NDArray[np.void]
    paths: PathList
    seasons: Sequence[str]
    grids: Callable[[], Iterator[Grids]]

    @classmethod
    def of(cls, scenes: Scenes, files: Mapping[str, Rows]) -> 'Draft':
        """Note what names say of pairs.

        Args:
            scenes: The files.
            files: Numbers of the files of each pair, by sensor.

        Returns:
            The pairs. The files need not be kept, which take as much memory as these.
        """
        # S2, where there is one, says what a pair shows.
        main = files[max(files)]
        records = np.zeros(len(main), PAIR)
        for name in ('season', 'roi', 'patch', 'time_step'):
            records[name] = getattr(scenes, name)[main]
        for sensor in ('s1', 's2'):
            records[sensor] = files.get(sensor, _NONE)
            records[f'{sensor}_day'] = scenes.day[files[sensor]] if sensor in files else NO_DAY
        return cls(records, scenes.paths, scenes.seasons, partial(read_grids, scenes.sources))

    def complete(
        self, skipped: Skipped, period: Period | None = None, min_overlap: float = MIN_OVERLAP
    ) -> PairTable:
        """Read where pairs lie.

        Args:
            skipped: Takes the S1 of each pair whose files share too little ground.
            period: First and last day of pairs without dates.
            min_overlap: Least fraction of the S2 grid that the S1 file must cover, 0 to 1. A pair
                without any common ground is left out even for 0.

        Returns:
            The other pairs.
        """
        records = self.records
        records['overlap'] = 1
        has_s1, has_s2 = ((records[sensor] != _NONE).any() for sensor in ('s1', 's2'))
        for rows, grids in self._by_file('s2' if has_s2 else 's1'):
            records['epsg'][rows] = grids.epsg
            records['transform'][rows] = grids.transform
            records['height'][rows], records['width'][rows] = grids.shape.T
        if has_s1 and has_s2:
            # Read once more rather than kept, which would take as much memory as the table.
            for rows, grids in self._by_file('s1'):
                records['overlap'][rows] = overlaps(grids, records[rows])
            # Moved by exactly half a patch is an overlap of a half, whatever the rounding.
            gone = (records['overlap'] < min_overlap - 1e-5) | (records['overlap'] == 0)
            if gone.any():
                skipped.add(Reason.APART, *self.paths.take(records['s1'][gone]))
                records = records[~gone]
        return PairTable(records, self.paths, self.seasons, period)

    def _by_file(self, sensor: str) -> Iterator[tuple[Rows, Grids]]:
        """Numbers of some pairs and the grids of their files, until all pairs had their turn."""
        files = np.ascontiguousarray(self.records[sensor])
        order = np.argsort(files, kind='stable').astype(np.int32)
        for first, epsg, transform, shape in self.grids():
            bounds = np.searchsorted(files, [first, first + len(epsg)], sorter=order)
            rows = order[slice(*bounds)]
            here = files[rows] - first
            yield rows, Grids(first, epsg[here], transform[here], shape[here])


def check_overlap(min_overlap: float) -> float:
    """Check a least overlap.

    Args:
        min_overlap: Fraction of a pair's grid.

    Returns:
        The fraction.

    Raises:
        ValueError: If it is not from 0 to 1.
    """
    if not 0 <= min_overlap <= 1:
        raise ValueError(f'min_overlap must be from 0 to 1, not {min_overlap}')
    return min_overlap


def overlaps(grids: Grids, pairs: npt.NDArray[np.void]) -> npt.NDArray[np.float32]:
    """Fraction of each pair's grid that a file covers.

    Args:
        grids: Grids of the files, one per pair.
        pairs: The pairs, of type :data:`PAIR`.

    Returns:
        Fractions from 0 to 1, shape (N,); exactly 1 where the file has the grid of the pair.
    """
    covered = np.ones(len(pairs), np.float32)
    shape = np.stack((pairs['height'], pairs['width']), axis=1)
    # On one grid corners differ by rounding alone, which is far less than a pixel.
    tolerance = ALIGNMENT_TOLERANCE * pixel_size(pairs['transform'])[:, None]
    other = (np.abs(grids.transform - pairs['transform']) > tolerance).any(axis=1)
    other |= (grids.epsg != pairs['epsg']) | (grids.shape != shape).any(axis=1)
    for epsg in np.unique(pairs['epsg'][other]):
        rows = np.flatnonzero(other & (pairs['epsg'] == epsg))
        crs = pyproj.CRS(int(epsg))
        points = corners(grids.epsg[rows], grids.transform[rows], grids.shape[rows], crs)
        if crs.is_geographic:
            # Longitudes of the grid may run on beyond 180 degrees.
            points[..., 0] = near(points[..., 0], pairs['transform'][rows, 2, None])
        covered[rows] = _covered(points, pairs['transform'][rows], shape[rows])
    return covered


def pixel_size(transform: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Side of a pixel, the longer one if it is not square.

    Args:
        transform: Affine coefficients a to f, shape (N, 6).

    Returns:
        Sides in units of the CRS, shape (N,), whatever the orientation of the grid.
    """
    a, b, _, d, e, _ = np.moveaxis(transform, -1, 0)
    return np.maximum(np.hypot(a, d), np.hypot(b, e))


def _covered(
    points: npt.NDArray[np.float64],
    transform: npt.NDArray[np.float64],
    shape: npt.NDArray[np.int32],
) -> npt.NDArray[np.float64]:
    """Fraction of grids (N) inside quadrilaterals whose corners (N, 4, 2) are in their CRS."""
    # In pixels of the grid: numbers are small, and the grid is an upright box.
    a, b, c, d, e, f = (transform[:, i, None] for i in range(6))
    x, y = points[..., 0] - c, points[..., 1] - f
    with np.errstate(invalid='ignore'):
        pixels = np.stack((e * x - b * y, a * y - d * x), axis=-1) / (a * e - b * d)[..., None]
    quads = outlines(pixels)
    valid = shapely.make_valid(quads)
    height, width = shape.T
    common = shapely.area(shapely.intersection(valid, shapely.box(0, 0, width, height)))
    # No outline: a corner lies nowhere in the CRS of the grid.
    return np.nan_to_num(common / (height * width)).clip(0, 1)


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
