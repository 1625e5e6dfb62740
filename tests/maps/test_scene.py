from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm.grid import Grid
from geofm.maps.scene import Scene
from geofm.sensors import BANDS, SENTINEL1, SENTINEL2, BandError

from .scenes import NORTH_UP, UTM, noise, write

NAT = np.iinfo(np.int64).min


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    s1 = write(tmp_path / 's1_a_2018-02-28_patch_12.tif', noise('s1', 40, 50))
    s2 = write(tmp_path / 's2_a_2018-02-24_patch_12.tif', noise('s2', 40, 50).astype('uint16'))
    return s1, s2


def test_bands_are_returned_in_the_requested_order(pair: tuple[Path, Path]) -> None:
    with Scene(('B8A', 'VH', 'B02'), *pair) as scene, rasterio.open(pair[1]) as s2:
        sample = scene.read(8, 16, 16, 24)
        assert scene.grid == Grid.of(s2)
    image = sample['image'].numpy()
    np.testing.assert_array_equal(image[0], s2_pixels(pair[1], 8)[8:24, 16:40])
    np.testing.assert_array_equal(image[1], noise('s1', 40, 50)[1, 8:24, 16:40])
    np.testing.assert_array_equal(image[2], s2_pixels(pair[1], 1)[8:24, 16:40])
    assert image.dtype == np.float32
    assert sample['valid'].all()


def s2_pixels(path: Path, index: int) -> np.ndarray:
    with rasterio.open(path) as src:
        return src.read(index + 1)


def test_a_window_may_reach_beyond_the_scene(pair: tuple[Path, Path]) -> None:
    with Scene(BANDS, *pair) as scene:
        sample = scene.read(32, -8, 16, 64)
    inside = np.zeros((16, 64), bool)
    inside[:8, 8:58] = True
    np.testing.assert_array_equal(sample['valid'].numpy(), inside)
    image = sample['image'].numpy()
    np.testing.assert_array_equal(image[:2, :8, 8:58], noise('s1', 40, 50)[:, 32:])
    assert np.isnan(image[:, ~inside]).all()


@pytest.mark.parametrize('names', ['plain', 'gdal', 'short'])
def test_descriptions_decide_which_band_is_which(tmp_path: Path, names: str) -> None:
    order = [12, 3, 8, 0, 7]
    of = [SENTINEL2.band_names[i] for i in order]
    text = {
        'plain': of,
        'gdal': [f'{name.replace("B0", "B")}, central wavelength 1 nm' for name in of],
        'short': [name.replace('B0', 'b') for name in of],
    }[names]
    pixels = np.stack([np.full((16, 16), i, np.float32) for i in order])
    # Bands that are not the sensor's are ignored.
    pixels = np.concatenate([pixels, np.full((1, 16, 16), 99, np.float32)])
    path = write(tmp_path / 's2.tif', pixels, descriptions=[*text, 'SCL'])
    with Scene(('B01', 'B04', 'B8A'), None, path) as scene:
        assert scene.read(0, 0, 1, 1)['image'].flatten().tolist() == [0, 3, 8]
    with pytest.raises(BandError, match=r's2\.tif.*B02'):
        Scene(('B02',), None, path)


def test_polarisations_are_found_in_descriptions(tmp_path: Path) -> None:
    pixels = np.stack([np.full((16, 16), -20, np.float32), np.full((16, 16), -10, np.float32)])
    names = ['Sigma0_VH_db', 'Sigma0_VV_db']
    with Scene(('VV', 'VH'), write(tmp_path / 's1.tif', pixels, descriptions=names)) as scene:
        assert scene.read(0, 0, 1, 1)['image'].flatten().tolist() == [-10, -20]


def test_two_bands_of_one_name_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / 's1.tif', noise('s1', 16, 16), descriptions=['VV', 'vv'])
    with pytest.raises(BandError, match=r"s1\.tif.*\['VV'\]"):
        Scene(('VV',), path)


def test_unnamed_bands_must_be_all_of_the_sensor(tmp_path: Path) -> None:
    path = write(tmp_path / 's2.tif', noise('s2', 16, 16)[:12])
    with pytest.raises(BandError, match=r's2\.tif: 12 bands.*has 13'):
        Scene(('B02',), None, path)


