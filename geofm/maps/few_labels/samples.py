"""Labels of patches, from points, polygons or a raster of classes."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyproj

from geofm import lonlat
from geofm.datasets.labels import LabelSource, VectorLabels
from geofm.grid import Grid
from geofm.legend import NO_CLASS


class Samples(NamedTuple):
    """Patches with a label.

    Attributes:
        rows: Rows on the patch grid (N,).
        cols: Columns on the patch grid (N,).
        values: Class of each patch (N,).
        conflicts: Number of patches with points of several classes.
        points: Patch of each point (P,) as row x width + column; -1 outside the grid. Empty if the
            labels are not points.
    """

    rows: npt.NDArray[np.intp]
    cols: npt.NDArray[np.intp]
    values: npt.NDArray[np.uint8]
    conflicts: int
    points: npt.NDArray[np.intp]


def samples_on(labels: LabelSource, grid: Grid) -> Samples:
    """Find the patches that contain a point, or whose centre lies in a polygon.

    Args:
        labels: The labels.
        grid: Grid of the patches.

    Returns:
        The patches. A patch with points of several classes gets the class with the most points, or
        of these the one with the lowest value. Points take precedence over polygons.
    """
    classes = labels.classes_on(grid)
    points, values = _points_on(labels, grid) if isinstance(labels, VectorLabels) else _NO_POINTS
    inside = points >= 0
    patches, which = np.unique(points[inside], return_inverse=True)
    counts = np.zeros((len(patches), NO_CLASS), np.int64)
    np.add.at(counts, (which, values[inside]), 1)
    if len(patches):
        np.put(classes, patches, counts.argmax(axis=1).astype(np.uint8))
    rows, cols = (classes != NO_CLASS).nonzero()
    conflicts = int(((counts > 0).sum(axis=1) > 1).sum())
    return Samples(rows, cols, classes[rows, cols], conflicts, points)


type _Points = tuple[npt.NDArray[np.intp], npt.NDArray[np.uint8]]

_NO_POINTS: _Points = (np.zeros(0, np.intp), np.zeros(0, np.uint8))


def _points_on(labels: VectorLabels, grid: Grid) -> _Points:
    """Return the patch (-1 outside the grid) and the class of each point."""
    geometry = labels.frame.geometry
    points = geometry[geometry.geom_type.isin(['Point', 'MultiPoint'])]
    points = points.to_crs(pyproj.CRS.from_user_input(grid.crs)).explode(index_parts=False)
    values = labels.values[points.index.to_numpy(np.intp)]
    x = points.x.to_numpy()
    if grid.crs.is_geographic:
        # Longitudes of a grid may exceed 180 degrees.
        middle, _ = grid.transform @ (grid.width / 2, grid.height / 2)
        x = lonlat.near(x, middle)
    places = grid.pixel_of(x, points.y.to_numpy())
    rows, cols = (np.floor(np.nan_to_num(p, nan=-1, posinf=-1, neginf=-1)) for p in places)
    inside = (rows >= 0) & (rows < grid.height) & (cols >= 0) & (cols < grid.width)
    return np.where(inside, rows * grid.width + cols, -1).astype(np.intp), values
