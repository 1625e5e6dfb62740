"""Outlines and extents in longitude and latitude, across the antimeridian and over the poles.

If the corners of an outline across the antimeridian are treated as points in a plane, the outline
extends around the rest of the globe. Therefore outlines are *unrolled*: each corner is within 180
degrees of the previous one, and the westernmost is in [-180, 180), so that longitudes may exceed
180. In files, outlines are cut at 180 degrees, as RFC 7946 requires.
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

#: Maximum distance from a pole, in degrees, of corners that are considered to be on the pole. Their
#: longitude is undefined.
_AT_POLE = 1e-9


def near(value: npt.ArrayLike, reference: npt.ArrayLike, period: float = CIRCLE) -> Doubles:
    """Shift angles by whole turns to within half a turn of others.

    Args:
        value: Longitudes, or x coordinates of a projection that covers the globe.
        reference: Longitudes to be close to.
        period: A whole turn in the unit of the values.

    Returns:
        The shifted values; unchanged if they are within half a turn already.
    """
    value, reference = np.asarray(value, float), np.asarray(reference, float)
    with np.errstate(invalid='ignore'):
        return value - period * np.round((value - reference) / period)


def wrap(longitude: npt.ArrayLike) -> Doubles:
    """Shift longitudes by whole turns to [-180, 180]. Those in this range do not change.

    Args:
        longitude: Longitudes in degrees.

    Returns:
        Longitudes in degrees.
    """
    longitude = np.asarray(longitude, float)
    inside = np.abs(longitude) <= CIRCLE / 2
    return np.where(inside, longitude, (longitude + CIRCLE / 2) % CIRCLE - CIRCLE / 2)


def turns(west: float, east: float) -> tuple[int, ...]:
    """Return the numbers of whole turns that shift longitudes of [-180, 180] into a range.

    Args:
        west: Smallest longitude of the range in degrees.
        east: Largest longitude of the range in degrees.

    Returns:
        Numbers in ascending order: ``(0,)`` for a range in [-180, 180], ``(0, 1)`` for a range
        across 180 degrees.
    """
    first = math.floor(west / CIRCLE + 0.5)
    return tuple(range(first, max(first, math.ceil(east / CIRCLE - 0.5)) + 1))


def unroll(points: Doubles) -> Doubles:
    """Unroll outlines, so that their edges go the short way around the globe.

    Args:
        points: Longitude and latitude of the corners of outlines, shape (..., K, 2).

    Returns:
        The same corners, each within 180 degrees of the previous one, the westernmost in
        [-180, 180). Outlines in [-180, 180] that do not cross the antimeridian are unchanged, as is
        NaN.
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
    """Return whether outlines go around a pole, or touch it.

    Args:
        points: Longitude and latitude of the corners of outlines, shape (..., K, 2).

    Returns:
        Booleans of shape (...).
    """
    lon, lat = points[..., 0], points[..., 1]
    with np.errstate(invalid='ignore'):
        steps = np.roll(lon, -1, axis=-1) - lon
        turn = (steps - CIRCLE * np.round(steps / CIRCLE)).sum(axis=-1)
        return (np.abs(turn) > CIRCLE / 2) | (np.abs(lat).max(axis=-1) >= 90 - _AT_POLE)


def extents(points: Doubles) -> Doubles:
    """Return the west, south, east and north limits of outlines.

    Args:
        points: Longitude and latitude of the corners of outlines, shape (N, K, 2).

    Returns:
        Limits, shape (N, 4). West is in [-180, 180), and east is not less than west; it exceeds 180
        for an outline across the antimeridian. An outline around a pole extends over all
        longitudes, up to the pole.
    """
    turned = unroll(points)
    boxes = np.concatenate([turned.min(axis=-2), turned.max(axis=-2)], axis=-1)
    for i in np.flatnonzero(encircles_pole(points)):
        boxes[i] = _polar(points[i]).bounds
    return boxes


def outlines(points: Doubles, cut: bool = True) -> npt.NDArray[np.object_]:
    """Make polygons of outlines.

    Args:
        points: Longitude and latitude of the corners of outlines, shape (N, K, 2).
        cut: Whether to cut polygons at 180 degrees, as required in files. Otherwise longitudes may
            exceed 180.

    Returns:
        Polygons, and MultiPolygons for those that are cut, shape (N,); None if a corner is not
        finite.
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
    """Cut a polygon at the antimeridian.

    Args:
        shape: A polygon with any longitudes.

    Returns:
        The same area with longitudes in [-180, 180].
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
    """Return the polygon in longitude and latitude of an outline around or through a pole."""
    pole = 90.0 if points[:, 1].mean() > 0 else -90.0
    if (points[0] == points[-1]).all():
        points = points[:-1]
    on_pole = np.abs(points[:, 1]) >= 90 - _AT_POLE
    around = not on_pole.any()
    if around:
        ring = np.concatenate([points, points[:1]])
    else:
        # From the corner after the pole to the corner before it. The pole is the edge between them.
        first = int(np.flatnonzero(on_pole)[-1]) + 1
        ring = np.roll(points, -first, axis=0)[: len(points) - on_pole.sum()]
    ring[:, 0] = np.unwrap(ring[:, 0], period=CIRCLE)
    edge = [[ring[-1, 0], pole], [ring[0, 0], pole]]
    shape = shapely.Polygon(np.concatenate([ring, edge]))
    return cut_at_antimeridian(shape)


