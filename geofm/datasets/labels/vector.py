"""Labels from polygons, lines and points with a class or a number."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyproj
import shapely
from pyogrio.errors import DataLayerError, DataSourceError
from rasterio.features import rasterize

from geofm import lonlat
from geofm.datasets.labels.source import LabelError, LabelSource, check_values, legend_of_values
from geofm.grid import Grid
from geofm.legend import NO_CLASS, Legend, LegendError
from geofm.printing import warn

#: Suffixes of files with features.
VECTOR_SUFFIXES = ('.gpkg', '.geojson', '.json', '.parquet', '.geoparquet', '.shp')

#: Default column.
COLUMN = 'class'

#: First bytes of files that GDAL may open. GDAL chooses a driver by content, and some drivers, such
#: as virtual ones, read further files.
_STARTS = {'.gpkg': b'SQLite format 3\x00', '.shp': b'\x00\x00\x27\x0a'}

#: Number of copies of the features in other CRSs that are cached.
_COPIES = 4


class VectorLabels(LabelSource):
    """Labels from features with a class or a number.

    Attributes:
        path: The file.
        column: The column of classes or numbers.
        frame: The features with a geometry and a value, in the order of the file.
        all_touched: Whether polygons label all pixels that they touch, instead of those whose
            centre they cover.
    """

    def __init__(
        self,
        path: Path,
        column: str | None = None,
        legend: Legend | None = None,
        all_touched: bool = False,
    ) -> None:
        """Initialize a new VectorLabels instance.

        Args:
            path: The file.
            column: The column. Default: ``'class'``, or the only column.
            legend: The classes. Default: those of the column, which are its numbers, or its names
                in alphabetical order.
            all_touched: Whether polygons label all pixels that they touch.

        Raises:
            LabelError: If the file cannot be used.
        """
        self.path = path
        self.all_touched = all_touched
        frame = read_features(path)
        self.column = _choose_column(path, frame, column)
        usable = frame[self.column].notna() & frame.geometry.notna() & ~frame.geometry.is_empty
        self.frame = frame[usable].reset_index(drop=True)
        if not len(self.frame):
            raise LabelError(
                f'{path}: none of its {len(frame)} features has a geometry and a value in the '
                f"column '{self.column}'"
            )
        self._legend = legend
        self._copies: dict[tuple[str, tuple[int, ...]], gpd.GeoSeries] = {}

    @cached_property
    def legend(self) -> Legend:
        """The classes."""
        if self._legend is not None:
            return self._legend
        values = self.frame[self.column]
        if not _is_number(values):
            try:
                return Legend.of(sorted(set(map(str, values))))
            except LegendError as error:
                raise LabelError(
                    f"{self.path}: column '{self.column}' cannot be used as classes: {error}; "
                    f'{self._remedy}'
                ) from error
        numbers = values.to_numpy(np.float64)
        check_values(self.path, numbers, None, self._remedy)
        return legend_of_values(np.unique(numbers))

    @property
    def _remedy(self) -> str:
        return f"correct the column '{self.column}' or the classes"

    @cached_property
    def values(self) -> npt.NDArray[np.uint8]:
        """Class value of each feature (N,).

        Raises:
            LabelError: If the class of a feature is not in the legend.
        """
        column = self.frame[self.column]
        if _is_number(column):
            numbers = column.to_numpy(np.float64)
            check_values(self.path, numbers, self._legend, self._remedy)
            return numbers.astype(np.uint8)
        names = column.map(str)
        known = {c.name: c.value for c in self.legend.classes}
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise LabelError(
                f"{self.path}: column '{self.column}' has {', '.join(map(repr, unknown[:5]))}"
                f'{", ..." if len(unknown) > 5 else ""}: not among the classes {", ".join(known)}; '
                f'{self._remedy}'
            )
        return names.map(known).to_numpy(np.uint8)

    @cached_property
    def numbers(self) -> npt.NDArray[np.float32]:
        """Number of each feature (N,).

        Raises:
            LabelError: If the column contains text.
        """
        column = self.frame[self.column]
        if not _is_number(column):
            raise LabelError(
                f"{self.path}: column '{self.column}' has {str(column.iloc[0])!r}, not numbers; "
                'choose a column of numbers'
            )
        return column.to_numpy(np.float32)

    def classes_on(self, grid: Grid) -> npt.NDArray[np.uint8]:
        """Return the classes on a grid. Where features overlap, the later one takes precedence."""
        return self._burn(grid, self.values, NO_CLASS)

    def numbers_on(self, grid: Grid) -> npt.NDArray[np.float32]:
        """Return the numbers on a grid. Where features overlap, the later one takes precedence."""
        return self._burn(grid, self.numbers, np.nan)

    def touching(self, grid: Grid) -> npt.NDArray[np.int64]:
        """Return the sorted indices of the features that intersect a grid."""
        box = shapely.Polygon(grid.footprint())
        found = self._geometry(grid).sindex.query(box, predicate='intersects')
        return np.sort(np.asarray(found, np.int64))

    def _burn(self, grid: Grid, values: npt.NDArray[Any], empty: float) -> npt.NDArray[Any]:
        burnt = np.full(grid.shape, empty, values.dtype)
        features = self.touching(grid)
        if len(features):
            geometry = self._geometry(grid).to_numpy()[features]
            rasterize(
                zip(geometry, values[features].tolist(), strict=True),
                out=burnt,
                transform=grid.transform,
                all_touched=self.all_touched,
            )
        return burnt

    def _geometry(self, grid: Grid) -> gpd.GeoSeries:
        """Return the geometries in the CRS of a grid, empty where they have no position in it."""
        if grid.crs is None:
            raise LabelError(f'{self.path}: the grid to burn it on has no CRS')
        wkt = grid.crs.to_wkt()
        # Longitudes of a grid may continue beyond 180 degrees.
        turns = lonlat.turns(grid.bounds.left, grid.bounds.right) if grid.crs.is_geographic else ()
        key = (wkt, turns)
        if key not in self._copies:
            if len(self._copies) >= _COPIES:
                self._copies.pop(next(iter(self._copies)))
            moved = self.frame.geometry.to_crs(pyproj.CRS(wkt))
            lost = ~np.isfinite(moved.bounds.to_numpy()).all(axis=1)
            self._warn_of_lost(lost, grid)
            moved = moved.where(~lost, shapely.Point())
            self._copies[key] = _repeated(moved, turns) if turns not in ((), (0,)) else moved
        return self._copies[key]

    def _warn_of_lost(self, lost: npt.NDArray[np.bool_], grid: Grid) -> None:
        """Warn of polygons and lines that cannot be transformed to the CRS of a grid."""
        # Points without a position in the CRS are far away, so that no warning is needed.
        wide = lost & (shapely.get_dimensions(self.frame.geometry.to_numpy()) > 0)
        if wide.any():
            warn(
                f'{self.path}: {wide.sum()} of {len(wide)} features cannot be transformed to '
                f'{grid.crs} and are left out: check their CRS and the order of their coordinates, '
                'and clip them to the surroundings of the scenes',
            )


def _repeated(geometry: gpd.GeoSeries, turns: Sequence[int]) -> gpd.GeoSeries:
    """Repeat each feature at longitudes that are whole turns apart."""
    parts = [geometry.translate(xoff=lonlat.CIRCLE * turn).to_numpy() for turn in turns]
    return gpd.GeoSeries(shapely.geometrycollections(np.stack(parts, axis=1)), crs=geometry.crs)


def read_features(path: Path) -> gpd.GeoDataFrame:
    """Read a file of features.

    Args:
        path: GeoPackage, GeoJSON, GeoParquet or shapefile. Its content is not trusted.

    Returns:
        The features, in the order of the file.

    Raises:
        LabelError: If the file cannot be read, or has no CRS or no features.
    """
    suffix = path.suffix.lower()
    if suffix not in VECTOR_SUFFIXES:
        raise LabelError(f'{path}: not a file of features; use one of {", ".join(VECTOR_SUFFIXES)}')
    if not path.is_file():
        raise LabelError(f'{path}: no such file')
    try:
        if suffix in _STARTS:
            frame = _read_by_gdal(path, suffix)
        elif 'json' in suffix:
            frame = _read_geojson(path)
        else:
            frame = gpd.read_parquet(path)
    except LabelError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        DataLayerError,
        DataSourceError,
        LookupError,
        OSError,
        RecursionError,
        TypeError,
        ValueError,
        pyproj.exceptions.CRSError,
        shapely.errors.ShapelyError,
    ) as error:
        raise LabelError(f'{path}: cannot be read as features: {error}') from error
    if not isinstance(frame, gpd.GeoDataFrame) or not len(frame):
        raise LabelError(f'{path}: has no features with a geometry')
    if frame.crs is None:
        raise LabelError(f'{path}: no CRS; assign one, e.g. with GeoDataFrame.set_crs')
    return frame


def _read_by_gdal(path: Path, suffix: str) -> Any:
    with path.open('rb') as stream:
        if not stream.read(len(_STARTS[suffix])) == _STARTS[suffix]:
            raise LabelError(f'{path}: its content is not that of a {suffix} file')
    layers = [name for name, kind in gpd.list_layers(path).itertuples(index=False) if kind]
    if len(layers) != 1:
        raise LabelError(
            f'{path}: has {len(layers)} layers ({", ".join(layers)}), but must have one: write '
            'it to a separate file, e.g. with GeoDataFrame.to_file'
        )
    return gpd.read_file(path, layer=layers[0])


def _read_geojson(path: Path) -> gpd.GeoDataFrame:
    content = json.loads(path.read_text(encoding='utf-8-sig'))
    if not isinstance(content, dict) or content.get('type') != 'FeatureCollection':
        raise LabelError(f'{path}: not a GeoJSON FeatureCollection')
    # RFC 7946 allows only longitude and latitude. Its predecessor had a CRS, which GDAL still
    # writes.
    named = content.get('crs')
    crs = 'OGC:CRS84' if named is None else named['properties']['name']
    # GeoDataFrame.from_features would drop features without properties.
    features = content['features']
    geometry = [
        None if f.get('geometry') is None else shapely.geometry.shape(f['geometry'])
        for f in features
    ]
    frame = pd.DataFrame([f.get('properties') or {} for f in features])
    frame = frame.drop(columns='geometry', errors='ignore')
    return gpd.GeoDataFrame(frame, geometry=geometry, crs=crs)


def _choose_column(path: Path, frame: gpd.GeoDataFrame, column: str | None) -> str:
    columns = [str(name) for name in frame.columns if name != frame.geometry.name]
    there = f'its columns are {", ".join(columns)}' if columns else 'it has none'
    if column is None:
        if COLUMN in columns or len(columns) == 1:
            return COLUMN if COLUMN in columns else columns[0]
        raise LabelError(f'{path}: the column of classes must be given: {there}')
    if column not in columns:
        raise LabelError(f"{path}: no column '{column}': {there}")
    return column


def _is_number(values: 'pd.Series[Any]') -> bool:
    return bool(pd.api.types.is_numeric_dtype(values.infer_objects()))
