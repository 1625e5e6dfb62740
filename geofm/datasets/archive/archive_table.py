"""Windows of a table of rasters and the observations that match them."""

from pathlib import Path
from typing import Any, NamedTuple, Self

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyproj
from rasterio.transform import Affine

from geofm.datasets.archive.matching import DAY
from geofm.datasets.archive.windowing import shifted
from geofm.datasets.catalogue.scenes import NO_DAY, Rows
from geofm.datasets.footprints import corners, shapes_on_ground
from geofm.datasets.memory.shared_array import SharedArray
from geofm.datasets.pairs.matches import Extent, MatchTable, crs_of
from geofm.datasets.pairs.table import as_dates, as_intervals, day_spans, number_grids
from geofm.datasets.table import NO_TIME, Observations, RasterTable
from geofm.grid import Grid
from geofm.sensors import SENSORS, date_columns

#: Interval of samples of which no date is known: as long as pandas can express.
_ANY_TIME = ('1678-01-01', '2261-12-31')

type Int32 = npt.NDArray[np.int32]


class Archive(NamedTuple):
    """A table of rasters and its observations.

    Attributes:
        table: The table.
        observations: Its rows in groups.
        main: Row of each observation whose grid it is read on.
        folder: Where the arrays of the table are mapped from; None if they are this process's own.
    """

    table: RasterTable
    observations: Observations
    main: SharedArray
    folder: Path | None = None

    @classmethod
    def of(cls, table: RasterTable) -> Self:
        """Group the rows of a table.

        Args:
            table: A scanned table.

        Returns:
            The archive.

        Raises:
            TableError: If two rows are of the same place, sensor, time and bands.
        """
        observations = Observations.of(table)
        return cls(table, observations, SharedArray(observations.main_rows(table)))


