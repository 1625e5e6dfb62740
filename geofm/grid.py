"""Georeferenced pixel grids, and reading rasters on a grid."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import shapely
from rasterio._err import CPLE_BaseError
from rasterio.coords import BoundingBox
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import reproject
from rasterio.warp import transform as transform_points
from rasterio.windows import Window

#: Maximum offset, in pixels, of grids that are considered aligned. Rounding in real files is about
#: 1e-10; a hundredth of a pixel is below what resampling can resolve.
ALIGNMENT_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Grid:
    """Georeferenced grid of the pixels of an image: CRS, transform and shape.

    Attributes:
        crs: Coordinate reference system.
        transform: Affine transform from (column, row) to (x, y) in the CRS; (0, 0) is the outer
            corner of the first pixel.
        height: Number of rows.
        width: Number of columns.
    """

    crs: CRS
    transform: Affine
    height: int
    width: int

    @classmethod
    def of(cls, src: DatasetReader) -> Self:
        """Return the grid of an open raster.

        Args:
            src: The raster.

        Returns:
            Its grid.

        Raises:
            ValueError: If the raster has no CRS, or its transform cannot be inverted.
        """
        if src.crs is None:
            raise ValueError(f'{src.name}: no CRS; assign one, e.g. with `rio edit-info --crs`')
        if not np.isfinite(src.transform[:6]).all() or src.transform.determinant == 0:
            raise ValueError(
                f'{src.name}: the transform {tuple(src.transform[:6])} is not finite or not '
                'invertible; assign another one, e.g. with `rio edit-info --transform`'
            )
        return cls(src.crs, src.transform, src.height, src.width)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height, self.width

    @property
    def bounds(self) -> BoundingBox:
        """Left, bottom, right and top in units of the CRS, for any orientation of the grid."""
        # Not rasterio's array_bounds, which returns bottom > top for south-up grids.
        corners = [(0, 0), (self.width, 0), (0, self.height), (self.width, self.height)]
        xs, ys = zip(*(self.transform @ corner for corner in corners), strict=True)
        return BoundingBox(min(xs), min(ys), max(xs), max(ys))

    @property
    def res(self) -> tuple[float, float]:
        """Pixel width and height in units of the CRS."""
        t = self.transform
        return math.hypot(t.a, t.d), math.hypot(t.b, t.e)

    def crop(self, row: int, col: int, height: int, width: int) -> Self:
        """Return the grid of a window.

        Args:
            row: First row.
            col: First column.
            height: Number of rows.
            width: Number of columns.

        Returns:
            The grid of the window, which may extend beyond this grid.
        """
        transform = self.transform @ Affine.translation(col, row)
        return replace(self, transform=transform, height=height, width=width)

    def coarsen(self, factor: int) -> Self:
        """Return the grid of square blocks of pixels, e.g. of the patches of a ViT.

        Args:
            factor: Side of a block in pixels.

        Returns:
            A grid with the same origin (the outer corner of the first pixel), without incomplete
            blocks.
        """
        return replace(
            self,
            transform=self.transform @ Affine.scale(factor),
            height=self.height // factor,
            width=self.width // factor,
        )

    def footprint(self, crs: CRS | None = None) -> shapely.Polygon:
        """Return the outline of the grid.

        Args:
            crs: CRS of the outline; by default that of the grid.

        Returns:
            The polygon through the four corners. Edges are not densified, since over the few
            kilometres of a patch their curvature is below a pixel.

        Raises:
            ValueError: If the CRS of the grid cannot be transformed to *crs*.
        """
        cols, rows = (0, self.width, self.width, 0), (0, 0, self.height, self.height)
        xs, ys = zip(
            *(self.transform @ (c, r) for c, r in zip(cols, rows, strict=True)), strict=True
        )
        if crs is not None and crs != self.crs:
            try:
                xs, ys = transform_points(self.crs, crs, xs, ys)
            except CPLE_BaseError as error:
                # E.g. an engineering CRS, which is not related to the Earth.
                raise ValueError(f'cannot transform {self.crs} to {crs}: {error}') from error
        return shapely.Polygon(zip(xs, ys, strict=True))

    def pixel_of(self, x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], ...]:
        """Return the pixel coordinates of points in the CRS of the grid.

        Args:
            x: Eastings or longitudes.
            y: Northings or latitudes.

        Returns:
            Fractional (row, column); (0, 0) is the outer corner of the first pixel.
        """
        cols, rows = ~self.transform @ (np.asarray(x, float), np.asarray(y, float))
        return rows, cols

    def window_in(self, other: Self) -> Window | None:
        """Return the window of another grid that has the pixels of this grid.

        Args:
            other: The other grid.

        Returns:
            The window of *other*; None if the CRS, pixel size, orientation or alignment differ, or
            if this grid extends beyond *other*.
        """
        offset = self.offset_in(other)
        if offset is None:
            return None
        row, col = offset
        inside = 0 <= col <= other.width - self.width and 0 <= row <= other.height - self.height
        return Window(col, row, self.width, self.height) if inside else None

    def offset_in(self, other: Self) -> tuple[int, int] | None:
        """Return the offset of this grid in another, aligned grid.

        Args:
            other: The other grid.

        Returns:
            Row and column in *other* of the first pixel of this grid, which may lie outside of
            *other*; None if the CRS, pixel size, orientation or alignment differ.
        """
        if self.crs != other.crs:
            return None
        to_other = ~other.transform @ self.transform
        corners = [(0, 0), (self.width, 0), (0, self.height), (self.width, self.height)]
        col, row = (round(v) for v in to_other @ (0, 0))
        for c, r in corners:
            other_col, other_row = to_other @ (c, r)
            if max(abs(other_col - col - c), abs(other_row - row - r)) > ALIGNMENT_TOLERANCE:
                return None
        return row, col


def read_on_grid(
    src: DatasetReader, grid: Grid, resampling: Resampling = Resampling.bilinear
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Read all bands of a raster on a grid.

    If the raster contains the pixels of the grid, they are read without resampling, bit for bit.
    Otherwise the raster is warped once, and pixels without data do not affect their neighbours.

    Args:
        src: Open raster.
        grid: Grid to read on.
        resampling: Resampling method for warping.

    Returns:
        Pixels, float32, shape (C, H, W), and which of them are valid, bool, shape (H, W). A pixel
        is valid if it is inside the raster, finite, not nodata, and not masked by an internal mask,
        a .msk file or an alpha band. Pixels outside the raster are NaN. After warping, so are
        pixels without data.
    """
    window = grid.window_in(Grid.of(src))
    if window is None:
        pixels = _warp(src, grid, resampling)
        return pixels, np.isfinite(pixels).all(axis=0)
    pixels = src.read(window=window, out_dtype='float32')
    valid = np.isfinite(pixels).all(axis=0)
    if src.nodata is not None and not np.isnan(src.nodata):
        valid &= (pixels != np.float32(src.nodata)).all(axis=0)
    mask = own_mask(src, range(src.count), window)
    return pixels, valid if mask is None else valid & mask


