"""Where the pixels of a raster lie, and warping it onto a grid.

A raster is placed by its transform or by ground control points.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.errors import CRSError
from rasterio.io import DatasetReader
from rasterio.transform import Affine, GCPTransformer
from rasterio.warp import calculate_default_transform
from rasterio.warp import transform as transform_points
from rasterio.windows import Window

from geofm.grid import Grid, warp_values
from geofm.printing import warn

#: Points along each side of a grid that are transformed to find the window that it needs.
_LATTICE = 17

#: Pixels around a window that interpolation and GDAL's approximate transform may need.
_MARGIN = 4

type _Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Placement:
    """Where the pixels of a raster lie on the ground.

    Attributes:
        grid: Grid of the raster; with ground control points, a grid of the same extent with pixels
            of about the same size.
        shape: Height and width of the raster in pixels.
        gcps: Ground control points, if the raster has no transform.
        gcp_crs: CRS of the ground control points.
    """

    grid: Grid
    shape: tuple[int, int]
    gcps: tuple[GroundControlPoint, ...] = ()
    gcp_crs: CRS | None = None

    @classmethod
    def of(cls, src: DatasetReader) -> Self:
        """Return the placement of a raster.

        Args:
            src: Open raster.

        Returns:
            The placement.

        Raises:
            ValueError: If it has neither CRS and transform nor ground control points.
        """
        points, crs = src.gcps
        if src.transform != Affine.identity() or not points or crs is None:
            return cls(_own_grid(src), src.shape)
        if len(points) < 4:
            raise ValueError(f'{src.name}: {len(points)} ground control points are too few')
        grid = _grid_of_points(src, points, crs)
        warn(
            f'{src.name}: placed by its {len(points)} ground control points, on a grid in '
            f'{grid.crs.to_string()} if no other raster gives one; terrain is not corrected for'
        )
        return cls(grid, src.shape, tuple(points), crs)

    @property
    def is_regular(self) -> bool:
        """Whether the raster has the pixels of :attr:`grid`."""
        return not self.gcps

    def is_like(self, other: Self) -> bool:
        """Whether another raster has the same shape and the same ground control points."""
        mine, others = (
            (p.shape, p.gcp_crs, [(g.row, g.col, g.x, g.y, g.z) for g in p.gcps])
            for p in (self, other)
        )
        return mine == others

    def window_of(self, grid: Grid) -> Window | None:
        """Return the window of the raster that is needed to warp it onto a grid.

        Args:
            grid: The grid.

        Returns:
            A window of whole pixels; None if the raster and the grid do not overlap.
        """
        cols, rows = np.meshgrid(
            np.linspace(0, grid.width, _LATTICE), np.linspace(0, grid.height, _LATTICE)
        )
        xs, ys = grid.transform @ (cols.ravel(), rows.ravel())
        crs = self.gcp_crs or self.grid.crs
        if grid.crs != crs:
            xs, ys = (np.asarray(values) for values in transform_points(grid.crs, crs, xs, ys))
        found_rows, found_cols = self._pixels(xs, ys)
        known = np.isfinite(found_rows) & np.isfinite(found_cols)
        if not known.any():
            return None
        sides = []
        for found, own, wanted in zip(
            (found_rows[known], found_cols[known]), self.shape, grid.shape, strict=True
        ):
            low, high = float(found.min()), float(found.max())
            margin = _MARGIN * max(1.0, (high - low) / wanted)
            first, last = max(0, math.floor(low - margin)), min(own, math.ceil(high + margin))
            if first >= last:
                return None
            sides.append((first, last - first))
        (row, height), (col, width) = sides
        return Window(col, row, width, height)

    def _pixels(self, xs: _Floats, ys: _Floats) -> tuple[_Floats, _Floats]:
        """Return fractional rows and columns of coordinates in the CRS of the raster."""
        if self.is_regular:
            rows, cols = self.grid.pixel_of(xs, ys)
            return rows, cols
        known = np.isfinite(xs) & np.isfinite(ys)
        rows, cols = np.full(xs.shape, np.nan), np.full(xs.shape, np.nan)
        with GCPTransformer(self.gcps, tps=True) as transformer:
            rows[known], cols[known] = transformer.rowcol(xs[known], ys[known], op=float)
        return rows, cols

    def warp(
        self, values: npt.NDArray[np.float32], window: Window, grid: Grid, resampling: Resampling
    ) -> npt.NDArray[np.float32]:
        """Warp a window of the raster onto a grid.

        Args:
            values: Values of the window, of shape (C, H, W); NaN where there is no data.
            window: The window, in whole pixels of the raster.
            grid: The grid.
            resampling: Resampling method.

        Returns:
            Values on the grid, float32 of shape (C, H', W'); NaN where there is no data. Pixels
            without data do not influence their neighbours.
        """
        col, row = window.col_off, window.row_off
        place: dict[str, Any]
        if self.is_regular:
            transform = self.grid.transform @ Affine.translation(col, row)
            place = {'src_transform': transform, 'src_crs': self.grid.crs}
        else:
            gcps = [GroundControlPoint(p.row - row, p.col - col, p.x, p.y, p.z) for p in self.gcps]
            place = {'gcps': gcps, 'src_crs': self.gcp_crs, 'SRC_METHOD': 'GCP_TPS'}
        return warp_values(values, grid, resampling, **place)


def _own_grid(src: DatasetReader) -> Grid:
    """Return the grid of a raster with a CRS and a transform."""
    if src.transform == Affine.identity():
        if src.rpcs is not None:
            raise ValueError(
                f'{src.name}: georeferenced only by rational polynomials (RPC); warp it onto a '
                'grid first, e.g. with `gdalwarp -rpc -to RPC_DEM=dem.tif`'
            )
        raise ValueError(
            f'{src.name}: no CRS or no transform, so it is not georeferenced; set both, e.g. with '
            '`rio edit-info --crs EPSG:32633 --transform "[10, 0, 500000, 0, -10, 5000000]"`'
        )
    if src.crs is None and src.driver != 'GTiff':
        raise ValueError(
            f'{src.name}: no CRS; convert it to GeoTIFF with `rio convert`, then assign a CRS with '
            '`rio edit-info --crs`'
        )
    return Grid.of(src)


def _grid_of_points(src: DatasetReader, points: list[GroundControlPoint], crs: CRS) -> Grid:
    """Return a grid for a raster with ground control points, in UTM unless it is near a pole."""
    lon, lat = transform_points(
        crs, CRS.from_epsg(4326), [p.x for p in points], [p.y for p in points]
    )
    target = crs
    if crs.is_geographic and abs(float(np.mean(lat))) < 84:
        # The mean on the circle: a scene across the antimeridian has longitudes of both signs.
        turned = np.angle(np.exp(1j * np.radians(lon)).mean(), deg=True)
        zone = int((turned + 180) // 6) % 60 + 1
        target = CRS.from_epsg((32600 if np.mean(lat) >= 0 else 32700) + zone)
    try:
        transform, width, height = calculate_default_transform(
            crs, target, src.width, src.height, gcps=points
        )
    except CRSError as error:
        raise ValueError(
            f'{src.name}: no grid can be fitted to its ground control points: {error}'
        ) from error
    if width is None or height is None:
        raise ValueError(f'{src.name}: no grid can be fitted to its ground control points')
    return Grid(target, transform, height, width)
