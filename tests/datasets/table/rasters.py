"""Write small tables of rasters for tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.transform import Affine, from_origin


def write_raster(
    path: Path,
    pixels: npt.NDArray[Any],
    crs: str | None = 'EPSG:32631',
    transform: Affine | None = None,
    descriptions: Sequence[str] = (),
    **profile: Any,
) -> npt.NDArray[Any]:
    """Write a GeoTIFF, (C, H, W), by default with pixels of 10 m."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = pixels.shape
    place = transform or from_origin(500_000, 5_000_000, 10, 10)
    options = {'crs': crs, 'transform': place, 'dtype': pixels.dtype, **profile}
    with rasterio.open(
        path, 'w', driver='GTiff', count=count, height=height, width=width, **options
    ) as dst:
        dst.write(pixels)
        for i, text in enumerate(descriptions):
            dst.set_band_description(i + 1, text)
    return pixels


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write a table with the columns of the first row."""
    lines = [','.join(rows[0])] + [','.join(str(v) for v in row.values()) for row in rows]
    path.write_text('\n'.join(lines) + '\n')
    return path


def dn(shape: tuple[int, ...], seed: int = 0, dtype: str = 'uint16') -> npt.NDArray[Any]:
    """Draw digital numbers of Sentinel-2 that are not 0."""
    return np.random.default_rng(seed).integers(1, 5000, shape).astype(dtype)
