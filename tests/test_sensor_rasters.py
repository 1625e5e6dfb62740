from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from rasterio.windows import Window

from geofm.sensor_rasters import SensorBands, UnitError
from geofm.sensors import SENTINEL1, SENTINEL2, BandError

PLACE = {'crs': 'EPSG:32632', 'transform': Affine(10, 0, 500_000, 0, -10, 5_300_000)}
SIZE = 20

type Array = npt.NDArray[Any]


@pytest.fixture
def dn() -> Array:
    return np.random.default_rng(0).integers(500, 4000, (13, SIZE, SIZE)).astype('uint16')


def write(path: Path, pixels: Array, **profile: Any) -> Path:
    shape = dict(zip(('count', 'height', 'width'), pixels.shape, strict=True))
    with rasterio.open(
        path, 'w', driver='GTiff', dtype=pixels.dtype, **shape, **PLACE, **profile
    ) as dst:
        dst.write(pixels)
    return path


def read(
    path: Path, window: Window | None = None
) -> tuple[SensorBands, npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    with rasterio.open(path) as src:
        bands = SensorBands.of(src, SENTINEL2 if src.count > 3 else SENTINEL1)
        return bands, *bands.read(src, window)


def hidden() -> npt.NDArray[np.uint8]:
    mask = np.full((SIZE, SIZE), 255, np.uint8)
    mask[:7, 3:] = 0
    return mask


@pytest.mark.parametrize('internal', [True, False], ids=['internal', 'msk'])
def test_the_mask_of_a_file(tmp_path: Path, dn: Array, internal: bool) -> None:
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
        path = write(tmp_path / 'a.tif', dn, nodata=7)
        with rasterio.open(path, 'r+') as dst:
            dst.write_mask(hidden())
    assert Path(f'{path}.msk').exists() != internal
    _, values, valid = read(path)
    np.testing.assert_array_equal(valid, hidden() != 0)
    np.testing.assert_array_equal(values, dn)
    _, _, part = read(path, Window(2, 5, 6, 9))
    np.testing.assert_array_equal(part, (hidden() != 0)[5:14, 2:8])


def test_an_alpha_band_is_a_mask(tmp_path: Path, dn: Array) -> None:
    path = write(tmp_path / 'a.tif', np.concatenate([dn, hidden().astype('uint16')[None]]))
    with rasterio.open(path, 'r+') as dst:
        dst.colorinterp = [*dst.colorinterp[:-1], ColorInterp.alpha]
    bands, values, valid = read(path)
    assert tuple(bands.indices) == SENTINEL2.band_names
    assert not bands.named
    np.testing.assert_array_equal(values, dn)
    np.testing.assert_array_equal(valid, hidden() != 0)


def test_bands_are_read_by_their_names_in_the_file(tmp_path: Path, dn: Array) -> None:
    order = np.random.default_rng(1).permutation(13)[:9]
    path = write(tmp_path / 'a.tif', dn[order])
    with rasterio.open(path, 'r+') as dst:
        dst.descriptions = [SENTINEL2.band_names[i] for i in order]
    bands, values, _ = read(path)
    assert bands.named
    assert list(bands.indices) == [SENTINEL2.band_names[i] for i in order]
    np.testing.assert_array_equal(values, dn[order])


def test_without_names_all_bands_are_required(tmp_path: Path, dn: Array) -> None:
    with pytest.raises(BandError, match='12 bands without names'):
        read(write(tmp_path / 'a.tif', dn[:12]))


@pytest.mark.parametrize(('scale', 'offset'), [(1e-4, -0.1), (1.0, -1000.0)])
def test_values_with_a_scale_are_converted_to_dn(
    tmp_path: Path, dn: Array, scale: float, offset: float
) -> None:
    path = write(tmp_path / 'a.tif', dn + 1000)
    with rasterio.open(path, 'r+') as dst:
        dst.scales, dst.offsets = [scale] * 13, [offset] * 13
    _, values, valid = read(path)
    np.testing.assert_array_equal(values, dn)
    assert valid.all()


def test_nodata_applies_before_the_scale(tmp_path: Path, dn: Array) -> None:
    dn[4, 3, 2] = 40_000
    path = write(tmp_path / 'a.tif', dn, nodata=40_000)
    with rasterio.open(path, 'r+') as dst:
        dst.scales, dst.offsets = [1e-4] * 13, [-0.1] * 13
    _, _, valid = read(path)
    assert np.argwhere(~valid).tolist() == [[3, 2]]


def test_decibels_stored_as_integers(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(-3000, 300, (2, SIZE, SIZE)).astype('int16')
    path = write(tmp_path / 'a.tif', stored, nodata=-32768)
    with rasterio.open(path, 'r+') as dst:
        dst.scales, dst.offsets = [0.01] * 2, [0.5] * 2
    _, values, valid = read(path)
    np.testing.assert_allclose(values, stored * 0.01 + 0.5, rtol=1e-6)
    assert valid.all()


def test_an_unknown_scale_is_an_error(tmp_path: Path, dn: Array) -> None:
    path = write(tmp_path / 'a.tif', dn)
    with rasterio.open(path, 'r+') as dst:
        dst.scales = [0.5] * 13
    with pytest.raises(UnitError, match=r'scale 0\.5'):
        read(path)


def test_values_outside_the_limits_are_not_valid(tmp_path: Path) -> None:
    pixels = np.full((2, SIZE, SIZE), -12, 'float64')
    for i, value in enumerate((3e38, 1e300, -9999, np.nan, np.inf)):
        pixels[i % 2, 0, i] = value
    pixels[:, 1, 1] = 0
    _, values, valid = read(write(tmp_path / 'a.tif', pixels))
    assert np.argwhere(~valid).tolist() == [*([0, i] for i in range(5)), [1, 1]]
    assert (values[:, valid] == -12).all()
