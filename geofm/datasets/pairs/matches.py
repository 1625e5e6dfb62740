"""Tables of files that show the same ground, as needed for reading and searching."""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, NamedTuple, Self

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pyproj
from rasterio.crs import CRS

from geofm.datasets.catalogue.scenes import Rows
from geofm.grid import Grid


class Extent(NamedTuple):
    """Part of a file in whole pixels.

    Attributes:
        row: First row.
        col: First column.
        height: Number of rows.
        width: Number of columns.
    """

    row: int
    col: int
    height: int
    width: int


class MatchTable(ABC):
    """Matches of files of several sensors that show the same ground.

    A match has at most one observation of each sensor. Its grid is that of the reference sensor.
    Matches of one place are adjacent in the table.

    Attributes:
        sensors: Keys of the sensors, in the order of :meth:`days`.
    """

    sensors: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of matches."""

    @abstractmethod
    def paths(self, position: int, sensor: str) -> list[str]:
        """Return the files of a sensor.

        Args:
            position: Index of the match.
            sensor: Key of the sensor.

        Returns:
            Their paths: several if there is one file per band, none if the sensor is missing.
        """

    @abstractmethod
    def scene(self, position: int) -> tuple[Grid | None, int, Extent]:
        """Return the location of the pixels of a match.

        Args:
            position: Index of the match.

        Returns:
            Grid of the reference file (None if it is not georeferenced), the EPSG code of its CRS,
            and the part of the file that belongs to the match.
        """

    def grid(self, position: int) -> Grid:
        """Return the grid of a match.

        Args:
            position: Index of the match.

        Returns:
            The grid.

        Raises:
            ValueError: If the match is not georeferenced.
        """
        grid, _, extent = self.scene(position)
        if grid is None:
            raise ValueError(f'match {position} has no CRS: read it by its index')
        return grid.crop(*extent)

    @abstractmethod
    def days(self, position: int) -> npt.NDArray[np.int64]:
        """Return the days of the observations.

        Args:
            position: Index of the match.

        Returns:
            Days since 1970-01-01, one per sensor. Unknown days are the smallest int64, as NumPy
            converts NaT.
        """

    @abstractmethod
    def sizes(self, rows: Rows | slice) -> npt.NDArray[np.int32]:
        """Return the sizes of matches.

        Args:
            rows: Indices of the matches.

        Returns:
            Height and width in pixels, shape (N, 2).
        """

    @abstractmethod
    def corners(self, rows: Rows | slice, crs: pyproj.CRS) -> npt.NDArray[np.float64]:
        """Return the corners of matches.

        Args:
            rows: Indices of the matches.
            crs: CRS of the corners.

        Returns:
            See :func:`geofm.datasets.footprints.corners`.
        """

    @abstractmethod
    def spans(self, rows: Rows | slice) -> tuple[Any, Any]:
        """Return the time spans of matches.

        Args:
            rows: Indices of the matches.

        Returns:
            Start of the earliest day and end of the latest day, datetime64[us].
        """

    @abstractmethod
    def starts(self) -> Rows:
        """Return where each run of rows with the same window begins: indices of first matches."""

    @abstractmethod
    def places(self) -> npt.NDArray[np.int64]:
        """Number the place and grid of each match from 0, in order of first occurrence."""

    @abstractmethod
    def frame(self, crs: pyproj.CRS) -> gpd.GeoDataFrame:
        """Return the matches as the index of a GeoDataset.

        Args:
            crs: CRS of the geometries.

        Returns:
            One row per match, see the index of the dataset.
        """

    @abstractmethod
    def select(self, frame: gpd.GeoDataFrame) -> Self:
        """Make a table from rows of an index.

        Args:
            frame: Rows of :meth:`frame`, in any order and possibly repeated.

        Returns:
            The matches.
        """


@lru_cache(maxsize=256)
def crs_of(epsg: int) -> CRS:
    """Return the CRS of an EPSG code, cached since creating one is slow.

    Args:
        epsg: The code.

    Returns:
        The CRS.
    """
    return CRS.from_epsg(epsg)
