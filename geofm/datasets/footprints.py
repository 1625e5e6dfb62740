"""Outlines of many files at a time."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyproj
import shapely

from geofm import lonlat

#: CRS in which pairs are searched by default, that of the real data set.
SEARCH_CRS = pyproj.CRS(4326)


def corners(
    epsg: npt.NDArray[np.int32],
    transform: npt.NDArray[np.float64],
    shape: npt.NDArray[np.int32],
    crs: pyproj.CRS = SEARCH_CRS,
) -> npt.NDArray[np.float64]:
    """Corners of files.

    Args:
        epsg: EPSG code of each file, shape (N,); not positive where there is none.
        transform: Affine coefficients a to f, shape (N, 6).
        shape: Height and width, shape (N, 2).
        crs: CRS of the corners.

    Returns:
        x and y of the four corners, float64 of shape (N, 4, 2), as of
        :meth:`geofm.grid.Grid.footprint`; not finite where they lie nowhere in *crs*.
    """
    a, b, c, d, e, f = (transform[:, i, None] for i in range(6))
    height, width = (shape[:, i, None].astype(float) for i in range(2))
    cols, rows = width * [0, 1, 1, 0], height * [0, 0, 1, 1]
    # Broken headers have numbers of all kinds.
    with np.errstate(invalid='ignore', over='ignore'):
        points = np.stack((a * cols + b * rows + c, d * cols + e * rows + f), axis=-1)
    points[epsg <= 0] = np.nan
    for code in np.unique(epsg[epsg > 0]).tolist():
        transformer = _transformer(code, crs)
        if transformer is not None:
            there = epsg == code
            points[there] = np.stack(
                transformer.transform(points[there, :, 0], points[there, :, 1]), axis=-1
            )
    return points


def shapes_on_ground(
    points: npt.NDArray[np.float64], crs: pyproj.CRS, cut: bool = True
) -> npt.NDArray[np.object_]:
    """Outlines of files, also across the antimeridian and over a pole.

    Args:
        points: As of :func:`corners`.
        crs: CRS of the corners.
        cut: Whether to cut outlines in longitude and latitude at 180 degrees, as files have them.
            Otherwise their longitudes run on beyond it.

    Returns:
        Polygons, and MultiPolygons where one is cut, shape (N,); None where a corner is not finite.
    """
    return lonlat.outlines(points, cut) if crs.is_geographic else outlines(points)


def extents(points: npt.NDArray[np.float64], crs: pyproj.CRS) -> npt.NDArray[np.float64]:
    """Bounds of files.

    Args:
        points: As of :func:`corners`.
        crs: CRS of the corners.

    Returns:
        Left, bottom, right and top, shape (N, 4); of longitudes the right one is beyond 180 for a
        file across it.
    """
    if crs.is_geographic:
        return lonlat.extents(points)
    return np.concatenate((points.min(axis=1), points.max(axis=1)), axis=1)


def outlines(points: npt.NDArray[np.float64]) -> npt.NDArray[np.object_]:
    """Polygons through corners, as points of a plane.

    Args:
        points: As of :func:`corners`.

    Returns:
        Polygons, shape (N,); None where a corner is not finite.
    """
    shapes = np.full(len(points), None, dtype=object)
    known = np.isfinite(points).all(axis=(1, 2))
    shapes[known] = shapely.polygons(points[known])
    return shapes


@lru_cache(maxsize=512)
def _transformer(epsg: int, crs: pyproj.CRS) -> pyproj.Transformer | None:
    """What brings points to a CRS; None if they are in it. Making one takes milliseconds."""
    source = pyproj.CRS(epsg)
    if source == crs:
        return None
    # Not rasterio's, which refuses all points if one lies outside of the projection's domain.
    return pyproj.Transformer.from_crs(source, crs, always_xy=True)
