"""Which files go together: what reading and searching need to know, for any data set."""

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
    """Part of a file, in whole pixels.

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
    """Files of several sensors that show the same ground, by number of the match.

    A match has at most one observation of each sensor. The reference sensor gives its grid. Matches
    of one place are next to each other.

    Attributes:
        sensors: Keys of the sensors, in the order of :meth:`days`.
    """

    sensors: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int:
        """Number of matches."""

    @abstractmethod
    def paths(self, position: int, sensor: str) -> list[str]:
        """Files of a sensor.

        Args:
            position: Number of the match.
            sensor: Key of the sensor.

        Returns:
            Their paths, several if there is one file per band; none if the match lacks the sensor.
        """

    @abstractmethod
    def scene(self, position: int) -> tuple[Grid | None, int, Extent]:
        """Where the pixels of a match lie.

        Args:
            position: Number of the match.

        Returns:
            Grid of the reference file, None if it is not georeferenced; the EPSG code of its CRS;
            and the part of the file that belongs to the match.
        """

    def grid(self, position: int) -> Grid:
        """Grid of a match.

        Args:
            position: Number of the match.

        Returns:
            The grid.

        Raises:
            ValueError: If the match is not georeferenced.
        """
        grid, _, extent = self.scene(position)
        if grid is None:
            raise ValueError(f'match {position} has no CRS: read it by its number')
        return grid.crop(*extent)

    @abstractmethod
    def days(self, position: int) -> npt.NDArray[np.int64]:
        """Days of the observations.

        Args:
            position: Number of the match.

        Returns:
            Days since 1970-01-01, one per sensor; what NumPy makes of a missing date (the least
            int64) where unknown.
        """

    @abstractmethod
    def sizes(self, rows: Rows | slice) -> npt.NDArray[np.int32]:
        """Sizes of matches.

        Args:
            rows: Numbers of the matches.

        Returns:
            Height and width in pixels, shape (N, 2).
        """

    @abstractmethod
    def corners(self, rows: Rows | slice, crs: pyproj.CRS) -> npt.NDArray[np.float64]:
        """Corners of matches.

        Args:
            rows: Numbers of the matches.
            crs: CRS of the corners.

        Returns:
            See :func:`geofm.datasets.footprints.corners`.
        """

    @abstractmethod
    def spans(self, rows: Rows | slice) -> tuple[Any, Any]:
        """When matches were taken.

        Args:
            rows: Numbers of the matches.

        Returns:
            From the start of the earliest day to the end of the latest one, datetime64[us].
        """

    @abstractmethod
    def starts(self) -> Rows:
        """Number of the first match of each run that lies close together, for a search."""

    @abstractmethod
    def places(self) -> npt.NDArray[np.int64]:
        """Number of the place and grid of each match, from 0, in the order of first occurrence."""

    @abstractmethod
    def frame(self, crs: pyproj.CRS) -> gpd.GeoDataFrame:
        """The matches as TorchGeo's samplers want them.

        Args:
            crs: CRS of the geometries.

        Returns:
            One row per match, see the index of the data set.
        """

    @abstractmethod
    def select(self, frame: gpd.GeoDataFrame) -> Self:
        """Make a table of the rows of an index.

        Args:
            frame: As of :meth:`frame`, in any order, rows left out or repeated.

        Returns:
            The matches.
        """


@lru_cache(maxsize=256)
def crs_of(epsg: int) -> CRS:
    """CRS of an EPSG code; making one takes longer than everything else about a file.

    Args:
        epsg: The code.

    Returns:
        The CRS.
    """
    return CRS.from_epsg(epsg)
