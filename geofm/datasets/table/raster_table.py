"""The table of rasters as arrays: which file, of which sensor, from when and where."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm.datasets.catalogue.path_list import PathList
from geofm.datasets.catalogue.shared_array import SharedArray
from geofm.datasets.table.address import resolve
from geofm.datasets.table.columns import NO_TIME
from geofm.datasets.table.fields import read_fields
from geofm.datasets.table.writing import write_table
from geofm.grid import Grid
from geofm.sensors import SENSORS, Sensor

__all__ = ['NO_TIME', 'RasterTable']

type Ints = npt.NDArray[np.integer[Any]]
type Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class RasterTable:
    """Rasters of any sensors, one row per file or per band of a file.

    All arrays have one entry per row. Processes that read share them.

    Attributes:
        source: File of the table, for messages.
        root: Folder that relative paths start from.
        paths: Path or address of each file, as of :mod:`geofm.datasets.table.address`.
        sensors: Keys of the sensors.
        sensor: Index into *sensors*, int8.
        places: Names of the places.
        place: Index into *places*, int32; -1 where the row names no place.
        time: Microseconds since 1970-01-01 UTC, int64; :data:`NO_TIME` where there is none.
        band_lists: Lists of channel names, e.g. ``('B02', 'B03')``. '-' is a band of the file that
            is not used.
        band: Index into *band_lists*, int16: the bands of the file, in its order. -1: the file
            says which they are, or has all bands of the sensor in their order.
        index: Number of the band in the file, from 1, int16; -1: all of them.
        scene: Which rows without a place are of one scene, int32; -1: the row is a scene of its
            own. None if all rows are that, or have a place.
        scale: Factor for the numbers of the file, float64; NaN: as the file says. None if the
            table has no such column; so for the next ones.
        offset: What is added after scaling, float64.
        nodata: Number that means "no data", float64; NaN: as the file says.
        units: Units.
        unit: Index into *units*, int8: unit of numbers * scale + offset; -1: as the file says, or
            the sensor's.
        cloud_cover: Fraction of clouds, 0 to 1, float32; NaN where unknown.
        splits: Names of the splits.
        split: Index into *splits*, int8.
        epsg: EPSG code of the CRS, int32; -1: none, or not scanned.
        transform: Affine coefficients a to f, float64 (N, 6); NaN where there is none.
        height: Rows, int32; 0: not scanned.
        width: Columns, int32; 0: not scanned.
        bounds: West, south, east and north in degrees, float64 (N, 4); NaN where there are none.
            East is beyond 180 for a raster across the antimeridian.
        problems: What can be wrong with files.
        problem: Index into *problems*, int8; -1: nothing.
    """

    source: str
    root: str
    paths: PathList
    sensors: tuple[str, ...]
    sensor: Ints
    places: PathList
    place: Ints
    time: npt.NDArray[np.int64]
    band_lists: tuple[tuple[str, ...], ...]
    band: Ints
    index: Ints
    scene: Ints | None
    scale: Floats | None
    offset: Floats | None
    nodata: Floats | None
    units: tuple[str, ...]
    unit: Ints | None
    cloud_cover: Floats | None
    splits: tuple[str, ...]
    split: Ints | None
    epsg: Ints
    transform: npt.NDArray[np.float64]
    height: Ints
    width: Ints
    bounds: npt.NDArray[np.float64]
    problems: tuple[str, ...]
    problem: Ints

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a table.

        Args:
            path: A GeoParquet (``.parquet``, ``.geoparquet``) or CSV file with the columns
                ``path``, ``sensor`` and ``datetime``, see :mod:`geofm.datasets.table.fields`.

        Returns:
            The table.

        Raises:
            FileNotFoundError: If there is no such file.
            TableError: If it is no table of rasters; one line that names the row and what to do.
        """
        return cls(**read_fields(Path(path)))

    def write(self, path: str | Path) -> None:
        """Write the table: all of it, or nothing if that fails.

        Args:
            path: A file whose name ends in ``.parquet``, ``.geoparquet`` or ``.csv``. Paths of
                files in its folder or below are written relative to it.

        Raises:
            TableError: If the name has another ending.
        """
        write_table(self, Path(path))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.paths)

    def __getstate__(self) -> dict[str, Any]:
        """State for a worker process, with arrays in shared memory."""
        return {
            name: self._shared(name, value) if isinstance(value, np.ndarray) else value
            for name, value in list(vars(self).items())
            if name != '_memory'
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(
            {k: v.array if isinstance(v, SharedArray) else v for k, v in state.items()}
        )

    def _shared(self, name: str, array: npt.NDArray[Any]) -> SharedArray:
        """The same memory for each worker."""
        memory: dict[str, SharedArray] = vars(self).setdefault('_memory', {})
        return memory.setdefault(name, SharedArray(array))

    def path(self, row: int) -> str:
        """Path or address of a file.

        Args:
            row: Index of the row.

        Returns:
            The absolute path, or an address.
        """
        return resolve(self.paths[row], self.root)

    def sensor_of(self, row: int) -> Sensor:
        """Sensor of a file.

        Args:
            row: Index of the row.

        Returns:
            The sensor.
        """
        return SENSORS[self.sensors[self.sensor[row]]]

    def bands_of(self, row: int) -> tuple[str, ...] | None:
        """Bands of a file as the table has them.

        Args:
            row: Index of the row.

        Returns:
            Names of channels, '-' for those that are not used; None if the table says nothing.
        """
        return None if self.band[row] < 0 else self.band_lists[self.band[row]]

    def grid(self, row: int) -> Grid | None:
        """Grid of a file.

        Args:
            row: Index of the row.

        Returns:
            Its grid; None if it is not georeferenced, or not scanned.
        """
        if self.epsg[row] < 0:
            return None
        transform = Affine(*self.transform[row].tolist())
        return Grid(
            CRS.from_epsg(int(self.epsg[row])),
            transform,
            int(self.height[row]),
            int(self.width[row]),
        )

    @property
    def is_scanned(self) -> bool:
        """Whether size and problems of all files are known."""
        return bool(((self.height > 0) | (self.problem >= 0)).all())

    def take(self, rows: Ints) -> Self:
        """Some rows of the table.

        Args:
            rows: Their indices, in the order to have them in.

        Returns:
            A table of these rows.
        """
        rows = np.asarray(rows)
        arrays: dict[str, Any] = {
            field.name: value[rows]
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), np.ndarray)
        }
        return dataclasses.replace(self, **arrays, paths=PathList.of(self.paths.take(rows)))