class ArchiveTable(MatchTable):
    """Windows of observations of a reference sensor, with the observations that match them.

    Attributes:
        archive: What the samples are of.
        sensors: Keys of the sensors of the columns of dates.
        matched: Keys of the sensors that are matched, in the order of :meth:`observations`.
        reference: The sensor that gives the grids, one of *matched*.
        window_size: Height and width of the windows in pixels; None for whole observations.
        n_places: Number of places, where it has been counted.
    """

    n_places: int | None = None

    def __init__(
        self,
        archive: Archive,
        matched: tuple[str, ...],
        reference: str,
        observations: Int32,
        offsets: Int32,
        overlap: npt.NDArray[np.float32],
        window_size: int | None = None,
    ) -> None:
        """Initialize a new ArchiveTable instance.

        Args:
            archive: What the samples are of.
            matched: Keys of the sensors that are matched.
            reference: The sensor that gives the grids.
            observations: Number of the observation of each sensor, -1 where there is none, (N, S).
            offsets: First row and column of each window, (N, 2).
            overlap: Least fraction of each window that the other sensors cover, (N,).
            window_size: Height and width of the windows in pixels; smaller where the observation
                is. None for whole observations.
        """
        self.archive = archive
        self.sensors = date_columns(matched)
        self.matched = matched
        self.reference = reference
        self.window_size = window_size
        self._main = matched.index(reference)
        self._observations = SharedArray(observations)
        self._offsets = SharedArray(offsets)
        self._overlap = SharedArray(overlap)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._observations.array)

    def rows_of(self, position: int, sensor: str) -> npt.NDArray[np.integer[Any]] | None:
        """Rows of the table that a sample is read from.

        Args:
            position: Number of the sample.
            sensor: Key of the sensor.

        Returns:
            Numbers of the rows; None if the sample lacks the sensor.
        """
        number = int(self._observations.array[position, self.matched.index(sensor)])
        return None if number < 0 else self.archive.observations.rows(number)

    def paths(self, position: int, sensor: str) -> list[str]:
        """As of :meth:`MatchTable.paths`."""
        rows = self.rows_of(position, sensor)
        found = [] if rows is None else [self.archive.table.path(int(row)) for row in rows]
        return list(dict.fromkeys(found))

    def scene(self, position: int) -> tuple[Grid | None, int, Extent]:
        """As of :meth:`MatchTable.scene`."""
        table = self.archive.table
        row = int(self._main_rows(position))
        epsg, height, width = int(table.epsg[row]), int(table.height[row]), int(table.width[row])
        grid = None
        if epsg > 0:
            grid = Grid(crs_of(epsg), Affine(*table.transform[row].tolist()), height, width)
        first_row, first_col = (int(v) for v in self._offsets.array[position])
        if self.window_size is not None:
            height, width = min(height, self.window_size), min(width, self.window_size)
        return grid, epsg, Extent(first_row, first_col, height, width)

    def days(self, position: int) -> npt.NDArray[np.int64]:
        """As of :meth:`MatchTable.days`; sensors that do not change have no date."""
        days = self._days(np.array([position]))[0].astype(np.int64)
        days[days == NO_DAY] = np.iinfo(np.int64).min
        every = np.full(len(self.sensors), np.iinfo(np.int64).min)
        every[[self.sensors.index(sensor) for sensor in self.matched]] = days
        return every

    def reference_observations(self) -> Int32:
        """Number of the observation of the reference sensor of each sample.

        Returns:
            Numbers, int32 (N,).
        """
        return np.ascontiguousarray(self._observations.array[:, self._main])

    def count_places(self) -> int:
        """Number of places, where an observation that names none is a place of its own."""
        if self.n_places is not None:
            return self.n_places
        place = self._places()
        lone = self.reference_observations()[place < 0]
        return len(np.unique(place[place >= 0])) + len(np.unique(lone))

    def main_rows(self) -> npt.NDArray[np.integer[Any]]:
        """Row of the table that gives the grid of each sample.

        Returns:
            Numbers of rows, (N,).
        """
        return np.asarray(self._main_rows(slice(None)))

    def scene_corners(self, scenes: Rows) -> npt.NDArray[np.float64]:
        """Corners of whole observations in longitude and latitude.

        Args:
            scenes: Numbers of the observations.

        Returns:
            See :func:`geofm.datasets.footprints.corners`.
        """
        table, rows = self.archive.table, self.archive.main.array[scenes]
        shape = np.stack((table.height[rows], table.width[rows]), axis=1).astype(np.int32)
        return corners(table.epsg[rows].astype(np.int32), table.transform[rows], shape)

    def sizes(self, rows: Rows | slice) -> npt.NDArray[np.int32]:
        """As of :meth:`MatchTable.sizes`."""
        table, main = self.archive.table, self._main_rows(rows)
        sizes = np.stack((table.height[main], table.width[main]), axis=1).astype(np.int32)
        return sizes if self.window_size is None else np.minimum(sizes, self.window_size)

    def transforms(self, rows: Rows | slice) -> npt.NDArray[np.float64]:
        """Transforms of samples.

        Args:
            rows: Numbers of the samples.

        Returns:
            Affine coefficients a to f, float64 (N, 6).
        """
        transform = self.archive.table.transform[self._main_rows(rows)]
        return shifted(transform, *self._offsets.array[rows].T)

    def epsg(self, rows: Rows | slice) -> npt.NDArray[np.int32]:
        """EPSG codes of samples.

        Args:
            rows: Numbers of the samples.

        Returns:
            Codes, -1 where there is none, (N,).
        """
        return self.archive.table.epsg[self._main_rows(rows)].astype(np.int32)

    def corners(self, rows: Rows | slice, crs: pyproj.CRS) -> npt.NDArray[np.float64]:
        """As of :meth:`MatchTable.corners`."""
        return corners(self.epsg(rows), self.transforms(rows), self.sizes(rows), crs)

    def spans(self, rows: Rows | slice) -> tuple[Any, Any]:
        """As of :meth:`MatchTable.spans`."""
        return day_spans(self._days(rows), _ANY_TIME)

    def starts(self) -> Rows:
        """As of :meth:`MatchTable.starts`: the first sample of each window of a place."""
        # A place may be on several grids, whose windows of one number are on different ground.
        keys = [self._places(), *self._offsets.array.T]
        new = np.zeros(len(self), bool)
        new[:1] = True
        for key in keys:
            new[1:] |= key[1:] != key[:-1]
        new |= self._places() < 0
        return np.flatnonzero(new)

    def places(self) -> npt.NDArray[np.int64]:
        """As of :meth:`MatchTable.places`.

        Where no place is given, it is the ground: samples on the same pixels are one place.
        """
        transform, epsg = self.transforms(slice(None)), self.epsg(slice(None))
        sizes = self.sizes(slice(None))
        place = self._places()
        corner = np.round(
            transform[:, [2, 5]] / np.hypot(transform[:, [0, 4]], transform[:, [3, 1]])
        )
        corner = np.nan_to_num(corner)
        corner[place >= 0] = 0
        keys = pd.DataFrame(
            {
                'place': place,
                'x': corner[:, 0],
                'y': corner[:, 1],
                'row': self._offsets.array[:, 0],
                'col': self._offsets.array[:, 1],
                'epsg': epsg,
            }
        )
        number = keys.groupby(list(keys.columns), sort=False).ngroup().to_numpy()
        return number_grids(number, transform, epsg, *sizes.T)

    def select(self, frame: gpd.GeoDataFrame) -> 'ArchiveTable':
        """As of :meth:`MatchTable.select`, by the column ``sample``."""
        return self.take(frame['sample'].to_numpy())

    @property
    def arrays(self) -> tuple[Int32, Int32, npt.NDArray[np.float32]]:
        """Observations, offsets and overlap of the samples, as the constructor takes them."""
        return self._observations.array, self._offsets.array, self._overlap.array

    def take(self, rows: npt.NDArray[np.integer[Any]]) -> 'ArchiveTable':
        """Choose samples.

        Args:
            rows: Their numbers.

        Returns:
            A table of those samples.
        """
        observations, offsets, overlap = (array[rows] for array in self.arrays)
        return ArchiveTable(
            self.archive,
            self.matched,
            self.reference,
            observations,
            offsets,
            overlap,
            self.window_size,
        )

    def frame(self, crs: pyproj.CRS) -> gpd.GeoDataFrame:
        """The samples as TorchGeo's samplers want them.

        Args:
            crs: CRS of the geometries.

        Returns:
            One row per sample: a column with the path for each sensor, named by its key (the first
            one of several, missing where the sample lacks the sensor), and its day
            (``KEY_date``); ``place``; ``row`` and ``col``, the first pixel of the window in the
            file of the reference sensor; ``epsg``, ``transform`` (a, b, c, d, e, f), ``height`` and
            ``width`` of the window; ``overlap``, the least fraction of it that the other sensors
            cover; ``sample``, its number; the outline in *crs*; and as index the interval in which
            all were taken.
        """
        every = slice(None)
        table, days = self.archive.table, self._days(every)
        transforms = np.empty(len(self), dtype=object)
        transforms[:] = list(map(tuple, self.transforms(every).tolist()))
        places = [None if p < 0 else table.places[p] for p in self._places().tolist()]
        sizes = self.sizes(every)
        columns: dict[str, Any] = {
            **{sensor: self._first_paths(i) for i, sensor in enumerate(self.matched)},
            **{f'{sensor}_date': as_dates(days[:, i]) for i, sensor in enumerate(self.matched)},
            'place': places,
            'row': self._offsets.array[:, 0].astype(np.int64),
            'col': self._offsets.array[:, 1].astype(np.int64),
            'epsg': self.epsg(every).astype(np.int64),
            'transform': transforms,
            'height': sizes[:, 0].astype(np.int64),
            'width': sizes[:, 1].astype(np.int64),
            'overlap': self._overlap.array.astype(np.float64),
            'sample': np.arange(len(self)),
            # Samplers of TorchGeo draw from the bounds of each, so that none may be cut in two.
            'geometry': shapes_on_ground(self.corners(every, crs), crs, cut=False),
        }
        intervals = as_intervals(*self.spans(every))
        return gpd.GeoDataFrame(columns, index=intervals, geometry='geometry', crs=crs)

    def _first_paths(self, sensor: int) -> list[str | None]:
        """First path of a sensor of each sample."""
        found: dict[int, str] = {}
        observations, table = self.archive.observations, self.archive.table
        for number in np.unique(self._observations.array[:, sensor]).tolist():
            if number >= 0:
                found[number] = table.path(int(observations.order[observations.first[number]]))
        return [found.get(number) for number in self._observations.array[:, sensor].tolist()]

    def _main_rows(self, rows: Any) -> Any:
        """Row of the table that gives the grid, of samples."""
        return self.archive.main.array[self._observations.array[rows, self._main]]

    def _places(self) -> Int32:
        """Number of the place of each sample, -1 where none is given."""
        reference = self._observations.array[:, self._main]
        return np.asarray(self.archive.observations.place[reference], np.int32)

    def _days(self, rows: Rows | slice) -> Int32:
        """Day of each sensor of samples, (N, S)."""
        numbers = self._observations.array[rows]
        times = self.archive.observations.time[numbers]
        unknown = (numbers < 0) | (times == NO_TIME)
        unknown |= np.array([SENSORS[sensor].static for sensor in self.matched])
        days = np.where(unknown, 0, times) // DAY
        return np.where(unknown, NO_DAY, days).astype(np.int32)
