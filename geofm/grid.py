"""A pixel grid on the ground as one value, and reading rasters on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

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
from rasterio.warp import transform as transform_points
from rasterio.windows import Window

#: Grids whose pixels lie closer than this, in pixels, are the same grid. Real files differ by
#: 1e-10 from rounding; a hundredth of a pixel is below what any resampling could resolve.
ALIGNMENT_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Grid:
    """Where the pixels of an image lie: CRS, transform and shape.

    Attributes:
        crs: Coordinate reference system.
        transform: Affine map from (column, row) to (x, y) of the CRS; (0, 0) is the outer corner
            of the first pixel.
        height: Number of rows.
        width: Number of columns.
    """

    crs: CRS
    transform: Affine
    height: int
    width: int

    @classmethod
    def of(cls, src: DatasetReader) -> Self:
        """Grid of an open raster.

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
                f'{src.name}: its transform {tuple(src.transform[:6])} places all pixels on a line '
                'or nowhere; assign another one, e.g. with `rio edit-info --transform`'
            )
        return cls(src.crs, src.transform, src.height, src.width)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.height, self.width

    @property
    def bounds(self) -> BoundingBox:
        """Left, bottom, right and top in units of the CRS, of a grid of any orientation."""
        # Not rasterio's array_bounds, which gives bottom > top for grids whose rows run north.
        corners = [(0, 0), (self.width, 0), (0, self.height), (self.width, self.height)]
        xs, ys = zip(*(self.transform @ corner for corner in corners), strict=True)
        return BoundingBox(min(xs), min(ys), max(xs), max(ys))

    @property
    def res(self) -> tuple[float, float]:
        """Pixel width and height in units of the CRS."""
        t = self.transform
        return math.hypot(t.a, t.d), math.hypot(t.b, t.e)

    def crop(self, row: int, col: int, height: int, width: int) -> Self:
        """Part of the grid.

        Args:
            row: First row.
            col: First column.
            height: Number of rows.
            width: Number of columns.

        Returns:
            The grid of that window; it may reach beyond this one.
        """
        transform = self.transform @ Affine.translation(col, row)
        return replace(self, transform=transform, height=height, width=width)

    def coarsen(self, factor: int) -> Self:
        """Grid of blocks of pixels, e.g. of a ViT's patches.

        Args:
            factor: Pixels a block, along rows and along columns.

        Returns:
            A grid with the same outer corner; blocks that are not full are left off.
        """
        return replace(
            self,
            transform=self.transform @ Affine.scale(factor),
            height=self.height // factor,
            width=self.width // factor,
        )

    def footprint(self, crs: CRS | None = None) -> shapely.Polygon:
        """Outline of the grid.

        Args:
            crs: CRS of the outline; that of the grid by default.

        Returns:
            The polygon through the four corners. Edges are not densified: over the few
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
                # Such as an engineering CRS, which lies nowhere on the Earth.
                raise ValueError(f'no way from {self.crs} to {crs}: {error}') from error
        return shapely.Polygon(zip(xs, ys, strict=True))

    def pixel_of(self, x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], ...]:
        """Pixel coordinates of points given in the CRS of the grid.

        Args:
            x: Eastings or longitudes.
            y: Northings or latitudes.

        Returns:
            Fractional (row, column); (0, 0) is the outer corner of the first pixel.
        """
        cols, rows = ~self.transform @ (np.asarray(x, float), np.asarray(y, float))
        return rows, cols

    def window_in(self, other: Self) -> Window | None:
        """Where this grid lies in another one, if both share their pixels.

        Args:
            other: Grid to look into.

        Returns:
            The window of *other* whose pixels are those of this grid, or None if the CRS,
            pixel size, orientation or alignment differ, or if it reaches beyond *other*.
        """
        offset = self.offset_in(other)
        if offset is None:
            return None
        row, col = offset
        inside = 0 <= col <= other.width - self.width and 0 <= row <= other.height - self.height
        return Window(col, row, self.width, self.height) if inside else None

    def offset_in(self, other: Self) -> tuple[int, int] | None:
        """Where this grid starts in another one, if both have the same pixels where they overlap.

        Args:
            other: Grid to look into.

        Returns:
            Row and column of *other*, which may lie outside it, of the first pixel of this grid;
            None if the CRS, pixel size, orientation or alignment differ.
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
    src: DatasetReader,
    grid: Grid,
    resampling: Resampling = Resampling.bilinear,
    fill: float | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Read all bands of a raster on a grid.

    Where the raster has the pixels of the grid, this is a plain window read and bit-exact.
    Only where CRS, origin or pixel size differ is the raster warped, once. Pixels without data do
    not bleed into their neighbours.

    Args:
        src: Open raster.
        grid: Grid to read on.
        resampling: How to warp, if it must be warped.
        fill: Number that marks a pixel as empty where all bands have it, in a raster without a
            nodata value. Only warping needs to know; a plain window read leaves it as it is.

    Returns:
        Pixels, float32 of shape (C, H, W), and where they are valid, bool of shape (H, W): inside
        the raster, finite, not its nodata value, and not masked by the file itself (an internal
        mask, a .msk file or an alpha band). Pixels that the raster does not cover are NaN, as are
        those without data if it was warped.
    """
    window = grid.window_in(Grid.of(src))
    if window is None:
        pixels = _warp(src, grid, resampling, fill)
        return pixels, np.isfinite(pixels).all(axis=0)
    pixels = src.read(window=window, out_dtype='float32')
    valid = np.isfinite(pixels).all(axis=0)
    if src.nodata is not None and not np.isnan(src.nodata):
        valid &= (pixels != np.float32(src.nodata)).all(axis=0)
    mask = own_mask(src, range(src.count), window)
    return pixels, valid if mask is None else valid & mask


def own_mask(
    src: DatasetReader, indices: Sequence[int], window: Window | None = None
) -> npt.NDArray[np.bool_] | None:
    """Where a file's own mask says that there are data; a nodata value is none.

    Args:
        src: Open raster.
        indices: Indices of the bands, from 0.
        window: Window in whole pixels; all of it by default.

    Returns:
        Where the internal mask, the ``.msk`` file and the alpha band that the file has are not 0,
        for all bands, (H, W); None if it has none of them.
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
        Its index, from 0; None if there is none.
    """
    return next((i for i, kind in enumerate(src.colorinterp) if kind is ColorInterp.alpha), None)


def _warp(
    src: DatasetReader, grid: Grid, resampling: Resampling, fill: float | None
) -> npt.NDArray[np.float32]:
    """Warp a raster onto a grid, NaN where there is no data."""
    # Nodata is a matter of each band: else GDAL blends the nodata value of one band if another has
    # data. Fill is a matter of all bands: 0 in one of them may be a measurement.
    nodata, unified = (fill, 'YES') if src.nodata is None else (src.nodata, 'NO')
    options = {
        'crs': grid.crs,
        'transform': grid.transform,
        'height': grid.height,
        'width': grid.width,
        'resampling': resampling,
        # An integer raster could not say NaN where it has no data.
        'dtype': 'float32',
    }
    if own_mask(src, range(src.count), Window(0, 0, 1, 1)) is not None:
        alpha = alpha_band(src)
        # GDAL heeds the mask only where no nodata value is given.
        options |= {'src_nodata': None, 'nodata': None, 'add_alpha': alpha is None}
        with WarpedVRT(src, **options) as vrt:
            pixels = vrt.read(out_dtype='float32')
        gone = pixels[src.count if alpha is None else alpha] == 0
        pixels[:, gone] = np.nan
        return pixels[: src.count]
    with WarpedVRT(
        src, src_nodata=nodata, nodata=float('nan'), UNIFIED_SRC_NODATA=unified, **options
    ) as vrt:
        return vrt.read(out_dtype='float32')
