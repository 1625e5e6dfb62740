"""Writing patch values as Cloud-Optimised GeoTIFFs, strip by strip."""

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

#: How patch values are brought to pixels: the value of the pixel's patch, or bilinear interpolation
#: between the centres of patches.
Upsampling = Literal['nearest', 'bilinear']

#: Colour of each value of a raster of classes.
Colors = Mapping[int, tuple[int, int, int]]

#: Side of a GeoTIFF's tile in pixels, approximated as closely as the patch size allows.
_TILE = 256

#: Approximate maximum size in bytes of the patch values of a row of tiles.
_STRIP_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Encoding:
    """How values are stored in a file.

    Attributes:
        dtype: Data type. Older versions of GDAL read 'float16' as float32.
        nodata: Value that is stored for pixels without data.
        scales: Scale of each band: a value is the number times the scale. None: no scales.
        colors: Colour of each class, for a raster of classes.
        rgb: Whether the three bands are red, green and blue.
    """

    dtype: Literal['float32', 'float16', 'int8', 'uint8'] = 'float32'
    nodata: float = math.nan
    scales: Sequence[float] | None = None
    colors: Colors | None = None
    rgb: bool = False

    def encode(self, values: Floats, band: int) -> npt.NDArray[np.generic]:
        """Convert values to the numbers of a band.

        Args:
            values: Values, NaN where there is no data. They must fit the data type.
            band: Index of the band, from 0.

        Returns:
            Numbers of the same shape. For 'float16' they are float32, which GDAL rounds.
        """
        if self.scales is not None:
            values = values / np.float32(self.scales[band])
        if self.dtype in ('float32', 'float16'):
            return values
        return np.where(np.isnan(values), self.nodata, np.rint(values)).astype(self.dtype)


def patch_grid(grid: Grid, patch_size: int) -> Grid:
    """Return the grid of the patches of a scene, including partial patches at its edges.

    Args:
        grid: Grid of the scene.
        patch_size: Side of a patch in pixels.

    Returns:
        A grid with the same origin.
    """
    height, width = (math.ceil(side / patch_size) for side in grid.shape)
    return replace(grid.coarsen(patch_size), height=height, width=width)


def upsample(values: Floats, factor: int, how: Upsampling) -> Floats:
    """Upsample patch values to pixels.

    Args:
        values: Values of shape (rows + 2, columns): a strip with one additional row above and
            below, as of :func:`geofm.maps.make.windows.regroup`. NaN where there is no data.
        factor: Side of a patch in pixels.
        how: ``'nearest'``, or ``'bilinear'`` between the centres of patches. NaN is left out of the
            interpolation, and remains only where all surrounding patches are NaN.

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
    """Write patch values as a Cloud-Optimised GeoTIFF with one pixel per patch.

    Args:
        path: File to write.
        grid: Grid of the scene.
        patch_size: Side of a patch in pixels.
        descriptions: Description of each band.
        strips: Strips as for :func:`write_pixels`. A patch without valid pixels becomes nodata.
        tags: Metadata of the file.
        encoding: How values are stored. Default: float32.
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
        grid: Grid of the scene and of the file.
        patch_size: Side of a patch in pixels.
        descriptions: Description of each band.
        strips: Patch values of shape (bands, rows, columns) from top to bottom. Invalid pixels
            become nodata.
        upsampling: How patch values are brought to pixels.
        tags: Metadata of the file.
        encoding: How values are stored. Default: float32.
    """
    encoding = encoding or Encoding()
    # In a Cloud-Optimised GeoTIFF, overviews precede the pixels, so it is copied from another file.
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
    # Strips end at the edges of tiles, so that no tile is written twice. The sides of tiles must be
    # multiples of 16.
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
    """Copy a raster with GDAL's driver for Cloud-Optimised GeoTIFFs."""
    with rasterio.open(plain) as src:
        side = max(src.shape)
    options = {
        'COMPRESS': 'DEFLATE',
        'PREDICTOR': 'YES' if encoding.dtype == 'float32' else 'NO',
        # A tile is always full size, so small rasters get the smallest tiles.
        'BLOCKSIZE': 128 if side <= 128 else _TILE,
        # Tiles of all bands together would not fit into memory.
        'INTERLEAVE': 'BAND',
        # The mean of two classes is not a class.
        'OVERVIEW_RESAMPLING': 'AVERAGE' if encoding.colors is None else 'MODE',
        'BIGTIFF': 'IF_SAFER',
        'NUM_THREADS': 'ALL_CPUS',
    }
    if encoding.dtype == 'float16':
        options['NBITS'] = 16
    try:
        rasterio.shutil.copy(plain, path, driver='COG', **options)
    except CPLE_BaseError as error:
        # GDAL has removed the file by now, so a full disk cannot be detected.
        raise OSError(
            f'{path}: GDAL cannot write this raster ({error}); is the disk full?'
        ) from error
