"""Search samples by place and time."""

from typing import Any, Protocol

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from pyproj import CRS

from geofm.datasets.catalogue.scenes import Rows
from geofm.datasets.footprints import extents, shapes_on_ground
from geofm.datasets.pairs.matches import MatchTable
from geofm.lonlat import CIRCLE, near

#: Relative difference below which areas of overlap are considered equal.
_AREA_TOLERANCE = 1e-6

#: Number of pairs whose corners are computed at once.
_AT_ONCE = 1 << 16

#: Left, bottom, right and top.
type Box = tuple[float, float, float, float]


class Search(Protocol):
    """Spatial index of pairs, with their times.

    Attributes:
        bounds: Bounds of all pairs. Longitudes of pairs across the antimeridian continue beyond
            180.
        crs: CRS of the outlines.
    """

    bounds: Box
    crs: CRS

    def near(self, box: shapely.Polygon) -> Rows:
        """Return the sorted indices of all pairs that touch a box, and possibly of more pairs."""

    def shapes(self, rows: Rows) -> npt.NDArray[np.object_]:
        """Return the outlines of pairs."""

    def spans(self, rows: Rows) -> tuple[Any, Any]:
        """Return start and end of pairs."""


class TableSearch:
    """Search in a table of matches.

    The tree has one entry per run of matches of a place, so that it is much smaller than the table.

    Attributes:
        bounds: Bounds of all pairs.
    """

    def __init__(self, table: MatchTable, crs: CRS) -> None:
        """Initialize a new TableSearch instance.

        Args:
            table: The pairs.
            crs: CRS to search in.
        """
        self.table = table
        self.crs = crs
        self._starts = np.append(table.starts(), len(table))
        boxes = self._boxes()
        # Places without a position in the CRS cannot be found.
        there = np.isfinite(boxes).all(axis=1)
        shapes = np.full(len(boxes), None, dtype=object)
        shapes[there] = shapely.box(*boxes[there].T)
        self._tree = shapely.STRtree(shapes)
        low, high = boxes[there, :2].min(axis=0), boxes[there, 2:].max(axis=0)
        self.bounds: Box = (*low.tolist(), *high.tolist())

    def near(self, box: shapely.Polygon) -> Rows:
        """Find pairs in a box.

        Args:
            box: Bounds of the query.

        Returns:
            Sorted indices of the pairs of all places whose bounds touch the box.
        """
        places = np.sort(self._tree.query(box))
        parts = [np.arange(*self._starts[place : place + 2]) for place in places.tolist()]
        return np.concatenate([np.zeros(0, np.intp), *parts])

    def shapes(self, rows: Rows) -> npt.NDArray[np.object_]:
        """Return the outlines of pairs.

        Args:
            rows: Indices of the pairs.

        Returns:
            Polygons.
        """
        return shapes_on_ground(self.table.corners(rows, self.crs), self.crs, cut=False)

    def spans(self, rows: Rows) -> tuple[Any, Any]:
        """Return the time spans of pairs.

        Args:
            rows: Indices of the pairs.

        Returns:
            Start and end of each pair.
        """
        return self.table.spans(rows)

    def _boxes(self) -> npt.NDArray[np.float64]:
        """Compute the bounds of each place, shape (places, 4)."""
        boxes = np.empty((len(self.table), 4))
        for first in range(0, len(self.table), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            boxes[part] = extents(self.table.corners(part, self.crs), self.crs)
        starts = self._starts[:-1]
        if self.crs.is_geographic:
            # A place may have pairs on both sides of the antimeridian.
            first_west = np.repeat(boxes[starts, 0], np.diff(self._starts))
            shift = near(boxes[:, 0], first_west) - boxes[:, 0]
            boxes[:, [0, 2]] += shift[:, None]
        return np.concatenate(
            (
                np.minimum.reduceat(boxes[:, :2], starts, axis=0),
                np.maximum.reduceat(boxes[:, 2:], starts, axis=0),
            ),
            axis=1,
        )


class FrameSearch:
    """Search in a GeoDataFrame that the user has set as ``dataset.index``, with any geometries."""

    def __init__(self, frame: gpd.GeoDataFrame) -> None:
        """Initialize a new FrameSearch instance.

        Args:
            frame: The index.
        """
        self.frame = frame
        self.crs = CRS(frame.crs)
        self.bounds: Box = tuple(frame.total_bounds.tolist())

    def near(self, box: shapely.Polygon) -> Rows:
        """Find pairs in a box.

        Args:
            box: Bounds of the query.

        Returns:
            Sorted indices of the pairs that touch the box.
        """
        return np.sort(self.frame.sindex.query(box, predicate='intersects'))

    def shapes(self, rows: Rows) -> npt.NDArray[np.object_]:
        """Return the outlines of pairs.

        Args:
            rows: Indices of the pairs.

        Returns:
            Polygons.
        """
        return self.frame.geometry.array[rows].to_numpy()

    def spans(self, rows: Rows) -> tuple[Any, Any]:
        """Return the time spans of pairs.

        Args:
            rows: Indices of the pairs.

        Returns:
            Start and end of each pair.
        """
        spans = self.frame.index[rows]
        return spans.left.to_numpy('datetime64[us]'), spans.right.to_numpy('datetime64[us]')


def best_pair(search: Search, box: Box, start: pd.Timestamp, stop: pd.Timestamp) -> int | None:
    """Find the pair that best matches a query.

    Args:
        search: The pairs.
        box: Bounds of the query. If it crosses the antimeridian, longitudes may exceed 180, or
            left may be greater than right.
        start: Start of the query.
        stop: End of the query.

    Returns:
        Index of the pair that overlaps the box most among those that intersect the query in space
        and time. Ties are broken by the similarity of the interval (intersection over union), and
        then by order. None if there is no such pair.
    """
    boxes = _turns(box, search)
    first, last = (time.to_datetime64().astype('datetime64[us]') for time in (start, stop))
    found = [search.near(shapely.box(*turned)) for turned in boxes]
    rows = found[0] if len(found) == 1 else np.unique(np.concatenate(found))
    left, right = search.spans(rows)
    rows = rows[(left <= last) & (right >= first) & (first <= last)]
    shapes = search.shapes(rows)
    # shapely.intersection takes ten times as long where edges are almost identical.
    areas = sum(
        np.nan_to_num(shapely.area(shapely.clip_by_rect(shapes, *turned))) for turned in boxes
    )
    if not np.any(areas):
        return None
    rows = rows[areas >= np.max(areas) * (1 - _AREA_TOLERANCE)]
    left, right = search.spans(rows)
    shared = np.minimum(right, last) - np.maximum(left, first)
    joint = np.maximum(right, last) - np.minimum(left, first)
    return int(rows[np.argmax(shared / joint)])


def _turns(box: Box, search: Search) -> list[Box]:
    """Return a box, and its copies shifted by 360 degrees as far as there may be pairs."""
    if not search.crs.is_geographic:
        return [box]
    left, bottom, right, top = box
    if left > right:
        right += CIRCLE
    west, east = min(search.bounds[0], -CIRCLE / 2), max(search.bounds[2], CIRCLE / 2)
    shifts = [
        shift for shift in (0.0, -CIRCLE, CIRCLE) if left + shift <= east and right + shift >= west
    ]
    return [(left + shift, bottom, right + shift, top) for shift in shifts or [0.0]]
