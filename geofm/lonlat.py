"""Longitudes on a globe: outlines across 180 degrees and over a pole, extents, distances to wrap.

Longitude is an angle. An outline across the antimeridian whose corners are taken for points of a
plane goes the other way around the globe. Here outlines are kept *unrolled*: each corner within
180 degrees of the one before, the westernmost in [-180, 180), so that longitudes may run on beyond
180. In files they are cut at 180 degrees, as RFC 7946 has it.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from rasterio.crs import CRS
from rasterio.warp import transform as transform_points
from shapely.affinity import translate

from geofm.grid import Grid

type Doubles = npt.NDArray[np.float64]

#: Longitude and latitude.
LONLAT = CRS.from_epsg(4326)

#: Degrees around the globe.
CIRCLE = 360.0

#: Corners nearer to a pole than this, in degrees, lie on it; they have no longitude.
_AT_POLE = 1e-9


def near(value: npt.ArrayLike, reference: npt.ArrayLike, period: float = CIRCLE) -> Doubles:
    """Bring angles to within half a turn of others.

    Args:
        value: Longitudes, or x in a projection that goes around the globe.
        reference: Longitudes that they should be near to.
        period: A whole turn, in the unit of the values.

    Returns:
        The values plus or minus whole turns; unchanged where they are near already.
    """
    value, reference = np.asarray(value, float), np.asarray(reference, float)
    with np.errstate(invalid='ignore'):
        return value - period * np.round((value - reference) / period)


def wrap(longitude: npt.ArrayLike) -> Doubles:
    """Bring longitudes to [-180, 180]; those that are there do not change.

    Args:
        longitude: Longitudes in degrees.

    Returns:
        Longitudes in degrees.
    """
    longitude = np.asarray(longitude, float)
    inside = np.abs(longitude) <= CIRCLE / 2
    return np.where(inside, longitude, (longitude + CIRCLE / 2) % CIRCLE - CIRCLE / 2)


def turns(west: float, east: float) -> tuple[int, ...]:
    """Whole turns that bring longitudes of [-180, 180] into a range.

    Args:
        west: Least longitude of the range in degrees.
        east: Greatest longitude.

    Returns:
        Their numbers, ascending: ``(0,)`` for a range in [-180, 180], ``(0, 1)`` for one across 180
        degrees.
    """
    first = math.floor(west / CIRCLE + 0.5)
    return tuple(range(first, max(first, math.ceil(east / CIRCLE - 0.5)) + 1))


def unroll(points: Doubles) -> Doubles:
    """Make the corners of outlines follow each other the short way around the globe.

    Args:
        points: Longitude and latitude of the corners of outlines, shape (..., K, 2).

    Returns:
        The same corners, each within 180 degrees of the one before, the westernmost in [-180, 180).
        Those of an outline that lies in [-180, 180] and does not cross are unchanged. NaN stays.
    """
    lon = points[..., 0]
    with np.errstate(invalid='ignore'):
        odd = (np.ptp(lon, axis=-1) > CIRCLE / 2) | (np.abs(lon).max(axis=-1) > CIRCLE / 2)
    if not odd.any():
        return points
    points = points.copy()
    turned = np.unwrap(lon[odd], period=CIRCLE, axis=-1)
    west = turned.min(axis=-1, keepdims=True)
    points[odd, :, 0] = turned - CIRCLE * np.floor((west + CIRCLE / 2) / CIRCLE)
    return points


def encircles_pole(points: Doubles) -> npt.NDArray[np.bool_]:
    """Whether outlines go around a pole, or touch it.

    Args:
        points: Longitude and latitude of the corners of outlines, shape (..., K, 2).

    Returns:
        Shape (...).
    """
    lon, lat = points[..., 0], points[..., 1]
    with np.errstate(invalid='ignore'):
        steps = np.roll(lon, -1, axis=-1) - lon
        turn = (steps - CIRCLE * np.round(steps / CIRCLE)).sum(axis=-1)
        return (np.abs(turn) > CIRCLE / 2) | (np.abs(lat).max(axis=-1) >= 90 - _AT_POLE)


def extents(points: Doubles) -> Doubles:
    """West, south, east and north of outlines.

    Args:
        points: Longitude and latitude of the corners of outlines, shape (N, K, 2).

    Returns:
        Shape (N, 4): west in [-180, 180), east at least west and beyond 180 for an outline across
        it. All longitudes, up to the pole, for one that goes around a pole.
    """
    turned = unroll(points)
    boxes = np.concatenate([turned.min(axis=-2), turned.max(axis=-2)], axis=-1)
    for i in np.flatnonzero(encircles_pole(points)):
        boxes[i] = _polar(points[i]).bounds
    return boxes


def outlines(points: Doubles, cut: bool = True) -> npt.NDArray[np.object_]:
    """Polygons through corners.

    Args:
        points: Longitude and latitude of the corners of outlines, shape (N, K, 2).
        cut: Whether to cut polygons at 180 degrees, as files have them. Otherwise their longitudes
            run on beyond it.

    Returns:
        Polygons, and MultiPolygons where one is cut, shape (N,); None where a corner is not finite.
    """
    shapes = np.full(len(points), None, dtype=object)
    known = np.isfinite(points).all(axis=(1, 2))
    turned = unroll(points[known])
    shapes[known] = shapely.polygons(turned)
    numbers = np.flatnonzero(known)
    for i in numbers[encircles_pole(points[known])]:
        shapes[i] = _polar(points[i])
    if cut:
        for i in numbers[turned[..., 0].max(axis=-1, initial=0) > CIRCLE / 2]:
            shapes[i] = cut_at_antimeridian(shapes[i])
    return shapes


def cut_at_antimeridian(shape: Any) -> Any:
    """Cut a shape whose longitudes run on beyond 180 degrees.

    Args:
        shape: A polygon; its longitudes may be any.

    Returns:
        The same ground with longitudes in [-180, 180].
    """
    west, south, east, north = shape.bounds
    parts = []
    for turn in range(int(np.floor((west + 180) / 360)), int(np.ceil((east - 180) / 360)) + 1):
        shift = CIRCLE * turn
        # Not clip_by_rect, which returns the whole rectangle for some slivers.
        part = shape.intersection(shapely.box(shift - 180, south - 1, shift + 180, north + 1))
        if not part.is_empty and part.area > 0:
            parts.append(translate(part, -shift))
    return parts[0] if len(parts) == 1 else shapely.union_all(parts)


def _polar(points: Doubles) -> Any:
    """Polygon around a pole, or with a corner on it, in longitude and latitude."""
    pole = 90.0 if points[:, 1].mean() > 0 else -90.0
    if (points[0] == points[-1]).all():
        points = points[:-1]
    on_pole = np.abs(points[:, 1]) >= 90 - _AT_POLE
    around = not on_pole.any()
    if around:
        ring = np.concatenate([points, points[:1]])
    else:
        # From the corner after the pole to that before it; the pole is an edge between them.
        first = int(np.flatnonzero(on_pole)[-1]) + 1
        ring = np.roll(points, -first, axis=0)[: len(points) - on_pole.sum()]
    ring[:, 0] = np.unwrap(ring[:, 0], period=CIRCLE)
    edge = [[ring[-1, 0], pole], [ring[0, 0], pole]]
    shape = shapely.Polygon(np.concatenate([ring, edge]))
    return cut_at_antimeridian(shape)


def bounding_box(boxes: Doubles) -> tuple[float, float, float, float]:
    """West, south, east and north of many outlines, as GeoJSON and GeoParquet give them.

    Args:
        boxes: Of :func:`extents`, shape (N, 4), N at least 1.

    Returns:
        The box; if it crosses the antimeridian, west is greater than east (RFC 7946, 5.2).
    """
    south, north = float(boxes[:, 1].min()), float(boxes[:, 3].max())
    west, east = float(boxes[:, 0].min()), float(boxes[:, 2].max())
    if east - west <= CIRCLE / 2 and east <= CIRCLE / 2:
        return west, south, east, north
    # What is left out is the widest gap between them.
    order = np.argsort(boxes[:, 0], kind='stable')
    starts, ends = boxes[order, 0], np.maximum.accumulate(boxes[order, 2])
    gaps = np.append(starts[1:], starts[0] + CIRCLE) - ends
    # Of what lies beyond 180 degrees, before the westernmost.
    gaps = np.minimum(gaps, np.append(starts[1:] - (ends[-1] - CIRCLE), gaps[-1]))
    widest = len(gaps) - 1 if gaps[-1] >= gaps.max() else int(gaps.argmax())
    if gaps[widest] <= 0:
        return -180.0, south, 180.0, north
    west = float(starts[(widest + 1) % len(starts)])
    last = widest == len(gaps) - 1
    east = ends[-1] if last else max(ends[widest], ends[-1] - CIRCLE)
    return west, south, float(wrap(east)), north


def transform_to_lonlat(grid: Grid, xs: npt.ArrayLike, ys: npt.ArrayLike) -> Doubles:
    """Longitude and latitude of points of a grid's CRS.

    Args:
        grid: The grid.
        xs: x of the points, of any shape.
        ys: y of the points.

    Returns:
        Shape (..., 2); longitudes of a grid in longitude and latitude as they are.
    """
    xs, ys = np.asarray(xs, float), np.asarray(ys, float)
    if grid.crs == LONLAT:
        return np.stack([xs, ys], axis=-1)
    lon, lat = transform_points(grid.crs, LONLAT, xs.ravel(), ys.ravel())
    return np.stack([np.reshape(lon, xs.shape), np.reshape(lat, ys.shape)], axis=-1)


def boundary(grid: Grid, steps: int = 16) -> Doubles:
    """Longitude and latitude along the edges of a grid.

    Args:
        grid: The grid.
        steps: Pieces into which each edge is cut: an edge that is straight on the grid is not in
            degrees.

    Returns:
        Corners of its outline, shape (4 steps, 2).
    """
    way = np.arange(steps) / steps
    zero, one = np.zeros(steps), np.ones(steps)
    cols = grid.width * np.concatenate([way, one, 1 - way, zero])
    rows = grid.height * np.concatenate([zero, way, one, 1 - way])
    xs, ys = grid.transform @ (cols, rows)
    return transform_to_lonlat(grid, xs, ys)


def bounds(grid: Grid) -> tuple[float, float, float, float]:
    """West, south, east and north of a grid.

    Args:
        grid: The grid.

    Returns:
        The box in degrees; west is greater than east if it crosses the antimeridian.
    """
    return bounding_box(extents(boundary(grid)[None]))


def pixel_at(grid: Grid, longitude: float, latitude: float) -> tuple[float, float]:
    """Pixel coordinates of a place.

    Args:
        grid: The grid.
        longitude: Longitude in degrees, by any number of turns.
        latitude: Latitude in degrees.

    Returns:
        Fractional (row, column), see :meth:`geofm.grid.Grid.pixel_of`.
    """
    x, y = transform_points(LONLAT, grid.crs, [float(wrap(longitude))], [latitude])
    if grid.crs.is_geographic:
        middle, _ = grid.transform @ (grid.width / 2, grid.height / 2)
        x = near(x, middle).tolist()
    rows, cols = grid.pixel_of(x, y)
    return float(rows[0]), float(cols[0])


def describe(box: tuple[float, float, float, float]) -> str:
    """A box in words, for messages.

    Args:
        box: West, south, east and north.

    Returns:
        One phrase.
    """
    west, south, east, north = box
    return f'longitudes {west:.4f} to {east:.4f} and latitudes {south:.4f} to {north:.4f}'
