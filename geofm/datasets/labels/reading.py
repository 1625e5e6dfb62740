"""Read labels of any kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import numpy.typing as npt

from geofm.datasets.labels.raster import MosaicLabels, RasterLabels, files_at
from geofm.datasets.labels.source import LabelError, LabelSource
from geofm.datasets.labels.vector import VECTOR_SUFFIXES, VectorLabels
from geofm.grid import Grid
from geofm.legend import NO_CLASS, Legend


@dataclass(frozen=True)
class LabelGrid:
    """Labels on a grid.

    Attributes:
        values: Class values (H, W), :data:`~geofm.legend.NO_CLASS` where there is no label.
        legend: The classes.
    """

    values: npt.NDArray[np.uint8]
    legend: Legend


@dataclass(frozen=True)
class LabelPoints:
    """Points with a class.

    Attributes:
        geometry: The points (N,), in the CRS of the file.
        values: Class value of each point (N,).
        legend: The classes.
    """

    geometry: gpd.GeoSeries
    values: npt.NDArray[np.uint8]
    legend: Legend


def open_labels(
    path: str | Path | Sequence[str | Path],
    *,
    column: str | None = None,
    legend: Legend | None = None,
    all_touched: bool = False,
) -> LabelSource:
    """Open labels for reading on several grids.

    Args:
        path: A raster, or features in a GeoPackage, GeoJSON, GeoParquet or shapefile; or several
            files, or a pattern such as ``'masks/*.tif'``. Where they overlap, later ones take
            precedence.
        column: Column of the features with the class. Default: ``'class'``, or the only column.
        legend: The classes. Default: those of the file.
        all_touched: Whether polygons label all pixels that they touch, instead of those whose
            centre they cover.

    Returns:
        The labels.

    Raises:
        LabelError: If the file cannot be used.
    """
    sources = [_open(file, column, legend, all_touched) for file in files_at(path)]
    return sources[0] if len(sources) == 1 else MosaicLabels(sources)


def _open(path: Path, column: str | None, legend: Legend | None, all_touched: bool) -> LabelSource:
    if path.suffix.lower() in VECTOR_SUFFIXES:
        return VectorLabels(path, column, legend, all_touched)
    if column is not None:
        raise LabelError(f"{path}: a raster has no columns; remove column '{column}'")
    return RasterLabels(path, legend)


def read_labels(
    path: Path,
    grid: Grid,
    *,
    column: str | None = None,
    legend: Legend | None = None,
    all_touched: bool = False,
) -> LabelGrid:
    """Read labels on a grid.

    Features are transformed to the CRS of the grid. Where they overlap, later ones take precedence.
    A point labels the pixel that contains it. Rasters are resampled by the nearest neighbour.

    Args:
        path: A raster, or features in a GeoPackage, GeoJSON, GeoParquet or shapefile.
        grid: The grid.
        column: Column of the features with the class, which is a name or an integer from 0 to 254.
            Default: ``'class'``, or the only column.
        legend: The classes. Default for features: the names in the column in alphabetical order, or
            its numbers. Default for rasters: the legend in the tags, or else the colour table and
            the values that occur.
        all_touched: Whether polygons label all pixels that they touch, instead of those whose
            centre they cover.

    Returns:
        The labels.

    Raises:
        LabelError: If the file cannot be used, or has no label on the grid.
    """
    source = open_labels(path, column=column, legend=legend, all_touched=all_touched)
    values = source.classes_on(grid)
    if (values == NO_CLASS).all():
        left, bottom, right, top = grid.bounds
        raise LabelError(
            f'{path}: no label on the grid ({grid.crs}, x {left:g} to {right:g}, y '
            f'{bottom:g} to {top:g}); check that its CRS is right and that it covers this place'
        )
    return LabelGrid(values, source.legend)


def read_points(
    path: Path, *, column: str | None = None, legend: Legend | None = None
) -> LabelPoints:
    """Read points with classes.

    Args:
        path: Points in a GeoPackage, GeoJSON, GeoParquet or shapefile.
        column: See :func:`read_labels`.
        legend: See :func:`read_labels`.

    Returns:
        The points. Each point of a MultiPoint is listed separately.

    Raises:
        LabelError: If the file cannot be used, or has features that are not points.
    """
    source = VectorLabels(Path(path), column, legend)
    kinds = sorted(set(source.frame.geometry.geom_type) - {'Point', 'MultiPoint'})
    if kinds:
        raise LabelError(
            f'{path}: has {", ".join(kinds)}, but only points can be used, e.g. from '
            'GeoSeries.sample_points or representative_point'
        )
    points = source.frame.geometry.explode(index_parts=False)
    values = source.values[points.index.to_numpy()]
    return LabelPoints(points.reset_index(drop=True), values, source.legend)
