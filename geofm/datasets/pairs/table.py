"""Table of pairs, in arrays that worker processes share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyproj
import shapely
from rasterio.transform import Affine

from geofm.datasets.catalogue.scenes import (
    NO_DAY,
    SENSOR_NUMBERS,
    Grids,
    Rows,
    Scenes,
    read_grids,
)
from geofm.datasets.footprints import corners, outlines, shapes_on_ground
from geofm.datasets.memory.path_list import PathList
from geofm.datasets.memory.shared_array import SharedArray
from geofm.datasets.pairs.matches import Extent, MatchTable, crs_of
from geofm.datasets.pairs.skipped import Reason, Skipped
from geofm.grid import ALIGNMENT_TOLERANCE, Grid
from geofm.lonlat import near


def record_type(sensors: int) -> np.dtype[np.void]:
    """Return the data type of the records of a table.

    Args:
        sensors: Number of sensors, S.

    Returns:
        A structured type with the grid of the reference file (``transform``, ``epsg``, ``height``,
        ``width``); the content of the file names (``season``, ``roi``, ``patch``, ``time_step``);
        for each sensor the index of its file in a list of paths (``file``) and its day (``day``),
        shape (S,); and ``overlap``, the smallest fraction of the grid that a file of another sensor
        covers (1 for a single sensor).
    """
    return np.dtype(
        [
            ('transform', np.float64, 6),
            ('season', np.int32),
            ('roi', np.int32),
            ('patch', np.int32),
            ('time_step', np.int32),
            ('file', np.int32, (sensors,)),
            ('day', np.int32, (sensors,)),
            ('epsg', np.int32),
            ('height', np.int32),
            ('width', np.int32),
            ('overlap', np.float32),
        ],
        align=True,
    )


#: Type of the records of SEN12MS-CR-TS and SEN12MS-CR.
PAIR = record_type(len(SENSOR_NUMBERS))

#: Default of the smallest fraction of the grid of a match that a file must cover.
MIN_OVERLAP = 0.5

#: Fields that identify the place of a pair.
PLACE = ('season', 'roi', 'patch')

#: Index of a missing file.
_NONE = -1

#: First and last day of pairs whose file names have no date.
Period = tuple[str, str]


class PairTable(MatchTable):
    """Table of pairs of files.

    Attributes:
        sensors: Keys of the sensors.
        reference: The sensor on whose grids pairs are read.
        seasons: Names of the seasons.
    """

    def __init__(
        self,
        records: npt.NDArray[np.void],
        paths: PathList,
        seasons: Sequence[str],
        period: Period | None = None,
        sensors: Sequence[str] = tuple(SENSOR_NUMBERS),
        reference: str | None = None,
    ) -> None:
        """Initialize a new PairTable instance.

        Args:
            records: The pairs, of type :func:`record_type`. Pairs of one place must be adjacent.
            paths: Paths of the files.
            seasons: Names of the seasons.
            period: First and last day of pairs without dates.
            sensors: Keys of the sensors, one per file of a pair.
            reference: The sensor on whose grid each pair is read. Default: the last one.
        """
        self._records = SharedArray(records)
        self._paths = paths
        self.seasons = tuple(seasons)
        self._period = period
        self.sensors = tuple(sensors)
        self.reference = self.sensors[-1] if reference is None else reference

    def select(self, frame: gpd.GeoDataFrame) -> 'PairTable':
        """Make a table from rows of an index.

        Args:
            frame: Rows of :meth:`frame`, in any order and possibly repeated.

        Returns:
            The pairs.
        """
        records = np.zeros(len(frame), self.records.dtype)
        season, seasons = pd.factorize(frame['season'], sort=True)
        records['season'] = season
        for name in ('roi', 'patch', 'time_step', 'epsg', 'height', 'width', 'overlap'):
            records[name] = frame[name].to_numpy()
        records['transform'] = np.array(frame['transform'].tolist(), float).reshape(-1, 6)
        paths: list[str] = []
        for i, sensor in enumerate(self.sensors):
            there = frame[sensor].notna().to_numpy()
            records['file'][:, i] = _NONE
            records['file'][there, i] = len(paths) + np.arange(there.sum())
            paths += frame[sensor][there].tolist()
            days = frame[f'{sensor}_date'].to_numpy('datetime64[D]')
            known = np.where(np.isnat(days), np.datetime64(0, 'D'), days).astype(np.int64)
            records['day'][:, i] = np.where(np.isnat(days), NO_DAY, known)
        names = [str(name) for name in seasons]
        return PairTable(
            records, PathList.of(paths), names, self._period, self.sensors, self.reference
        )

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.records)

    @property
    def records(self) -> npt.NDArray[np.void]:
        """The pairs, of type :func:`record_type`."""
        return self._records.array

    def path(self, position: int, sensor: str) -> str | None:
        """Return the path of a file.

        Args:
            position: Index of the pair.
            sensor: Key of the sensor.

        Returns:
            The path; None if the sensor is missing.
        """
        number = int(self.records[position]['file'][self.sensors.index(sensor)])
        return None if number == _NONE else self._paths[number]

    def paths(self, position: int, sensor: str) -> list[str]:
        """See :meth:`MatchTable.paths`."""
        path = self.path(position, sensor)
        return [] if path is None else [path]

    def scene(self, position: int) -> tuple[Grid, int, Extent]:
        """See :meth:`MatchTable.scene`. A pair is a whole file."""
        record = self.records[position]
        epsg, height, width = (int(record[name]) for name in ('epsg', 'height', 'width'))
        transform = Affine(*record['transform'].tolist())
        return Grid(crs_of(epsg), transform, height, width), epsg, Extent(0, 0, height, width)

    def days(self, position: int) -> npt.NDArray[np.int64]:
        """See :meth:`MatchTable.days`."""
        days = self.records[position]['day'].astype(np.int64)
        return np.where(days == NO_DAY, np.iinfo(np.int64).min, days)

    def sizes(self, rows: Rows | slice) -> npt.NDArray[np.int32]:
        """See :meth:`MatchTable.sizes`."""
        part = self.records[rows]
        return np.stack((part['height'], part['width']), axis=1)

    def corners(self, rows: Rows | slice, crs: pyproj.CRS) -> npt.NDArray[np.float64]:
        """See :meth:`MatchTable.corners`."""
        part = self.records[rows]
        return corners(part['epsg'], part['transform'], self.sizes(rows), crs)

    def spans(self, rows: Rows | slice) -> tuple[Any, Any]:
        """See :meth:`MatchTable.spans`."""
        return day_spans(self.records[rows]['day'], self._period)

    def starts(self) -> Rows:
        """See :meth:`MatchTable.starts`. Returns the first pair of each patch."""
        new = np.zeros(len(self), bool)
        new[:1] = True
        for name in PLACE:
            column = self.records[name]
            new[1:] |= column[1:] != column[:-1]
        return np.flatnonzero(new)

    def places(self) -> npt.NDArray[np.int64]:
        """See :meth:`MatchTable.places`."""
        records = self.records
        columns = pd.DataFrame({name: records[name] for name in PLACE})
        patch = columns.groupby(list(PLACE), sort=False).ngroup().to_numpy()
        grids = (records['epsg'], records['height'], records['width'])
        return number_grids(patch, records['transform'], *grids)

    def partial_overlap(self) -> str | None:
        """Describe the pairs in which a file covers only a part of the grid.

        Returns:
            Text with their number, the smallest overlap and its file; None if there are no such
            pairs.
        """
        overlap = self.records['overlap']
        partial = np.flatnonzero(overlap < 1)
        if not len(partial):
            return None
        least = int(partial[np.argmin(overlap[partial])])
        others = [sensor for sensor in self.sensors if sensor != self.reference]
        return (
            f'{len(partial)} of {len(self)} pairs: {" or ".join(others).upper()} covers only '
            f'part of the {self.reference.upper()} patch, other pixels are not valid (smallest: '
            f'{overlap[least]:.1%}, {self.path(least, others[0])})'
        )

    def frame(self, crs: pyproj.CRS) -> gpd.GeoDataFrame:
        """Return the pairs as the index of a GeoDataset.

        Args:
            crs: CRS of the geometries.

        Returns:
            One row per pair. The columns are the path for each sensor, named like the sensor
            (missing if the pair lacks it); ``season``, ``roi``, ``patch`` and ``time_step``; the
            day of each sensor (``s1_date`` and so on); ``epsg``, ``transform`` (a, b, c, d, e, f),
            ``height`` and ``width`` of the grid; ``overlap``, the fraction of the grid that the
            files of the other sensors cover; and the outline of the grid in *crs*. The index is the
            time interval of all files.
        """
        records, every = self.records, slice(None)
        transforms = np.empty(len(self), dtype=object)
        transforms[:] = list(map(tuple, records['transform'].tolist()))
        columns = {
            **{sensor: self._column(sensor) for sensor in self.sensors},
            'season': np.array(self.seasons, object)[records['season']].astype(str),
            **{name: records[name].astype(np.int64) for name in ('roi', 'patch', 'time_step')},
            **{
                f'{sensor}_date': as_dates(records['day'][:, i])
                for i, sensor in enumerate(self.sensors)
            },
            'epsg': records['epsg'].astype(np.int64),
            'transform': transforms,
            **{name: records[name].astype(np.int64) for name in ('height', 'width')},
            'overlap': records['overlap'].astype(np.float64),
            # TorchGeo's samplers draw from the bounds of each outline, so outlines must not be cut
            # in two.
            'geometry': shapes_on_ground(self.corners(every, crs), crs, cut=False),
        }
        intervals = as_intervals(*self.spans(every))
        return gpd.GeoDataFrame(columns, index=intervals, geometry='geometry', crs=crs)

    def _column(self, sensor: str) -> Any:
        """Return the paths of a sensor."""
        numbers = self.records['file'][:, self.sensors.index(sensor)]
        if not (numbers == _NONE).any():
            return pd.array(self._paths.take(numbers), dtype='str')
        return [self.path(i, sensor) for i in range(len(self))]


def day_spans(days: npt.NDArray[np.int32], period: Period | None) -> tuple[Any, Any]:
    """Return the time spans of matches.

    Args:
        days: Day of each observation, :data:`NO_DAY` where unknown, shape (N, S).
        period: First and last day of matches without a known day.

    Returns:
        Start of the earliest day and end of the latest day, datetime64[us].
    """
    known = days != NO_DAY
    first = np.where(known, days, np.iinfo(np.int32).max).min(axis=1).astype(np.int64)
    last = days.max(axis=1).astype(np.int64)
    if period is not None:
        unknown = last == NO_DAY
        for edge, day in zip((first, last), period, strict=True):
            edge[unknown] = np.datetime64(day, 'D').astype(np.int64)
    start, stop = (edge.astype('datetime64[D]') for edge in (first, last))
    # A date stands for the whole day up to its last microsecond, as in TorchGeo.
    whole = np.timedelta64(86_400_000_000 - 1, 'us')
    return start.astype('datetime64[us]'), stop.astype('datetime64[us]') + whole


def as_dates(days: npt.NDArray[np.int32]) -> npt.NDArray[np.datetime64]:
    """Convert days to dates.

    Args:
        days: Days since 1970-01-01, :data:`NO_DAY` where unknown.

    Returns:
        Dates, NaT where unknown.
    """
    dates = days.astype('datetime64[D]').astype('datetime64[s]')
    dates[days == NO_DAY] = np.datetime64('NaT', 's')
    return dates


def as_intervals(start: Any, stop: Any) -> pd.IntervalIndex:
    """Make the intervals of an index as in TorchGeo.

    Args:
        start: Starts, datetime64[us].
        stop: Ends, datetime64[us].

    Returns:
        Closed intervals.
    """
    left, right = pd.DatetimeIndex(start), pd.DatetimeIndex(stop)
    return pd.IntervalIndex.from_arrays(left, right, closed='both', name='datetime')


def number_grids(
    place: npt.NDArray[np.integer[Any]],
    transform: npt.NDArray[np.float64],
    *others: npt.NDArray[np.integer[Any]],
) -> npt.NDArray[np.int64]:
    """Number the places and grids of matches: equal place and grid, equal number.

    Args:
        place: Number of the place of each match, from 0 in order of first occurrence.
        transform: Affine coefficients a to f, shape (N, 6).
        *others: Further values that must be equal, such as EPSG code and size.

    Returns:
        Numbers from 0, in order of first occurrence.
    """
    first = np.unique(place, return_index=True)[1][place]
    pixel = pixel_size(transform[first])[:, None]
    # Transforms of files on one grid differ only by rounding, less than the tolerance from the
    # first.
    off = (transform - transform[first]) / pixel
    # Matches without a grid are numbered by place only.
    off = np.nan_to_num(off)
    keys = pd.DataFrame(np.round(off / ALIGNMENT_TOLERANCE / 2).astype(np.int64))
    keys['place'] = place
    for i, column in enumerate(others):
        keys[f'other {i}'] = column
    numbers = keys.groupby(list(keys.columns), sort=False).ngroup()
    return np.asarray(numbers, dtype=np.int64)


@dataclass
class Draft:
    """Pairs whose grids are not known yet.

    Attributes:
        records: The pairs, of type :func:`record_type`.
        paths: Paths of the files.
        seasons: Names of the seasons.
        grids: Function that reads the grids of the files.
    """

    records: npt.NDArray[np.void]
    paths: PathList
    seasons: Sequence[str]
    grids: Callable[[], Iterator[Grids]]

    @classmethod
    def of(cls, scenes: Scenes, files: Mapping[str, Rows]) -> 'Draft':
        """Make pairs from the content of file names.

        Args:
            scenes: The files.
            files: Indices of the files of each pair, by sensor.

        Returns:
            The pairs. They do not refer to *scenes*, so that its memory can be freed.
        """
        sensors = tuple(SENSOR_NUMBERS)
        # Season, ROI, patch and time step are those of the last sensor that a pair has.
        main = files[next(sensor for sensor in reversed(sensors) if sensor in files)]
        records = np.zeros(len(main), record_type(len(sensors)))
        for name in ('season', 'roi', 'patch', 'time_step'):
            records[name] = getattr(scenes, name)[main]
        for i, sensor in enumerate(sensors):
            records['file'][:, i] = files.get(sensor, _NONE)
            records['day'][:, i] = scenes.day[files[sensor]] if sensor in files else NO_DAY
        return cls(records, scenes.paths, scenes.seasons, partial(read_grids, scenes.sources))

    def complete(
        self, skipped: Skipped, period: Period | None = None, min_overlap: float = MIN_OVERLAP
    ) -> PairTable:
        """Read the grids of the pairs.

        Args:
            skipped: Receives the file of the other sensor of each pair that overlaps too little.
            period: First and last day of pairs without dates.
            min_overlap: Smallest fraction of the grid that the other files must cover, 0 to 1. A
                pair without common ground is left out even if this is 0.

        Returns:
            The remaining pairs.
        """
        records = self.records
        records['overlap'] = 1
        there = np.flatnonzero((records['file'] != _NONE).any(axis=0)).tolist()
        *others, reference = there or [len(SENSOR_NUMBERS) - 1]
        for rows, grids in self._by_file(reference):
            records['epsg'][rows] = grids.epsg
            records['transform'][rows] = grids.transform
            records['height'][rows], records['width'][rows] = grids.shape.T
        for sensor in others:
            # Reading the grids again takes less memory than keeping them.
            for rows, grids in self._by_file(sensor):
                covered = overlaps(grids, records[rows])
                records['overlap'][rows] = np.minimum(records['overlap'][rows], covered)
            # A shift by exactly half a patch must count as an overlap of one half despite rounding.
            gone = (records['overlap'] < min_overlap - 1e-5) | (records['overlap'] == 0)
            if gone.any():
                skipped.add(Reason.APART, *self.paths.take(records['file'][gone, sensor]))
                records = self.records = records[~gone]
        main = tuple(SENSOR_NUMBERS)[reference]
        return PairTable(records, self.paths, self.seasons, period, reference=main)

    def _by_file(self, sensor: int) -> Iterator[tuple[Rows, Grids]]:
        """Yield indices of pairs and the grids of their files, until all pairs are covered."""
        files = np.ascontiguousarray(self.records['file'][:, sensor])
        order = np.argsort(files, kind='stable').astype(np.int32)
        for first, epsg, transform, shape in self.grids():
            bounds = np.searchsorted(files, [first, first + len(epsg)], sorter=order)
            rows = order[slice(*bounds)]
            here = files[rows] - first
            yield rows, Grids(first, epsg[here], transform[here], shape[here])


def check_overlap(min_overlap: float) -> float:
    """Check the smallest overlap.

    Args:
        min_overlap: Fraction of the grid of a pair.

    Returns:
        The fraction.

    Raises:
        ValueError: If it is not from 0 to 1.
    """
    if not 0 <= min_overlap <= 1:
        raise ValueError(f'min_overlap must be from 0 to 1, not {min_overlap}')
    return min_overlap


def overlaps(grids: Grids, pairs: npt.NDArray[np.void]) -> npt.NDArray[np.float32]:
    """Compute the fraction of each pair's grid that a file covers.

    Args:
        grids: Grids of the files, one per pair.
        pairs: The pairs, of type :func:`record_type`.

    Returns:
        Fractions from 0 to 1, shape (N,). They are exactly 1 where the file has the grid of the
        pair.
    """
    covered = np.ones(len(pairs), np.float32)
    shape = np.stack((pairs['height'], pairs['width']), axis=1)
    # Corners of the same grid differ only by rounding, which is far less than a pixel.
    tolerance = ALIGNMENT_TOLERANCE * pixel_size(pairs['transform'])[:, None]
    other = (np.abs(grids.transform - pairs['transform']) > tolerance).any(axis=1)
    other |= (grids.epsg != pairs['epsg']) | (grids.shape != shape).any(axis=1)
    for epsg in np.unique(pairs['epsg'][other]):
        rows = np.flatnonzero(other & (pairs['epsg'] == epsg))
        crs = pyproj.CRS(int(epsg))
        points = corners(grids.epsg[rows], grids.transform[rows], grids.shape[rows], crs)
        if crs.is_geographic:
            # Longitudes of the grid may continue beyond 180 degrees.
            points[..., 0] = near(points[..., 0], pairs['transform'][rows, 2, None])
        covered[rows] = _covered(points, pairs['transform'][rows], shape[rows])
    return covered


def pixel_size(transform: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the side of a pixel, or the longer side if it is not square.

    Args:
        transform: Affine coefficients a to f, shape (N, 6).

    Returns:
        Sides in units of the CRS, shape (N,), for any orientation of the grid.
    """
    a, b, _, d, e, _ = np.moveaxis(transform, -1, 0)
    return np.maximum(np.hypot(a, d), np.hypot(b, e))


def _covered(
    points: npt.NDArray[np.float64],
    transform: npt.NDArray[np.float64],
    shape: npt.NDArray[np.int32],
) -> npt.NDArray[np.float64]:
    """Compute the fraction of grids (N) inside quadrilaterals (N, 4, 2) in their CRS."""
    # Use pixel coordinates, in which numbers are small and the grid is an upright box.
    a, b, c, d, e, f = (transform[:, i, None] for i in range(6))
    x, y = points[..., 0] - c, points[..., 1] - f
    with np.errstate(invalid='ignore'):
        pixels = np.stack((e * x - b * y, a * y - d * x), axis=-1) / (a * e - b * d)[..., None]
    quads = outlines(pixels)
    valid = shapely.make_valid(quads)
    height, width = shape.T
    common = shapely.area(shapely.intersection(valid, shapely.box(0, 0, width, height)))
    # NaN where a corner has no position in the CRS of the grid.
    return np.nan_to_num(common / (height * width)).clip(0, 1)