def warp_values(
    values: npt.NDArray[np.float32], grid: Grid, resampling: Resampling, **place: Any
) -> npt.NDArray[np.float32]:
    """Warp values onto a grid. Pixels without data do not influence their neighbours.

    Args:
        values: Values, of shape (C, H, W); NaN where there is no data.
        grid: The grid.
        resampling: Resampling method.
        **place: Location of the values, for :func:`rasterio.warp.reproject`: ``src_crs``, and
            ``src_transform`` or ``gcps``.

    Returns:
        Values on the grid, of shape (C, H', W'); NaN where there is no data.
    """
    warped = np.full((len(values), *grid.shape), np.nan, np.float32)
    reproject(
        values,
        warped,
        **place,
        src_nodata=np.nan,
        dst_transform=grid.transform,
        dst_crs=grid.crs,
        dst_nodata=np.nan,
        resampling=resampling,
    )
    return warped


def own_mask(
    src: DatasetReader, indices: Sequence[int], window: Window | None = None
) -> npt.NDArray[np.bool_] | None:
    """Read the mask of a file, without regard to nodata values.

    Args:
        src: Open raster.
        indices: Indices of the bands, from 0.
        window: Window in whole pixels; the whole raster by default.

    Returns:
        Which pixels are not 0 in the internal mask, the ``.msk`` file and the alpha band, for all
        bands, (H, W); None if the file has none of them.
    """
    masks = []
    if (alpha := alpha_band(src)) is not None:
        masks.append(src.read(alpha + 1, window=window))
    flags = [(i, src.mask_flag_enums[i]) for i in indices]
    told = {MaskFlags.all_valid, MaskFlags.nodata, MaskFlags.alpha}
    bands = [i for i, kinds in flags if not told & set(kinds)]
    if bands and all(MaskFlags.per_dataset in src.mask_flag_enums[i] for i in bands):
        bands = bands[:1]
    masks += [src.read_masks(i + 1, window=window) for i in bands]
    if not masks:
        return None
    return np.asarray(np.logical_and.reduce([mask != 0 for mask in masks]))


def alpha_band(src: DatasetReader) -> int | None:
    """Find the alpha band of a raster.

    Args:
        src: Open raster.

    Returns:
        Index of the band, from 0; None if there is none.
    """
    return next((i for i, kind in enumerate(src.colorinterp) if kind is ColorInterp.alpha), None)


def _warp(src: DatasetReader, grid: Grid, resampling: Resampling) -> npt.NDArray[np.float32]:
    """Warp a raster onto a grid, with NaN for pixels without data."""
    options = {
        'crs': grid.crs,
        'transform': grid.transform,
        'height': grid.height,
        'width': grid.width,
        'resampling': resampling,
        # Integers have no NaN.
        'dtype': 'float32',
    }
    if own_mask(src, range(src.count), Window(0, 0, 1, 1)) is not None:
        alpha = alpha_band(src)
        # GDAL only uses the mask if there is no nodata value.
        options |= {'src_nodata': None, 'nodata': None, 'add_alpha': alpha is None}
        with WarpedVRT(src, **options) as vrt:
            pixels = vrt.read(out_dtype='float32')
        gone = pixels[src.count if alpha is None else alpha] == 0
        pixels[:, gone] = np.nan
        return pixels[: src.count]
    # Bands are masked separately. Otherwise GDAL would interpolate the nodata value of a band where
    # another band has data.
    options |= {'src_nodata': src.nodata, 'nodata': float('nan'), 'UNIFIED_SRC_NODATA': 'NO'}
    with WarpedVRT(src, **options) as vrt:
        return vrt.read(out_dtype='float32')