def test_an_aligned_s1_is_read_bit_for_bit(tmp_path: Path) -> None:
    s2 = write(tmp_path / 's2.tif', noise('s2', 40, 50))
    s1_pixels = noise('s1', 30, 60)
    s1 = write(tmp_path / 's1.tif', s1_pixels, transform=NORTH_UP @ Affine.translation(-7, 12))
    with Scene(BANDS, s1, s2) as scene:
        sample = scene.read(0, 0, 40, 50)
    image, valid = sample['image'].numpy(), sample['valid'].numpy()
    np.testing.assert_array_equal(image[:2, 12:], s1_pixels[:, :28, 7:57])
    assert valid[12:].all()
    assert not valid[:12].any()


@pytest.mark.parametrize('shift', [12, 12.3])
def test_windows_without_s1_are_invalid(tmp_path: Path, shift: float) -> None:
    s2 = write(tmp_path / 's2.tif', noise('s2', 40, 50))
    transform = NORTH_UP @ Affine.translation(shift, shift)
    s1 = write(tmp_path / 's1.tif', noise('s1', 40, 50), transform=transform)
    with Scene(BANDS, s1, s2) as scene:
        assert not scene.read(0, 0, 8, 8)['valid'].any()
        assert scene.read(16, 16, 8, 8)['valid'].all()


