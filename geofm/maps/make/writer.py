"""Rasters of patch values as Cloud-Optimised GeoTIFFs, written strip by strip."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import rasterio
import rasterio.shutil
import torch
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp
from rasterio.windows import Window
from torch.nn.functional import interpolate

from geofm.atomic import atomic_file, temporary_file
from geofm.grid import Grid
from geofm.maps.make.windows import Floats, Strip, any_valid, regroup

#: How a pixel gets its value: that of its patch, or interpolated between the centres of patches.
Upsampling = Literal['nearest', 'bilinear']

#: Colour of each value of a raster of classes.
Colors = Mapping[int, tuple[int, int, int]]

#: Side of a GeoTIFF's tile in pixels, as near as the patch size allows.
_TILE = 256

#: About the most memory that patch values of a row of tiles take.
_STRIP_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Encoding:
    """How values become the numbers of a file.

    Attributes:
        dtype: Type of the numbers; 'float16' is stored as such, and read by older GDAL as float32.
        nodata: Number where nothing is known.
        scales: A value is the number times this, one a band; None: the number itself.
        colors: Colour of each class, for a raster of classes.
        rgb: Whether the three bands are red, green and blue.
    """

    dtype: Literal['float32', 'float16', 'int8', 'uint8'] = 'float32'
    nodata: float = math.nan
    scales: Sequence[float] | None = None
    colors: Colors | None = None
    rgb: bool = False

    def encode(self, values: Floats, band: int) -> npt.NDArray[np.generic]:
        """Numbers of a band.

        Args:
            values: Values, NaN where unknown. They must be in the range of the type.
            band: Index of the band, from 0.

        Returns:
            Numbers of the same shape; float32 for 'float16', which GDAL rounds.
        """
        if self.scales is not None:
            values = values / np.float32(self.scales[band])
        if self.dtype in ('float32', 'float16'):
            return values
        return np.where(np.isnan(values), self.nodata, np.rint(values)).astype(self.dtype)


def patch_grid(grid: Grid, patch_size: int) -> Grid:
    """Grid of the patches of a scene, those at its edges that are not full included.

    Args:
        grid: Grid of the scene.
        patch_size: Pixels a patch.

    Returns:
        A grid with the same outer corner.
    """
    height, width = (math.ceil(side / patch_size) for side in grid.shape)
    return replace(grid.coarsen(patch_size), height=height, width=width)


def upsample(values: Floats, factor: int, how: Upsampling) -> Floats:
    """Bring patch values to pixels.

    Args:
        values: Values of shape (rows + 2, columns): a strip with one row more above and below, as
            :func:`geofm.maps.make.windows.regroup` gives it. NaN where unknown.
        factor: Pixels a patch.
        how: ``'nearest'``, or ``'bilinear'`` between the centres of patches. Unknown patches take
            no part in the interpolation; NaN remains where all patches around are unknown.

    Returns:
        Values of shape (rows x factor, columns x factor).
    """
    if how == 'nearest':
        return values[1:-1].repeat(factor, axis=0).repeat(factor, axis=1)
    known = np.isfinite(values)
    stacked = torch.from_numpy(np.stack([np.where(known, values, 0), known]).astype(np.float32))
    pixels = interpolate(stacked[None], scale_factor=factor, mode='bilinear', align_corners=False)
    total, weight = pixels[0, :, factor:-factor].numpy()
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)


def write_patches(
    path: Path,
    grid: Grid,
    patch_size: int,
    descriptions: Sequence[str],
    strips: Iterable[Strip],
    tags: Mapping[str, str] | None = None,
    encoding: Encoding | None = None,
) -> None:
    """Write patch values as a Cloud-Optimised GeoTIFF with one pixel a patch.

    Args:
        path: File to write.
        grid: Grid of the scene.
        patch_size: Pixels a patch.
        descriptions: Description of each band.
        strips: As for :func:`write_pixels`. A patch without valid pixels becomes nodata.
        tags: Metadata of the file.
        encoding: How values become numbers. Default: float32.
    """
    patches = (Strip(s.values, any_valid(s.valid, patch_size)) for s in strips)
    write_pixels(
        path, patch_grid(grid, patch_size), 1, descriptions, patches, 'nearest', tags, encoding
    )


def write_pixels(
    path: Path,
    grid: Grid,
    patch_size: int,
    descriptions: Sequence[str],
    strips: Iterable[Strip],
    upsampling: Upsampling = 'nearest',
    tags: Mapping[str, str] | None = None,
    encoding: Encoding | None = None,
) -> None:
    """Write patch values as a Cloud-Optimised GeoTIFF on the pixels of a scene.

    Args:
        path: File to write.
        grid: Grid of the scene, which is that of the file.
        patch_size: Pixels a patch.
        descriptions: Description of each band.
        strips: Patch values of shape (bands, rows, columns) from top to bottom. Pixels that are
            not valid become nodata.
        upsampling: How a pixel gets its value from those of patches.
        tags: Metadata of the file.
        encoding: How values become numbers. Default: float32.
    """
    encoding = encoding or Encoding()
    # Overviews come before what they show in a Cloud-Optimised GeoTIFF, so it is made of another.
    with temporary_file(path.with_suffix('.strips.tif')) as plain, atomic_file(path) as part:
        _write_strips(plain, grid, patch_size, descriptions, strips, upsampling, tags, encoding)
        _optimise(plain, part, encoding)


def _write_strips(
    path: Path,
    grid: Grid,
    patch_size: int,
    descriptions: Sequence[str],
    strips: Iterable[Strip],
    upsampling: Upsampling,
    tags: Mapping[str, str] | None,
    encoding: Encoding,
) -> None:
    # Strips end where tiles do, so no tile is written twice; TIFF wants multiples of 16.
    unit = math.lcm(patch_size, 16)
    side = unit * max(1, min(_TILE, max(grid.shape)) // unit)
    held = 4 * len(descriptions) * math.ceil(grid.width / patch_size) * unit // patch_size
    height = min(side, unit * max(1, _STRIP_BYTES // held))
    profile = {
        'driver': 'GTiff',
        'dtype': 'float32' if encoding.dtype == 'float16' else encoding.dtype,
        'count': len(descriptions),
        'height': grid.height,
        'width': grid.width,
        'crs': grid.crs,
        'transform': grid.transform,
        'nodata': encoding.nodata,
        'tiled': True,
        'blockxsize': side,
        'blockysize': height,
        'interleave': 'band',
        'bigtiff': 'if_safer',
    }
    if encoding.rgb:
        profile['photometric'] = 'RGB'
    with rasterio.open(path, 'w', **profile) as dst:
        dst.descriptions = tuple(descriptions)
        dst.update_tags(**(tags or {}))
        if encoding.scales is not None:
            dst.scales = tuple(encoding.scales)
        if encoding.colors is not None:
            dst.write_colormap(1, {k: (*rgb, 255) for k, rgb in encoding.colors.items()})
        elif not encoding.rgb:
            dst.colorinterp = [ColorInterp.gray] + [ColorInterp.undefined] * (dst.count - 1)
        row = 0
        for strip in regroup(strips, height // patch_size):
            # The last patches may reach beyond the scene.
            rows = min(len(strip.valid), grid.height - row)
            valid = strip.valid[:rows, : grid.width]
            window = Window(0, row, grid.width, rows)
            for band, values in enumerate(strip.values):
                pixels = upsample(values, patch_size, upsampling)[:rows, : grid.width]
                pixels = np.where(valid, pixels, np.float32(np.nan))
                dst.write(encoding.encode(pixels, band), band + 1, window=window)
            row += rows


def _optimise(plain: Path, path: Path, encoding: Encoding) -> None:
    """Copy a raster with GDAL's driver for Cloud-Optimised GeoTIFF."""
    with rasterio.open(plain) as src:
        side = max(src.shape)
    options = {
        'COMPRESS': 'DEFLATE',
        'PREDICTOR': 'YES' if encoding.dtype == 'float32' else 'NO',
        # Small rasters get the smallest tiles: each is compressed whole, empty part and all.
        'BLOCKSIZE': 128 if side <= 128 else _TILE,
        # Those of all bands together would not fit into memory.
        'INTERLEAVE': 'BAND',
        # The mean of two classes is no class.
        'OVERVIEW_RESAMPLING': 'AVERAGE' if encoding.colors is None else 'MODE',
        'BIGTIFF': 'IF_SAFER',
        'NUM_THREADS': 'ALL_CPUS',
    }
    if encoding.dtype == 'float16':
        options['NBITS'] = 16
    try:
        rasterio.shutil.copy(plain, path, driver='COG', **options)
    except CPLE_BaseError as error:
        # What was written is gone by then, so a full disk cannot be told.
        raise OSError(
            f'{path}: GDAL cannot write this raster ({error}); is the disk full?'
        ) from error
