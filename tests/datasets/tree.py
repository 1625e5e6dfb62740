"""Write small data sets in the layout of SEN12MS-CR-TS."""

from datetime import date
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm.grid import Grid
from geofm.sen12ms import PIXEL_SIZE, PairKey, SceneName
from geofm.sensors import SENSORS

SIZE = 32

type Array = npt.NDArray[np.generic]


def grid_at(epsg: int, x: float, y: float, size: int = SIZE, pixel: float | None = None) -> Grid:
    """Return a square grid with its upper left corner at (x, y)."""
    pixel = pixel or (PIXEL_SIZE if epsg == 4326 else 10.0)
    return Grid(
        CRS.from_epsg(epsg), Affine.translation(x, y) @ Affine.scale(pixel, -pixel), size, size
    )


def write_raster(path: Path, pixels: Array, grid: Grid, nodata: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path,
        'w',
        driver='GTiff',
        count=len(pixels),
        height=grid.height,
        width=grid.width,
        dtype=pixels.dtype,
        crs=grid.crs,
        transform=grid.transform,
        nodata=nodata,
        interleave='pixel',
    ) as dst:
        dst.write(pixels)
    return path


def scene_path(root: Path, sensor: str, key: PairKey, day: date) -> Path:
    name = SceneName(sensor, key, day)
    return root / name.folder / name.filename


def random_pixels(sensor: str, grid: Grid, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    shape = (len(SENSORS[sensor].bands), grid.height, grid.width)
    if sensor == 's1':
        return rng.uniform(-30, 5, shape).astype('float32')
    return rng.integers(1, 12000, shape, dtype='uint16')


def write_scene(
    root: Path,
    sensor: str,
    key: PairKey,
    grid: Grid,
    day: date,
    pixels: Array | None = None,
    nodata: float | None = None,
) -> Path:
    if pixels is None:
        pixels = random_pixels(sensor, grid, crc32(repr((sensor, *key)).encode()))
    return write_raster(scene_path(root, sensor, key, day), pixels, grid, nodata)


def write_pair(
    root: Path,
    key: PairKey,
    grid: Grid,
    s1_day: date = date(2018, 2, 28),
    s2_day: date = date(2018, 2, 24),
) -> tuple[Path, Path]:
    return (
        write_scene(root, 's1', key, grid, s1_day),
        write_scene(root, 's2', key, grid, s2_day),
    )
