import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.transform import Affine

from geofm.grid import Grid
from geofm.maps.make.windows import Strip
from geofm.maps.make.writer import (
    Encoding,
    Upsampling,
    patch_grid,
    upsample,
    write_patches,
    write_pixels,
)

from .scenes import NORTH_UP, UTM, cog_problems

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
def test_pixels_lie_on_the_grid(tmp_path: Path, grid: Grid, upsampling: Upsampling) -> None:
    p = 8
    shape = patch_grid(grid, p).shape
    values = np.random.default_rng(0).random((2, *shape), np.float32)
    valid = np.ones((shape[0] * p, shape[1] * p), bool)
    valid[3, 5] = False
    path = tmp_path / 'map.tif'
    write_pixels(path, grid, p, ['a', 'b'], _strips(values, valid, p), upsampling, {'k': 'v'})
    assert [p.name for p in tmp_path.iterdir()] == ['map.tif']
    assert cog_problems(path) == []
    with rasterio.open(path) as src:
        assert src.crs == grid.crs
        assert src.transform == grid.transform
        assert src.shape == grid.shape
        left, bottom, right, top = src.bounds
        # rasterio has bottom > top if rows run northwards.
        upright = (left, min(bottom, top), right, max(bottom, top))
        assert upright == pytest.approx(tuple(grid.bounds), rel=1e-15)
        assert src.dtypes == ('float32', 'float32')
        assert np.isnan(src.nodata)
        assert src.descriptions == ('a', 'b')
        assert src.tags()['k'] == 'v'
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


@pytest.mark.parametrize('grid', GRIDS.values(), ids=GRIDS.keys())
def test_patches_lie_on_the_grid(tmp_path: Path, grid: Grid) -> None:
    """Origin, pixel size and CRS of patches, including partial patches."""
    p = 8
    rows, cols = -(-grid.height // p), -(-grid.width // p)
    values = np.random.default_rng(0).random((2, rows, cols), np.float32)
    valid = np.zeros((rows * p, cols * p), bool)
    valid[-1, -1] = valid[0] = True
    path = tmp_path / 'map.tif'
    write_patches(path, grid, p, ['a', 'b'], _strips(values, valid, p))
    assert cog_problems(path) == []
    with rasterio.open(path) as src:
        assert src.crs == grid.crs
        assert src.transform == grid.transform @ Affine.scale(p)
        assert src.transform @ (0, 0) == grid.transform @ (0, 0)
        assert src.transform @ (3, 2) == pytest.approx(grid.transform @ (24, 16), rel=1e-15)
        assert src.shape == (rows, cols)
        pixels = src.read()
    known = np.zeros((rows, cols), bool)
    known[-1, -1] = known[0] = True
    np.testing.assert_array_equal(pixels, np.where(known, values, np.nan))


ENCODINGS: dict[str, tuple[Encoding, dict[str, Any]]] = {
    'half': (Encoding('float16'), {'dtype': 'float16'}),
    'int8': (Encoding('int8', -128, [0.5, 1.0]), {'dtype': 'int8', 'scales': (0.5, 1.0)}),
    'classes': (
        Encoding('uint8', 255, colors={0: (1, 2, 3), 7: (4, 5, 6)}),
        {'dtype': 'uint8', 'colorinterp': ColorInterp.palette},
    ),
    'rgb': (Encoding('uint8', 0, rgb=True), {'dtype': 'uint8', 'colorinterp': ColorInterp.red}),
}


@pytest.mark.parametrize(('encoding', 'expected'), ENCODINGS.values(), ids=ENCODINGS.keys())
@pytest.mark.parametrize('side', [40, 700])
def test_encodings(tmp_path: Path, encoding: Encoding, expected: dict[str, Any], side: int) -> None:
    bands = 1 if encoding.colors else 3 if encoding.rgb else 2
    grid = Grid(UTM, NORTH_UP, side, side)
    values = np.random.default_rng(0).integers(1, 50, (bands, side, side)).astype(np.float32)
    values[:, 3, 4] = np.nan
    path, valid = tmp_path / 'map.tif', np.ones((side, side), bool)
    write_patches(path, grid, 1, list('abc')[:bands], _strips(values, valid, 1, 50), {}, encoding)
    assert cog_problems(path) == []
    with rasterio.open(path) as src:
        assert set(src.dtypes) == {expected['dtype']}
        assert src.scales == expected.get('scales', (1.0,) * bands)
        np.testing.assert_equal(src.nodata, encoding.nodata)
        if 'colorinterp' in expected:
            assert src.colorinterp[0] == expected['colorinterp']
        if encoding.colors:
            assert src.colormap(1)[7] == (4, 5, 6, 255)
        masked = src.read(masked=True).astype(np.float64)
        # Overviews contain only values of the scene: no nodata values, and no means of classes.
        small = src.read(1, out_shape=(src.height // 2, src.width // 2), masked=True)
        if encoding.colors and side > 256:
            assert src.overviews(1)
            assert set(small.compressed().tolist()) <= set(range(1, 50))
        scales = np.array(src.scales)[:, None, None]
    assert (masked.mask == np.isnan(values)).all()
    np.testing.assert_array_equal(masked.filled(np.nan) * scales, values)


def test_many_bands_are_written_in_narrow_strips(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr('geofm.maps.make.writer._STRIP_BYTES', 200_000)
    values = np.random.default_rng(0).random((40, 100, 64), np.float32)
    path, valid = tmp_path / 'map.tif', np.ones((100, 64), bool)
    names = [str(i) for i in range(40)]
    write_patches(path, Grid(UTM, NORTH_UP, 100, 64), 1, names, _strips(values, valid, 1, 30))
    with rasterio.open(path) as src:
        np.testing.assert_array_equal(src.read(), values)


def _interpolate(values: np.ndarray, p: int) -> np.ndarray:
    """Linear interpolation between the centres of patches, axis by axis."""
    for _ in range(2):
        n = len(values)
        at, centres = np.arange(n * p) + 0.5, (np.arange(n) + 0.5) * p
        values = np.stack([np.interp(at, centres, column) for column in values.T])
    return values


def test_patches_without_data_are_not_interpolated() -> None:
    values = np.full((5, 4), 2.0, np.float32)
    values[2, 1] = np.nan
    pixels = upsample(values, 4, 'bilinear')
    # Pixels are NaN only where no neighbouring patch has data.
    assert np.nanmin(pixels) == np.nanmax(pixels) == 2
    assert np.isfinite(pixels).all()
    values[:] = np.nan
    assert np.isnan(upsample(values, 4, 'bilinear')).all()


def test_memory_does_not_grow_with_the_height(tmp_path: Path) -> None:
    def peak(height: int) -> int:
        rows = height // 16
        values, valid = np.ones((4, 4, 16), np.float32), np.ones((64, 256), bool)
        strips = (Strip(values, valid) for _ in range(rows // 4))
        grid = replace(Grid(UTM, NORTH_UP, height, 256))
        tracemalloc.start()
        write_pixels(tmp_path / 'map.tif', grid, 16, list('abcd'), strips)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    peak(512)  # imports and caches
    low, high = peak(512), peak(4096)
    assert high < 1.2 * low
    assert high < 4096 * 256 * 4  # a quarter of the raster
