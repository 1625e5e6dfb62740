"""Reading labels of any kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import geopandas as gpd
import numpy as np
import numpy.typing as npt

from geofm.datasets.labels.mosaic import MosaicLabels, files_at
from geofm.datasets.labels.raster import RasterLabels
from geofm.datasets.labels.source import LabelError, LabelSource
from geofm.datasets.labels.vector import VECTOR_SUFFIXES, VectorLabels
from geofm.grid import Grid
from geofm.legend import NO_CLASS, Legend


@dataclass(frozen=True)
class LabelGrid:
    """Labels burnt on a grid.

    Attributes:
        values: Values of classes (H, W), :data:`~geofm.legend.NO_CLASS` where there is no label.
        legend: The classes.
    """

    values: npt.NDArray[np.uint8]
    legend: Legend


@dataclass(frozen=True)
class LabelPoints:
    """Points with a class.

    Attributes:
        geometry: The points (N,), in the CRS of the file.
        values: Value of the class of each (N,).
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
    """Open a file of labels, to read it on several grids.

    Args:
        path: A raster, or features: GeoPackage, GeoJSON, GeoParquet or shapefile; or several of
            them, or a pattern such as ``'masks/*.tif'``. Where they overlap, later ones win.
        column: Column of the features that holds the class; by default ``'class'``, or the only
            one.
        legend: The classes; by default those that the file has.
        all_touched: Whether polygons take all pixels that they touch, instead of those whose
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
        raise LabelError(f"{path}: a raster has no column '{column}'; leave it out")
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

    Features are brought to the CRS of the grid; where they overlap, later ones win; a point takes
    the pixel that it lies in. Of a raster each pixel takes the nearest value.

    Args:
        path: A raster, or features: GeoPackage, GeoJSON, GeoParquet or shapefile.
        grid: The grid.
        column: Column of the features that holds the class, a name or a whole number of 0 to 254;
            by default ``'class'``, or the only one.
        legend: The classes. By default those that the file has: the names of the column in
            alphabetical order, or its numbers; the legend in the tags of a raster, else its colour
            table and the values that occur.
        all_touched: Whether polygons take all pixels that they touch, instead of those whose
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
            f'{path}: no label lies on the grid ({grid.crs}, x {left:g} to {right:g}, y '
            f'{bottom:g} to {top:g}); check its CRS and that it is of the same place'
        )
    return LabelGrid(values, source.legend)


def read_points(
    path: Path, *, column: str | None = None, legend: Legend | None = None
) -> LabelPoints:
    """Read points with classes.

    Args:
        path: Points in a GeoPackage, GeoJSON, GeoParquet or shapefile.
        column: As for :func:`read_labels`.
        legend: As for :func:`read_labels`.

    Returns:
        The points; several of one feature are several points.

    Raises:
        LabelError: If the file cannot be used, or has other features than points.
    """
    source = VectorLabels(Path(path), column, legend)
    kinds = sorted(set(source.frame.geometry.geom_type) - {'Point', 'MultiPoint'})
    if kinds:
        raise LabelError(
            f'{path}: holds {", ".join(kinds)}; points are needed, e.g. of '
            'GeoSeries.sample_points or representative_point'
        )
    points = source.frame.geometry.explode(index_parts=False)
    values = source.values[points.index.to_numpy()]
    return LabelPoints(points.reset_index(drop=True), values, source.legend)
