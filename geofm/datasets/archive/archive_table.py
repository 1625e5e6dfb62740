"""Table of windows of rasters and the observations that match them."""

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

#: Interval of samples without a known date: the longest that pandas supports.
_ANY_TIME = ('1678-01-01', '2261-12-31')

type Int32 = npt.NDArray[np.int32]


class Archive(NamedTuple):
    """Table of rasters with its observations.

    Attributes:
        table: The table.
        observations: Rows of the table, grouped by observation.
        main: Row on whose grid each observation is read.
        folder: Folder from which the arrays of the table are memory-mapped; None if they are not.
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
            TableError: If two rows have the same place, sensor, time and bands.
        """
        observations = Observations.of(table)
        return cls(table, observations, SharedArray(observations.main_rows(table)))


class ArchiveTable(MatchTable):
    """Windows of observations of a reference sensor, with the matching observations.

    Attributes:
        archive: The archive.
        sensors: Keys of the sensors whose dates a sample has, in the order of its dates.
        matched: Names of the matched sensors, in the order of the observations.
        reference: The sensor on whose grids samples are read, one of *matched*.
        window_size: Height and width of the windows in pixels; None for whole observations.
        n_places: Number of places, if it has been counted.
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
            archive: The archive.
            matched: Names of the matched sensors.
            reference: The sensor on whose grids samples are read.
            observations: Index of the observation of each sensor, -1 where missing, (N, S).
            offsets: First row and column of each window, (N, 2).
            overlap: Smallest fraction of each window that another sensor covers, (N,).
            window_size: Height and width of the windows in pixels. Windows of smaller observations
                are smaller. None for whole observations.
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
        """Return the number of samples."""
        return len(self._observations.array)

    def rows_of(self, position: int, sensor: str) -> npt.NDArray[np.integer[Any]] | None:
        """Return the rows of the table that a sample is read from.

        Args:
            position: Index of the sample.
            sensor: Key of the sensor.

        Returns:
            Indices of the rows; None if the sensor is missing.
        """
        number = int(self._observations.array[position, self.matched.index(sensor)])
        return None if number < 0 else self.archive.observations.rows(number)

    def paths(self, position: int, sensor: str) -> list[str]:
        """See :meth:`MatchTable.paths`."""
        rows = self.rows_of(position, sensor)
        found = [] if rows is None else [self.archive.table.path(int(row)) for row in rows]
        return list(dict.fromkeys(found))

    def scene(self, position: int) -> tuple[Grid | None, int, Extent]:
        """See :meth:`MatchTable.scene`."""
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
        """See :meth:`MatchTable.days`. Static sensors have no date."""
        days = self._days(np.array([position]))[0].astype(np.int64)
        days[days == NO_DAY] = np.iinfo(np.int64).min
        every = np.full(len(self.sensors), np.iinfo(np.int64).min)
        every[[self.sensors.index(sensor) for sensor in self.matched]] = days
        return every

    def reference_observations(self) -> Int32:
        """Return the observation of the reference sensor of each sample.

        Returns:
            Indices of observations, int32 (N,).
        """
        return np.ascontiguousarray(self._observations.array[:, self._main])

    def count_places(self) -> int:
        """Count the places. An observation without a place counts as one."""
        if self.n_places is not None:
            return self.n_places
        place = self._places()
        lone = self.reference_observations()[place < 0]
        return len(np.unique(place[place >= 0])) + len(np.unique(lone))

    def main_rows(self) -> npt.NDArray[np.integer[Any]]:
        """Return the row of the table on whose grid each sample is read.

        Returns:
            Indices of rows, (N,).
        """
        return np.asarray(self._main_rows(slice(None)))

    def scene_corners(self, scenes: Rows) -> npt.NDArray[np.float64]:
        """Return the corners of whole observations in longitude and latitude.

        Args:
            scenes: Indices of the observations.

        Returns:
            See :func:`geofm.datasets.footprints.corners`.
        """
        table, rows = self.archive.table, self.archive.main.array[scenes]
        shape = np.stack((table.height[rows], table.width[rows]), axis=1).astype(np.int32)
        return corners(table.epsg[rows].astype(np.int32), table.transform[rows], shape)

    def sizes(self, rows: Rows | slice) -> npt.NDArray[np.int32]:
        """See :meth:`MatchTable.sizes`."""
        table, main = self.archive.table, self._main_rows(rows)
        sizes = np.stack((table.height[main], table.width[main]), axis=1).astype(np.int32)
        return sizes if self.window_size is None else np.minimum(sizes, self.window_size)

    def transforms(self, rows: Rows | slice) -> npt.NDArray[np.float64]:
        """Return the transforms of samples.

        Args:
            rows: Indices of the samples.

        Returns:
            Affine coefficients a to f, float64 (N, 6).
        """
        transform = self.archive.table.transform[self._main_rows(rows)]
        return shifted(transform, *self._offsets.array[rows].T)

    def epsg(self, rows: Rows | slice) -> npt.NDArray[np.int32]:
        """Return the EPSG codes of samples.

        Args:
            rows: Indices of the samples.

        Returns:
            Codes, -1 where there is no CRS, (N,).
        """
        return self.archive.table.epsg[self._main_rows(rows)].astype(np.int32)

    def corners(self, rows: Rows | slice, crs: pyproj.CRS) -> npt.NDArray[np.float64]:
        """See :meth:`MatchTable.corners`."""
        return corners(self.epsg(rows), self.transforms(rows), self.sizes(rows), crs)

    def spans(self, rows: Rows | slice) -> tuple[Any, Any]:
        """See :meth:`MatchTable.spans`."""
        return day_spans(self._days(rows), _ANY_TIME)

    def starts(self) -> Rows:
        """See :meth:`MatchTable.starts`. Returns the first sample of each window of a place."""
        # The grids of a place may differ, so that windows with the same offset are on different
        # ground.
        keys = [self._places(), *self._offsets.array.T]
        new = np.zeros(len(self), bool)
        new[:1] = True
        for key in keys:
            new[1:] |= key[1:] != key[:-1]
        new |= self._places() < 0
        return np.flatnonzero(new)

    def places(self) -> npt.NDArray[np.int64]:
        """See :meth:`MatchTable.places`.

        Samples that have no place but lie on the same pixels share one place.
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
        """See :meth:`MatchTable.select`. Rows are selected by the column ``sample``."""
        return self.take(frame['sample'].to_numpy())

    @property
    def arrays(self) -> tuple[Int32, Int32, npt.NDArray[np.float32]]:
        """Observations, offsets and overlap of the samples, as arguments of the constructor."""
        return self._observations.array, self._offsets.array, self._overlap.array

    def take(self, rows: npt.NDArray[np.integer[Any]]) -> 'ArchiveTable':
        """Select samples.

        Args:
            rows: Indices of the samples.

        Returns:
            A table of these samples.
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
        """Return the samples as the index of a GeoDataset.

        Args:
            crs: CRS of the geometries.

        Returns:
            One row per sample. The columns are the first path for each sensor, named like the
            sensor (missing if the sample lacks it), and its day (``NAME_date``); ``place``; ``row``
            and ``col``, the first pixel of the window in the file of the reference sensor;
            ``epsg``, ``transform`` (a, b, c, d, e, f), ``height`` and ``width`` of the window;
            ``overlap``, the smallest fraction of the window that another sensor covers; ``sample``,
            its index; and the outline in *crs*. The index is the time interval of all files.
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
            # TorchGeo's samplers draw from the bounds of each outline, so outlines must not be cut
            # in two.
            'geometry': shapes_on_ground(self.corners(every, crs), crs, cut=False),
        }
        intervals = as_intervals(*self.spans(every))
        return gpd.GeoDataFrame(columns, index=intervals, geometry='geometry', crs=crs)

    def _first_paths(self, sensor: int) -> list[str | None]:
        """Return the first path of a sensor for each sample."""
        found: dict[int, str] = {}
        observations, table = self.archive.observations, self.archive.table
        for number in np.unique(self._observations.array[:, sensor]).tolist():
            if number >= 0:
                found[number] = table.path(int(observations.order[observations.first[number]]))
        return [found.get(number) for number in self._observations.array[:, sensor].tolist()]

    def _main_rows(self, rows: Any) -> Any:
        """Return the rows of the table on whose grids samples are read."""
        return self.archive.main.array[self._observations.array[rows, self._main]]

    def _places(self) -> Int32:
        """Return the place of each sample, -1 where there is none."""
        reference = self._observations.array[:, self._main]
        return np.asarray(self.archive.observations.place[reference], np.int32)

    def _days(self, rows: Rows | slice) -> Int32:
        """Return the day of each sensor of samples, (N, S)."""
        numbers = self._observations.array[rows]
        times = self.archive.observations.time[numbers]
        unknown = (numbers < 0) | (times == NO_TIME)
        unknown |= np.array([SENSORS[sensor].static for sensor in self.matched])
        days = np.where(unknown, 0, times) // DAY
        return np.where(unknown, NO_DAY, days).astype(np.int32)
