import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm.grid import Grid
from geofm.maps.windows import Strip, Tile, Tiling, blend
from geofm.maps.writer import Upsampling, replacing, upsample, write_raster

from .scenes import NORTH_UP, UTM

GRIDS = {
    'degrees': Grid(
        CRS.from_epsg(4326),
        Affine(8.983152841195215e-05, 0, -0.78, 0, -8.983152841195215e-05, 38.1),
        45,
        70,
    ),
    'utm': Grid(UTM, NORTH_UP, 45, 70),
    'south-up': Grid(UTM, Affine(10, 0, 500_000, 0, 10, 4_200_000), 45, 70),
    'rotated': Grid(UTM, NORTH_UP @ Affine.rotation(30), 45, 70),
    'one row of patches': Grid(UTM, NORTH_UP, 8, 70),
    'more than one tile': Grid(UTM, NORTH_UP, 530, 300),
}


def _strips(values: np.ndarray, valid: np.ndarray, p: int, rows: int = 5) -> Iterator[Strip]:
    for top in range(0, values.shape[1], rows):
        end = min(top + rows, values.shape[1])
        yield Strip(values[:, top:end], valid[top * p : end * p])


@pytest.mark.parametrize('upsampling', ['nearest', 'bilinear'])
@pytest.mark.parametrize('grid', GRIDS.values(), ids=GRIDS.keys())
def test_raster_lies_on_the_grid(tmp_path: Path, grid: Grid, upsampling: Upsampling) -> None:
    p = 8
    shape = -(-grid.height // p), -(-grid.width // p)
    values = np.random.default_rng(0).random((2, *shape), np.float32)
    valid = np.ones((shape[0] * p, shape[1] * p), bool)
    valid[3, 5] = False
    path = tmp_path / 'map.tif'
    write_raster(path, grid, p, ['a', 'b'], _strips(values, valid, p), upsampling, {'k': 'v'})
    with rasterio.open(path) as src:
        assert src.crs == grid.crs
        assert src.transform == grid.transform
        assert src.shape == grid.shape
        assert src.bounds == pytest.approx(tuple(grid.bounds), rel=1e-15)
        assert src.dtypes == ('float32', 'float32')
        assert np.isnan(src.nodata)
        assert src.descriptions == ('a', 'b')
        assert src.tags()['k'] == 'v'
        assert src.profile['tiled']
        assert src.compression.name == 'deflate'
        pixels = src.read()
    assert np.isnan(pixels[:, 3, 5]).all()
    assert np.isnan(pixels).sum() == 2
    if upsampling == 'nearest':
        expected = np.kron(values, np.ones((p, p), np.float32))[:, : grid.height, : grid.width]
        expected[:, 3, 5] = np.nan
        np.testing.assert_array_equal(pixels, expected)
    else:
        expected = _interpolate(values[0], p)[: grid.height, : grid.width]
        known = np.isfinite(pixels[0])
        np.testing.assert_allclose(pixels[0][known], expected[known], atol=1e-6)


def _interpolate(values: np.ndarray, p: int) -> np.ndarray:
    """Linear interpolation between the centres of patches, axis by axis."""
    for _ in range(2):
        n = len(values)
        at, centres = np.arange(n * p) + 0.5, (np.arange(n) + 0.5) * p
        values = np.stack([np.interp(at, centres, column) for column in values.T])
    return values


def test_unknown_patches_take_no_part_in_interpolation() -> None:
    values = np.full((5, 4), 2.0, np.float32)
    values[2, 1] = np.nan
    pixels = upsample(values, 4, 'bilinear')
    # Only where the unknown patch is the only one near is nothing known.
    assert np.nanmin(pixels) == np.nanmax(pixels) == 2
    assert np.isfinite(pixels).all()
    values[:] = np.nan
    assert np.isnan(upsample(values, 4, 'bilinear')).all()


def test_memory_does_not_grow_with_the_height(tmp_path: Path) -> None:
    def peak(height: int) -> int:
        tiling = Tiling.cover((height, 256), 16, 64)
        n = tiling.rows.size
        values, valid = np.ones((4, n, n), np.float32), np.ones((16 * n, 16 * n), bool)
        strips = blend(tiling, (Tile(position, values, valid) for position in tiling))
        tracemalloc.start()
        write_raster(
            tmp_path / 'map.tif', Grid(UTM, NORTH_UP, height, 256), 16, list('abcd'), strips
        )
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(512)  # imports and caches
    low, high = peak(512), peak(4096)
    assert high < 1.2 * low
    assert high < 4096 * 256 * 4  # a quarter of the raster


def test_replacing_leaves_whole_files_only(tmp_path: Path) -> None:
    path = tmp_path / 'a.txt'
    with replacing(path) as temporary:
        temporary.write_text('first')
        assert not path.exists()
        assert temporary.parent == tmp_path
        assert temporary.suffix == '.txt'
    assert path.read_text() == 'first'

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text('half of the sec')
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == 'first'
    assert list(tmp_path.iterdir()) == [path]