def _ground(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (-12 + np.sin(x / 130) * np.cos(y / 170)).astype(np.float32)


def test_s1_on_another_grid_is_warped_onto_that_of_s2(tmp_path: Path) -> None:
    """A pattern in metres of UTM 30, stored in UTM 31 at 7 m, is read at its place."""
    cols, rows = np.meshgrid(np.arange(60) + 0.5, np.arange(60) + 0.5)
    transform = Affine(10, 0, 790_000, 0, -10, 4_200_000)
    s2 = write(tmp_path / 's2.tif', noise('s2', 60, 60), transform=transform)
    expected = _ground(*(transform @ (cols, rows)))

    other = CRS.from_epsg(32631)
    with rasterio.open(s2) as src:
        left, bottom, right, top = Grid.of(src).footprint(other).buffer(100).bounds
    width, height = int((right - left) / 7), int((top - bottom) / 7)
    s1_transform = Affine(7, 0, left, 0, -7, top)
    s1_cols, s1_rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    xs, ys = s1_transform @ (s1_cols, s1_rows)
    x, y = rasterio.warp.transform(other, UTM, xs.ravel(), ys.ravel())
    vv = _ground(np.array(x).reshape(xs.shape), np.array(y).reshape(xs.shape))
    s1 = write(tmp_path / 's1.tif', np.stack([vv, vv]), other, s1_transform)

    with Scene(('VV', 'B02'), s1, s2) as scene:
        sample = scene.read(0, 0, 60, 60)
        part = scene.read(16, 24, 16, 16)
    assert sample['valid'].all()
    image = sample['image'].numpy()
    # A shift of half a pixel would give an error of 0.03.
    np.testing.assert_allclose(image[0], expected, atol=0.01)
    np.testing.assert_allclose(part['image'][0].numpy(), image[0, 16:32, 24:40], atol=0.01)


def test_nodata_of_either_sensor_is_invalid(tmp_path: Path) -> None:
    s1_pixels, s2_pixels = noise('s1', 16, 16), noise('s2', 16, 16)
    s1_pixels[0, 2, 3] = np.nan
    s1_pixels[1, 5, 1] = -99
    s2_pixels[:, 7, 9] = -1
    s2_pixels[5, 8, 8] = -1  # in one band only
    s2_pixels[:, 1, 1] = s1_pixels[:, 1, 2] = 0
    s1 = write(tmp_path / 's1.tif', s1_pixels, nodata=-99)
    s2 = write(tmp_path / 's2.tif', s2_pixels, nodata=-1)
    with Scene(BANDS, s1, s2) as scene:
        invalid = ~scene.read(0, 0, 16, 16)['valid'].numpy()
    expected = [(1, 1), (1, 2), (2, 3), (5, 1), (7, 9), (8, 8)]
    assert sorted(zip(*invalid.nonzero(), strict=True)) == expected


def test_a_band_of_zeros_is_data(tmp_path: Path) -> None:
    """Sentinel-2 with nodata 0, and B10 at 0 everywhere, as for dry air."""
    pixels = noise('s2', 16, 16)
    pixels[10] = 0
    pixels[:, 3, 4] = 0
    with Scene(('B02',), None, write(tmp_path / 's2.tif', pixels, nodata=0)) as scene:
        invalid = ~scene.read(0, 0, 16, 16)['valid'].numpy()
    assert list(zip(*invalid.nonzero(), strict=True)) == [(3, 4)]


def test_other_bands_of_a_file_are_ignored(tmp_path: Path) -> None:
    pixels = np.concatenate([noise('s1', 16, 16), np.full((1, 16, 16), np.nan, np.float32)])
    path = write(tmp_path / 's1.tif', pixels, descriptions=['VV', 'VH', 'incidence angle'])
    with Scene(('VV',), path) as scene:
        assert scene.read(0, 0, 16, 16)['valid'].all()


def test_fill_does_not_influence_warped_pixels(tmp_path: Path) -> None:
    s2 = write(tmp_path / 's2.tif', noise('s2', 16, 16))
    pixels = np.full((2, 16, 16), -10, np.float32)
    pixels[:, :, 8:] = 0
    s1 = write(tmp_path / 's1.tif', pixels, transform=NORTH_UP @ Affine.translation(0.4, 0))
    with Scene(('VV', 'VH', 'B02'), s1, s2) as scene:
        sample = scene.read(0, 0, 16, 16)
    valid = sample['valid'].numpy()
    assert valid[:, 2:7].all()
    assert not valid[:, 10:].any()
    np.testing.assert_allclose(sample['image'][:2].numpy()[:, valid], -10, atol=1e-4)


def test_bands_may_be_named(tmp_path: Path) -> None:
    """A Level-2A file has 12 bands without names and no B10."""
    names = [name for name in SENTINEL2.band_names if name != 'B10']
    pixels = noise('s2', 16, 16)[[SENTINEL2.band_names.index(name) for name in names]]
    path = write(tmp_path / 's2.tif', pixels)
    with Scene(('B12', 'B11'), None, path, names={'s2': names}) as scene:
        np.testing.assert_array_equal(scene.read(0, 0, 16, 16)['image'], pixels[[11, 10]])
    with pytest.raises(BandError, match=r's2\.tif: 12 bands, but the names'):
        Scene(('B12',), None, path, names={'s2': names[:5]})


def test_a_missing_sensor_is_zero_and_does_not_affect_validity(pair: tuple[Path, Path]) -> None:
    with Scene(BANDS, None, pair[1]) as scene:
        sample = scene.read(0, 0, 40, 50)
        assert list(scene.rasters) == ['s2']
    assert (sample['image'][:2] == 0).all()
    assert sample['valid'].all()


def test_only_sensors_of_the_bands_are_opened(pair: tuple[Path, Path]) -> None:
    with Scene(SENTINEL1.band_names, pair[0], Path('nowhere.tif')) as scene:
        assert list(scene.rasters) == ['s1']
        assert scene.path == pair[0]


@pytest.mark.parametrize(
    ('name', 'day'),
    [
        ('s2_ROIs2017_32_ImgNo_4_2018-02-24_patch_12.tif', '2018-02-24'),
        ('S2A_MSIL1C_20170613T101031_N0205_20190101T000000.tif', '2017-06-13'),
        ('scene_20201231.tif', '2020-12-31'),
        (
            'S2A_OPER_PRD_MSIL1C_PDMC_20160112T150243_R122_V20151207T110016_20151207T110016.tif',
            '2015-12-07',
        ),
        ('S2A_OPER_MSI_L1C_TL_SGS__20160112T160241_A002475_T33UUP_B02.tif', 'NaT'),
        ('tile_20181340_2019-02-01.tif', '2019-02-01'),
        ('scene_123456789.tif', 'NaT'),
        ('2018-0224.tif', 'NaT'),
        ('scene.tif', 'NaT'),
    ],
)
def test_dates_are_read_from_names(tmp_path: Path, name: str, day: str) -> None:
    with Scene(('B02',), None, write(tmp_path / name, noise('s2', 16, 16))) as scene:
        dates = scene.dates
    assert dates.tolist() == [NAT, np.datetime64(day, 'D').astype(np.int64)]
    assert np.array_equal(dates.numpy(), scene_dates(day))


def scene_dates(day: str) -> np.ndarray:
    return np.array(['NaT', day], 'datetime64[D]').astype(np.int64)


def test_given_dates_override_the_metadata(tmp_path: Path) -> None:
    path = write(tmp_path / 'scene.tif', noise('s2', 16, 16))
    with rasterio.open(path, 'r+') as dst:
        # The time of writing is not the time of acquisition.
        dst.update_tags(TIFFTAG_DATETIME='2024:01:01 00:00:00')
        dst.update_tags(ns='IMAGERY', ACQUISITIONDATETIME='2018-03-05T10:20:30Z')
    with Scene(('B02',), None, path) as scene:
        assert scene.rasters['s2'].date == np.datetime64('2018-03-05')
    with Scene(('B02',), None, path, {'s2': '2019-07-08'}) as scene:
        assert scene.rasters['s2'].date == np.datetime64('2019-07-08')
    with pytest.raises(ValueError, match="s2 date 'July' is invalid"):
        Scene(('B02',), None, path, {'s2': 'July'})
    with pytest.raises(ValueError, match=r"unknown sensors \['s3'\]"):
        Scene(('B02',), None, path, {'s3': '2019-07-08'})


def test_thumbnails_average_the_scene(tmp_path: Path) -> None:
    s2_pixels, s1_pixels = noise('s2', 120, 80), noise('s1', 120, 80)
    s2 = write(tmp_path / 's2.tif', s2_pixels)
    shifted = NORTH_UP @ Affine.translation(0.5, 0.5)
    s1 = write(tmp_path / 's1.tif', s1_pixels, transform=shifted)
    with Scene(('VV', 'B8A'), s1, s2) as scene:
        pixels, valid = scene.thumbnail(('B8A', 'B02'), 30)
        means = s2_pixels[[8, 1]].reshape(2, 30, 4, 20, 4).mean(axis=(2, 4))
        np.testing.assert_allclose(pixels, means, rtol=1e-4)
        assert valid.all()
        full, _ = scene.thumbnail(('B8A',), 200)
        np.testing.assert_array_equal(full[0], s2_pixels[8])
        warped, valid = scene.thumbnail(('VH',), 30)
        assert warped.shape == (1, 30, 20)
        assert valid[2:-2, 2:-2].all()
        # Means of 16 pixels, shifted by half a pixel.
        expected = s1_pixels[1].reshape(30, 4, 20, 4).mean(axis=(1, 3))
        inner = (slice(2, -2), slice(2, -2))
        assert np.corrcoef(warped[0][inner].ravel(), expected[inner].ravel())[0, 1] > 0.7


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'gone\.tif.*Sentinel-2'):
        Scene(BANDS, None, tmp_path / 'gone.tif')