def bounding_box(boxes: Doubles) -> tuple[float, float, float, float]:
    """Return the bounding box of outlines, as in GeoJSON and GeoParquet.

    Args:
        boxes: Limits from :func:`extents`, shape (N, 4), N > 0.

    Returns:
        West, south, east and north. If the box crosses the antimeridian, west is greater than east
        (RFC 7946, 5.2).
    """
    south, north = float(boxes[:, 1].min()), float(boxes[:, 3].max())
    west, east = float(boxes[:, 0].min()), float(boxes[:, 2].max())
    if east - west <= CIRCLE / 2 and east <= CIRCLE / 2:
        return west, south, east, north
    # The box leaves out the widest gap between the outlines.
    order = np.argsort(boxes[:, 0], kind='stable')
    starts, ends = boxes[order, 0], np.maximum.accumulate(boxes[order, 2])
    gaps = np.append(starts[1:], starts[0] + CIRCLE) - ends
    # Outlines beyond 180 degrees may cover gaps in the west.
    gaps = np.minimum(gaps, np.append(starts[1:] - (ends[-1] - CIRCLE), gaps[-1]))
    widest = len(gaps) - 1 if gaps[-1] >= gaps.max() else int(gaps.argmax())
    if gaps[widest] <= 0:
        return -180.0, south, 180.0, north
    west = float(starts[(widest + 1) % len(starts)])
    last = widest == len(gaps) - 1
    east = ends[-1] if last else max(ends[widest], ends[-1] - CIRCLE)
    return west, south, float(wrap(east)), north


def transform_to_lonlat(grid: Grid, xs: npt.ArrayLike, ys: npt.ArrayLike) -> Doubles:
    """Transform points from the CRS of a grid to longitude and latitude.

    Args:
        grid: The grid.
        xs: x coordinates, of any shape.
        ys: y coordinates, of the same shape.

    Returns:
        Longitude and latitude in degrees, shape (..., 2). If the CRS is longitude and latitude, the
        coordinates are unchanged.
    """
    xs, ys = np.asarray(xs, float), np.asarray(ys, float)
    if grid.crs == LONLAT:
        return np.stack([xs, ys], axis=-1)
    lon, lat = transform_points(grid.crs, LONLAT, xs.ravel(), ys.ravel())
    return np.stack([np.reshape(lon, xs.shape), np.reshape(lat, ys.shape)], axis=-1)


def boundary(grid: Grid, steps: int = 16) -> Doubles:
    """Return the longitude and latitude of points on the edges of a grid.

    Args:
        grid: The grid.
        steps: Number of segments per edge, since straight edges of the grid are curved in longitude
            and latitude.

    Returns:
        Points of the outline, shape (4 * steps, 2).
    """
    way = np.arange(steps) / steps
    zero, one = np.zeros(steps), np.ones(steps)
    cols = grid.width * np.concatenate([way, one, 1 - way, zero])
    rows = grid.height * np.concatenate([zero, way, one, 1 - way])
    xs, ys = grid.transform @ (cols, rows)
    return transform_to_lonlat(grid, xs, ys)


def bounds(grid: Grid) -> tuple[float, float, float, float]:
    """Return the bounding box of a grid in longitude and latitude.

    Args:
        grid: The grid.

    Returns:
        West, south, east and north in degrees. West is greater than east if the box crosses the
        antimeridian.
    """
    return bounding_box(extents(boundary(grid)[None]))


def pixel_at(grid: Grid, longitude: float, latitude: float) -> tuple[float, float]:
    """Return the pixel coordinates of a place.

    Args:
        grid: The grid.
        longitude: Longitude in degrees, in any range.
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


def pixel_in(grid: Grid, longitude: float, latitude: float, name: object) -> tuple[int, int]:
    """Return the pixel of a scene at a place.

    Args:
        grid: Grid of the scene.
        longitude: Longitude in degrees.
        latitude: Latitude in degrees.
        name: Name of the scene, for the message.

    Returns:
        Row and column.

    Raises:
        ValueError: If the place lies outside the scene.
    """
    row, col = pixel_at(grid, longitude, latitude)
    if not (0 <= row < grid.height and 0 <= col < grid.width):
        raise ValueError(
            f'{name}: {longitude}, {latitude} is outside the scene, which is at '
            f'{describe(bounds(grid))}'
        )
    return int(row), int(col)


def describe(box: tuple[float, float, float, float]) -> str:
    """Describe a bounding box, for messages.

    Args:
        box: West, south, east and north in degrees.

    Returns:
        The description.
    """
    west, south, east, north = box
    return f'longitudes {west:.4f} to {east:.4f} and latitudes {south:.4f} to {north:.4f}'
