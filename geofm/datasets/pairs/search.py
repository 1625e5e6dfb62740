"""Finding pairs by place and time."""

from typing import Any, Protocol

import geopandas as gpd
import numpy as np
import numpy.typing as npt
import pandas as pd
import shapely
from pyproj import CRS

from geofm.datasets.catalogue.footprints import outlines
from geofm.datasets.catalogue.scenes import Rows
from geofm.datasets.pairs.table import PLACE, PairTable

#: Areas of overlap closer than this, relative to the larger, count as equal.
_AREA_TOLERANCE = 1e-6

#: Pairs whose corners are worked out together.
_AT_ONCE = 1 << 16

#: Left, bottom, right and top.
type Box = tuple[float, float, float, float]


class Search(Protocol):
    """Outlines and times of pairs."""

    def near(self, box: shapely.Polygon) -> Rows:
        """Numbers of pairs that may touch a box, sorted; none that does is missing."""

    def shapes(self, rows: Rows) -> npt.NDArray[np.object_]:
        """Outlines of pairs."""

    def spans(self, rows: Rows) -> tuple[Any, Any]:
        """Start and end of pairs."""


class TableSearch:
    """Search in a table of pairs.

    The tree has an entry for each place, of which there are far fewer than pairs.

    Attributes:
        bounds: Of all pairs.
    """

    def __init__(self, table: PairTable, crs: CRS) -> None:
        """Initialize a new TableSearch instance.

        Args:
            table: The pairs.
            crs: CRS to search in.
        """
        self.table = table
        self.crs = crs
        self._starts = np.append(_starts(table), len(table))
        boxes = self._boxes()
        # Of places that lie nowhere in the CRS there is nothing to find.
        there = np.isfinite(boxes).all(axis=1)
        shapes = np.full(len(boxes), None, dtype=object)
        shapes[there] = shapely.box(*boxes[there].T)
        self._tree = shapely.STRtree(shapes)
        low, high = boxes[there, :2].min(axis=0), boxes[there, 2:].max(axis=0)
        self.bounds: Box = (*low.tolist(), *high.tolist())

    def near(self, box: shapely.Polygon) -> Rows:
        """Find pairs.

        Args:
            box: Where.

        Returns:
            Numbers of the pairs of all places whose bounds touch the box, sorted.
        """
        places = np.sort(self._tree.query(box))
        parts = [np.arange(*self._starts[place : place + 2]) for place in places.tolist()]
        return np.concatenate([np.zeros(0, np.intp), *parts])

    def shapes(self, rows: Rows) -> npt.NDArray[np.object_]:
        """Outlines of pairs.

        Args:
            rows: Numbers of the pairs.

        Returns:
            Polygons.
        """
        return outlines(self.table.corners(rows, self.crs))

    def spans(self, rows: Rows) -> tuple[Any, Any]:
        """When pairs were taken.

        Args:
            rows: Numbers of the pairs.

        Returns:
            Start and end of each.
        """
        return self.table.spans(rows)

    def _boxes(self) -> npt.NDArray[np.float64]:
        """Bounds of each place, shape (places, 4)."""
        boxes = np.empty((len(self.table), 4))
        for first in range(0, len(self.table), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            points = self.table.corners(part, self.crs)
            boxes[part, :2], boxes[part, 2:] = points.min(axis=1), points.max(axis=1)
        starts = self._starts[:-1]
        return np.concatenate(
            (
                np.minimum.reduceat(boxes[:, :2], starts, axis=0),
                np.maximum.reduceat(boxes[:, 2:], starts, axis=0),
            ),
            axis=1,
        )


class FrameSearch:
    """Search in an index that was set from outside, whose outlines may be any."""

    def __init__(self, frame: gpd.GeoDataFrame) -> None:
        """Initialize a new FrameSearch instance.

        Args:
            frame: The index.
        """
        self.frame = frame
        self.bounds: Box = tuple(frame.total_bounds.tolist())

    def near(self, box: shapely.Polygon) -> Rows:
        """Find pairs.

        Args:
            box: Where.

        Returns:
            Numbers of the pairs that touch the box, sorted.
        """
        return np.sort(self.frame.sindex.query(box, predicate='intersects'))

    def shapes(self, rows: Rows) -> npt.NDArray[np.object_]:
        """Outlines of pairs.

        Args:
            rows: Numbers of the pairs.

        Returns:
            Polygons.
        """
        return self.frame.geometry.array[rows].to_numpy()

    def spans(self, rows: Rows) -> tuple[Any, Any]:
        """When pairs were taken.

        Args:
            rows: Numbers of the pairs.

        Returns:
            Start and end of each.
        """
        spans = self.frame.index[rows]
        return spans.left.to_numpy('datetime64[us]'), spans.right.to_numpy('datetime64[us]')


def best_pair(search: Search, box: Box, start: pd.Timestamp, stop: pd.Timestamp) -> int | None:
    """Find the pair that best answers a query.

    Args:
        search: The pairs.
        box: Where.
        start: From when.
        stop: Until when.

    Returns:
        Number of the pair that overlaps the box most among those that touch it in space and time;
        of several, the one whose interval is most like that asked for (intersection over union);
        of several still, the first. None if there is none.
    """
    query = shapely.box(*box)
    first, last = (time.to_datetime64().astype('datetime64[us]') for time in (start, stop))
    near = search.near(query)
    left, right = search.spans(near)
    near = near[(left <= last) & (right >= first) & (first <= last)]
    # Not intersection(), which takes ten times as long where edges are all but the same.
    areas = np.nan_to_num(shapely.area(shapely.clip_by_rect(search.shapes(near), *box)))
    if not areas.any():
        return None
    near = near[areas >= areas.max() * (1 - _AREA_TOLERANCE)]
    left, right = search.spans(near)
    shared = np.minimum(right, last) - np.maximum(left, first)
    joint = np.maximum(right, last) - np.minimum(left, first)
    return int(near[np.argmax(shared / joint)])


def _starts(table: PairTable) -> Rows:
    """Number of the first pair of each place."""
    new = np.zeros(len(table), bool)
    new[:1] = True
    for name in PLACE:
        column = table.records[name]
        new[1:] |= column[1:] != column[:-1]
    return np.flatnonzero(new)
