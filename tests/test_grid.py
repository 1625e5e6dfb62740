from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.transform import Affine, from_origin

from geofm.grid import Grid, read_on_grid

UTM = CRS.from_epsg(32633)
ORIGIN = from_origin(500000, 5000000, 10, 10)


@given(st.floats(0, 360), st.sampled_from([(10, -10), (10, 10), (-10, -10), (20, -5)]))
def test_bounds_contain_all_corners(angle: float, scale: tuple[float, float]) -> None:
    transform = Affine.translation(500000, 5e6) @ Affine.rotation(angle) @ Affine.scale(*scale)
    grid = Grid(UTM, transform, 30, 40)
    left, bottom, right, top = grid.bounds
    points = np.array([transform @ corner for corner in [(0, 0), (40, 0), (0, 30), (40, 30)]])
    assert (left, bottom) == tuple(points.min(axis=0))
    assert (right, top) == tuple(points.max(axis=0))


def write(
    path: Path,
    pixels: npt.NDArray[np.generic],
    mask: npt.NDArray[np.bool_] | None = None,
    how: str = 'internal',
    nodata: float | None = None,
    transform: Affine = ORIGIN,
) -> Path:
    """Write a raster whose mask is stored internally, as a .msk file, or as an alpha band."""
    count = len(pixels) + (how == 'alpha')
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=how == 'internal'),
        rasterio.open(
            path,
            'w',
            driver='GTiff',
            count=count,
            height=pixels.shape[1],
            width=pixels.shape[2],
            dtype=pixels.dtype,
            crs=UTM,
            transform=transform,
            nodata=nodata,
        ) as dst,
    ):
        if how == 'alpha':
            dst.colorinterp = [ColorInterp.gray] * len(pixels) + [ColorInterp.alpha]
        dst.write(pixels, list(range(1, len(pixels) + 1)))
        if mask is not None and how == 'alpha':
            dst.write((mask * 255).astype(pixels.dtype), count)
        elif mask is not None:
            dst.write_mask(mask)
    return path


@pytest.mark.parametrize('how', ['internal', 'msk', 'alpha', 'internal and nodata'])
@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'int16', 'float32'])
@pytest.mark.parametrize('moved', [0.0, 3.0])
def test_masked_pixels_are_not_valid(tmp_path: Path, how: str, dtype: str, moved: float) -> None:
    pixels = np.full((2, 32, 32), 20, dtype)
    pixels[:, :16] = 99
    mask = np.arange(32)[:, None].repeat(32, axis=1) >= 16
    nodata = 5 if 'nodata' in how else None
    path = write(tmp_path / 'x.tif', pixels, mask, how.split()[0], nodata)
    grid = Grid(UTM, from_origin(500000 + moved, 5000000 - moved, 10, 10), 31, 31)
    with rasterio.open(path) as src:
        read, valid = read_on_grid(src, grid)
    # Bilinear warping reaches one row beyond the masked ones.
    assert not valid[:15].any()
    assert valid[16:].all()
    # Masked pixels do not affect their neighbours.
    assert (read[:2, valid] == 20).all()


@pytest.mark.parametrize('nodata', [-9999.0, None])
def test_a_rotated_raster_is_warped_once(tmp_path: Path, nodata: float | None) -> None:
    # The values of pixels are their coordinates, so that differences show displacements.
    def place(transform: Affine, size: int) -> npt.NDArray[np.float64]:
        cols, rows = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
        return np.stack(transform @ (cols, rows)) - np.array([[[500000]], [[4999000]]])

    rotated = Affine.translation(499500, 5000800) @ Affine.rotation(-20) @ Affine.scale(10, -10)
    pixels = place(rotated, 300).astype('float32')
    path = write(tmp_path / 'x.tif', pixels, nodata=nodata, transform=rotated)
    grid = Grid(UTM, from_origin(500300, 4999700, 10, 10), 64, 64)
    with rasterio.open(path) as src:
        read, valid = read_on_grid(src, grid)
    assert valid.all()
    # Metres. GDAL interpolates between approximated source coordinates, an eighth of a pixel off.
    assert np.abs(read - place(grid.transform, 64)).max() < 1.25


def test_an_engineering_crs_has_no_footprint() -> None:
    local = CRS.from_wkt('LOCAL_CS["nowhere",UNIT["metre",1]]')
    with pytest.raises(ValueError, match='cannot transform'):
        Grid(local, ORIGIN, 8, 8).footprint(UTM)


@pytest.mark.parametrize('transform', [Affine(10, 0, 5, 0, 0, 7), Affine(10, 5, 0, 20, 10, 0)])
def test_a_singular_transform_raises_an_error_with_the_file_name(
    tmp_path: Path, transform: Affine
) -> None:
    path = tmp_path / 'flat.tif'
    profile = {'driver': 'GTiff', 'count': 1, 'height': 4, 'width': 4, 'dtype': 'uint8'}
    with rasterio.open(path, 'w', **profile, crs='EPSG:32633', transform=transform) as dst:
        dst.write(np.ones((1, 4, 4), np.uint8))
    with rasterio.open(path) as src, pytest.raises(ValueError, match=r'flat\.tif: the transform'):
        Grid.of(src)
