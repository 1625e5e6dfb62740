"""Footprints of many files at a time."""

import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyproj
import shapely

from geofm import lonlat

#: Default CRS of spatial queries.
SEARCH_CRS = pyproj.CRS(4326)


def corners(
    epsg: npt.NDArray[np.int32],
    transform: npt.NDArray[np.float64],
    shape: npt.NDArray[np.int32],
    crs: pyproj.CRS = SEARCH_CRS,
) -> npt.NDArray[np.float64]:
    """Compute the corners of files.

    Args:
        epsg: EPSG code of each file, shape (N,); 0 or negative if it has none.
        transform: Affine coefficients a to f, shape (N, 6).
        shape: Height and width, shape (N, 2).
        crs: CRS of the corners.

    Returns:
        x and y of the four corners, float64 of shape (N, 4, 2), in the order of
        :meth:`geofm.grid.Grid.footprint`. Not finite where a corner has no position in *crs*.
    """
    a, b, c, d, e, f = (transform[:, i, None] for i in range(6))
    height, width = (shape[:, i, None].astype(float) for i in range(2))
    cols, rows = width * [0, 1, 1, 0], height * [0, 0, 1, 1]
    # Broken headers may hold NaN or huge numbers.
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
    """Return the outlines of files, also across the antimeridian and over a pole.

    Args:
        points: Corners as returned by :func:`corners`.
        crs: CRS of the corners.
        cut: Whether to cut outlines in longitude and latitude at 180 degrees, as file formats
            expect. Otherwise longitudes continue above 180.

    Returns:
        Polygons, or MultiPolygons where an outline is cut, shape (N,); None where a corner is not
        finite.
    """
    return lonlat.outlines(points, cut) if crs.is_geographic else outlines(points)


def extents(points: npt.NDArray[np.float64], crs: pyproj.CRS) -> npt.NDArray[np.float64]:
    """Return the bounds of files.

    Args:
        points: Corners as returned by :func:`corners`.
        crs: CRS of the corners.

    Returns:
        Left, bottom, right and top, shape (N, 4). For a file across the antimeridian, the right
        longitude exceeds 180.
    """
    if crs.is_geographic:
        return lonlat.extents(points)
    return np.concatenate((points.min(axis=1), points.max(axis=1)), axis=1)


def outlines(points: npt.NDArray[np.float64]) -> npt.NDArray[np.object_]:
    """Return polygons through corners, as points of a plane.

    Args:
        points: Corners as returned by :func:`corners`.

    Returns:
        Polygons, shape (N,); None where a corner is not finite.
    """
    shapes = np.full(len(points), None, dtype=object)
    known = np.isfinite(points).all(axis=(1, 2))
    shapes[known] = shapely.polygons(points[known])
    return shapes


def geoparquet_metadata(types: Sequence[str], bounds: Sequence[float] | None) -> str:
    """Describe a column 'geometry' in :data:`SEARCH_CRS`, https://geoparquet.org/releases/v1.0.0/.

    Args:
        types: Types of its geometries.
        bounds: Bounds of all geometries; None if they are unknown.

    Returns:
        The entry 'geo' of the metadata of a Parquet file, as JSON.
    """
    geometry = {
        'encoding': 'WKB',
        'geometry_types': list(types),
        'crs': SEARCH_CRS.to_json_dict(),
        **({} if bounds is None else {'bbox': list(bounds)}),
    }
    columns = {'geometry': geometry}
    return json.dumps({'version': '1.0.0', 'primary_column': 'geometry', 'columns': columns})


@lru_cache(maxsize=512)
def _transformer(epsg: int, crs: pyproj.CRS) -> pyproj.Transformer | None:
    """Return a cached transformer to a CRS; None if the points are in it already."""
    source = pyproj.CRS(epsg)
    if source == crs:
        return None
    # rasterio's transform fails for all points if one is outside the projection's domain.
    return pyproj.Transformer.from_crs(source, crs, always_xy=True)
