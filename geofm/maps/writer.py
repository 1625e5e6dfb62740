"""Rasters of patch values on the pixel grid of a scene, written strip by strip."""

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import rasterio
import torch
from rasterio.windows import Window
from torch.nn.functional import interpolate

from geofm.grid import Grid
from geofm.maps.windows import Floats, Strip, regroup

#: How a pixel gets its value: that of its patch, or interpolated between the centres of patches.
Upsampling = Literal['nearest', 'bilinear']

#: Side of a GeoTIFF's tile in pixels, as near as the patch size allows.
_TILE = 256


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file beside its final name, and give it that name when it is whole.

    Args:
        path: Final name. Its folder must exist.

    Yields:
        Name to write to, in the same folder and with the same suffix. After an exception it is
        removed, and a file that had the final name before is left as it was.
    """
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def upsample(values: Floats, factor: int, how: Upsampling) -> Floats:
    """Bring patch values to pixels.

    Args:
        values: Values of shape (rows + 2, columns): a strip with one row more above and below, as
            :func:`geofm.maps.windows.regroup` gives it. NaN where unknown.
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


def write_raster(
    path: Path,
    grid: Grid,
    patch_size: int,
    descriptions: Sequence[str],
    strips: Iterable[Strip],
    upsampling: Upsampling = 'nearest',
    tags: Mapping[str, str] | None = None,
) -> int:
    """Write patch values as a tiled, deflated float32 GeoTIFF on the pixels of a scene.

    Args:
        path: File to write.
        grid: Grid of the scene, which is that of the file.
        patch_size: Pixels a patch.
        descriptions: Description of each band.
        strips: Patch values of shape (bands, rows, columns) from top to bottom, as
            :func:`geofm.maps.windows.blend` yields them. Pixels that are not valid become NaN,
            the nodata value of the file.
        upsampling: How a pixel gets its value from those of patches.
        tags: Metadata of the file.

    Returns:
        Number of pixels that hold data.
    """
    # Strips end where tiles do, so no tile is compressed twice; TIFF wants multiples of 16.
    unit = math.lcm(patch_size, 16)
    tile = unit * max(1, _TILE // unit)
    profile = {
        'driver': 'GTiff',
        'dtype': 'float32',
        'count': len(descriptions),
        'height': grid.height,
        'width': grid.width,
        'crs': grid.crs,
        'transform': grid.transform,
        'nodata': float('nan'),
        'tiled': True,
        'blockxsize': tile,
        'blockysize': tile,
        'interleave': 'band',
        'compress': 'deflate',
        'predictor': 3,
        'bigtiff': 'if_safer',
    }
    with rasterio.open(path, 'w', **profile) as dst:
        dst.descriptions = tuple(descriptions)
        dst.update_tags(**(tags or {}))
        row = known = 0
        for strip in regroup(strips, tile // patch_size):
            # The last patches may reach beyond the scene.
            height = min(len(strip.valid), grid.height - row)
            valid = strip.valid[:height, : grid.width]
            window = Window(0, row, grid.width, height)
            for band, values in enumerate(strip.values, start=1):
                pixels = upsample(values, patch_size, upsampling)[:height, : grid.width]
                dst.write(np.where(valid, pixels, np.float32(np.nan)), band, window=window)
            row += height
            known += int(valid.sum())
    return known