def test_a_missing_argument_is_named(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match='--s1'):
        Scene(('VV',), None, pair[1])
    with pytest.raises(ValueError, match=r'--s1.*--s2'):
        Scene(BANDS)


def test_a_file_that_is_not_a_raster_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / 'text.tif'
    path.write_text('not a TIFF')
    with pytest.raises(ValueError, match=r'text\.tif: cannot be read as a raster'):
        Scene(BANDS, None, path)


def test_a_raster_without_crs_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / 's2.tif', noise('s2', 16, 16), crs=None)
    with pytest.raises(ValueError, match=r's2\.tif: no CRS'):
        Scene(BANDS, None, path)


@pytest.mark.parametrize('crs', [UTM, CRS.from_epsg(4326), CRS.from_epsg(32650)])
def test_rasters_that_do_not_overlap_are_an_error(tmp_path: Path, crs: CRS) -> None:
    s2 = write(tmp_path / 's2.tif', noise('s2', 16, 16))
    degrees = crs.is_geographic
    # In UTM 30, adjacent to S2, so that they share only a border.
    transform = (
        Affine(1e-4, 0, 20, 0, -1e-4, 40) if degrees else NORTH_UP @ Affine.translation(16, 0)
    )
    s1 = write(tmp_path / 's1.tif', noise('s1', 16, 16), crs, transform)
    with pytest.raises(ValueError, match=r's1\.tif.*s2\.tif do not overlap'):
        Scene(BANDS, s1, s2)
