"""Peculiarities of input rasters: masks, fill, scales, units, names and placement."""

import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.transform import Affine
from rasterio.warp import transform as transform_points

from geofm.maps import Options, map_scene
from geofm.maps.scene import Scene
from geofm.sensors import BANDS, SENTINEL1, SENTINEL2, BandError
from geofm.units import UnitWarning

from .scenes import NORTH_UP, UTM, GroundModel, noise, write

S2 = SENTINEL2.band_names
DN = noise('s2', 32, 32).clip(200, 9000).astype('uint16')


def seen(path: Path, key: str = 's2', **kwargs: object) -> tuple[np.ndarray, np.ndarray]:
    """Read the values and valid pixels of a raster of one sensor."""
    bands = SENTINEL2.band_names if key == 's2' else SENTINEL1.band_names
    with Scene(bands, **{key: path}, **kwargs) as scene:  # type: ignore[arg-type]
        sample = scene.read(0, 0, *scene.grid.shape)
    return sample['image'].numpy(), sample['valid'].numpy()


def hidden() -> np.ndarray:
    mask = np.full((32, 32), 255, 'uint8')
    mask[:16] = 0
    return mask


@pytest.mark.parametrize('kind', ['internal', 'msk', 'alpha'])
@pytest.mark.parametrize('warped', [False, True])
def test_a_files_own_mask_hides_pixels(tmp_path: Path, kind: str, warped: bool) -> None:
    pixels = noise('s1', 32, 32)
    pixels[:, :16] = 90
    if kind == 'alpha':
        pixels = np.concatenate([pixels, hidden()[None]])
    shift = 0.4 if warped else 0
    s1 = write(tmp_path / 's1.tif', pixels, transform=NORTH_UP @ Affine.translation(shift, 0),
               nodata=-99)  # fmt: skip
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == 'internal'), rasterio.open(s1, 'r+') as dst:
        if kind == 'alpha':
            dst.colorinterp = [ColorInterp.gray, ColorInterp.undefined, ColorInterp.alpha]
        else:
            dst.write_mask(hidden())
    s2 = write(tmp_path / 's2.tif', DN, descriptions=S2)
    with Scene(BANDS, s1, s2) as scene:
        sample = scene.read(0, 0, 32, 32)
        picture, known = scene.thumbnail(('VV',), 16)
    valid = sample['valid'].numpy()
    assert not valid[:15].any()
    assert valid[17:, 1:].all()
    # Masked pixels do not influence their neighbours.
    assert sample['image'][:2].numpy()[:, valid].max() < 20
    assert not known[:7].any()
    assert picture[0][known].max() < 20


@pytest.mark.parametrize('nodata', [-9999, None])
def test_fill_in_one_band_is_no_data(tmp_path: Path, nodata: int | None) -> None:
    pixels = DN.astype('int16')
    pixels[1, :16] = -9999
    path = write(tmp_path / 's2.tif', pixels, descriptions=S2, nodata=nodata)
    _, valid = seen(path)
    assert not valid[:16].any()
    assert valid[16:].all()
    # The pixel is valid for a model without that band.
    with Scene(('B04', 'B03'), None, path) as scene:
        assert scene.read(0, 0, 32, 32)['valid'].all()
        _, known = scene.thumbnail(('B02',), 16)
    assert not known[:8].any()
    assert known[8:].all()


@pytest.mark.parametrize('value', [-9999, 3e38, np.nan, np.inf])
def test_impossible_values_are_no_data_and_do_not_bleed(tmp_path: Path, value: float) -> None:
    pixels = noise('s1', 32, 32)
    pixels[:, 10:12, 10:12] = value
    s1 = write(tmp_path / 's1.tif', pixels, transform=NORTH_UP @ Affine.translation(0.4, 0.4))
    s2 = write(tmp_path / 's2.tif', DN, descriptions=S2)
    with Scene(BANDS, s1, s2) as scene:
        sample = scene.read(0, 0, 32, 32)
    valid = sample['valid'].numpy()
    assert 1 <= (~valid[2:-2, 2:-2]).sum() <= 9
    assert np.abs(sample['image'][:2].numpy()[:, valid]).max() < 60


def test_zero_in_the_bands_of_a_model_is_a_measurement(tmp_path: Path) -> None:
    pixels = DN.copy()
    pixels[10] = 0
    pixels[:, 3, 4] = 0
    with Scene(('B10',), None, write(tmp_path / 's2.tif', pixels, descriptions=S2)) as scene:
        valid = scene.read(0, 0, 32, 32)['valid'].numpy()
    assert list(zip(*(~valid).nonzero(), strict=True)) == [(3, 4)]


def test_a_stated_scale_leads_to_dn(tmp_path: Path) -> None:
    path = write(tmp_path / 's2.tif', DN + 1000, descriptions=S2)
    with rasterio.open(path, 'r+') as dst:
        dst.scales, dst.offsets = [1e-4] * 13, [-0.1] * 13
    np.testing.assert_array_equal(seen(path)[0], DN)
    with Scene(('B02',), None, path) as scene:
        np.testing.assert_array_equal(scene.thumbnail(('B8A',), 64)[0], DN[[8]])


def test_stated_linear_power_leads_to_db(tmp_path: Path) -> None:
    db = noise('s1', 32, 32)
    path = write(tmp_path / 's1.tif', 10 ** (db / 10))
    with rasterio.open(path, 'r+') as dst:
        dst.units = ['linear', 'linear']
    np.testing.assert_allclose(seen(path, 's1')[0], db, atol=1e-4)


@pytest.mark.parametrize(
    ('key', 'pixels', 'said'),
    [
        ('s1', 10 ** (noise('s1', 32, 32) / 10), 'linear power'),
        ('s1', (noise('s1', 32, 32) + 60).astype('uint16') * 2, 'raw digital numbers'),
        ('s2', (DN / 1e4).astype('float32'), 'reflectance'),
        ('s2', DN + 1000, 'baseline'),
    ],
)
def test_values_in_another_unit_are_warned_of(
    tmp_path: Path, key: str, pixels: np.ndarray, said: str
) -> None:
    bands = S2 if key == 's2' else SENTINEL1.band_names
    path = write(tmp_path / 'scene.tif', pixels, descriptions=bands)
    s1, s2 = (None, path) if key == 's2' else (path, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always', UnitWarning)
        map_scene(GroundModel(bands), s1, s2, tmp_path, ['embedding'], Options(window=32))
    (warning,) = [w for w in caught if w.category is UnitWarning]
    assert said in str(warning.message)


def test_the_error_without_valid_pixels_names_the_unit(tmp_path: Path) -> None:
    pixels = np.full((2, 32, 32), 400, 'uint16')
    path = write(tmp_path / 's1.tif', pixels, descriptions=SENTINEL1.band_names)
    model = GroundModel(SENTINEL1.band_names)
    with (
        pytest.warns(UnitWarning),
        pytest.raises(ValueError, match=r'no pixel has data.*raw digital numbers'),
    ):
        map_scene(model, path, None, tmp_path, ['embedding'], Options(window=32))


def test_values_in_the_right_unit_are_not_warned_of(tmp_path: Path) -> None:
    s1 = write(tmp_path / 's1.tif', noise('s1', 32, 32), descriptions=SENTINEL1.band_names)
    s2 = write(tmp_path / 's2.tif', DN, descriptions=S2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        map_scene(GroundModel(BANDS), s1, s2, tmp_path, ['embedding'], Options(window=32))


def test_an_assumed_order_of_bands_is_warned_of(tmp_path: Path) -> None:
    path = write(tmp_path / 's2.tif', DN)
    with pytest.warns(
        UserWarning, match=r's2\.tif: its bands have no names.*B8A, B09.*--scene_bands s2='
    ):
        Scene(('B02',), None, path).__exit__()
    # The order of bands of EuroSAT.
    order = (*S2[:8], *S2[9:], 'B8A')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with Scene(('B8A',), None, path, names={'s2': order}) as scene:
            np.testing.assert_array_equal(scene.read(0, 0, 32, 32)['image'][0], DN[12])


@pytest.mark.parametrize('missing', ['mean', 'zero'])
def test_a_missing_band_can_be_filled(tmp_path: Path, missing: str) -> None:
    """Level-2A has no B10."""
    there = [band for band in S2 if band != 'B10']
    path = write(tmp_path / 's2.tif', DN[[S2.index(band) for band in there]], descriptions=there)
    model = GroundModel(S2)
    with pytest.raises(BandError, match=r"missing bands \['B10'\].*--missing_bands"):
        map_scene(model, None, path, tmp_path, ['embedding'], Options(window=32))
    options = Options(window=32, missing_bands=missing)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match='no raster has the bands B10: filled with'):
        files = map_scene(model, None, path, tmp_path, ['embedding'], options)
    full = DN.astype('float32')
    full[10] = 0 if missing == 'zero' else SENTINEL2.bands[10].mean
    whole = write(tmp_path / 'whole.tif', full, descriptions=S2)
    same = map_scene(model, None, whole, tmp_path, ['embedding'], Options(window=32))
    with rasterio.open(files['embedding']) as a, rasterio.open(same['embedding']) as b:
        np.testing.assert_allclose(a.read(), b.read(), atol=1e-5)


# -- placement ----------------------------------------------------------------------------------


def ground(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (-12 + np.sin(x / 130) * np.cos(y / 170)).astype(np.float32)


def by_points(path: Path, size: int = 96) -> Path:
    """A rotated raster of the pattern, placed only by ground control points in degrees."""
    turned = Affine(10, 1.5, 500_000, 1.5, -10, 4_200_000)
    cols, rows = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    pixels = ground(*(turned @ (cols, rows)))
    steps = np.linspace(0, size, 7)
    points = []
    for row in steps:
        for col in steps:
            (lon,), (lat,) = transform_points(
                UTM, CRS.from_epsg(4326), *([v] for v in turned @ (col, row))
            )
            points.append(GroundControlPoint(row, col, lon, lat, 0))
    with rasterio.open(
        path, 'w', driver='GTiff', count=2, height=size, width=size, dtype='float32', gcps=points,
        crs='EPSG:4326',
    ) as dst:  # fmt: skip
        dst.write(np.stack([pixels, pixels]))
        dst.descriptions = ('VV', 'VH')
    return path


def test_ground_control_points_place_a_raster(tmp_path: Path) -> None:
    s1 = by_points(tmp_path / 's1-grd-20200101t050000.tif')
    with pytest.warns(UserWarning, match='49 ground control points.*EPSG:32630'):
        scene = Scene(('VV', 'VH'), s1)
    with scene:
        height, width = scene.grid.shape
        sample = scene.read(0, 0, height, width)
    valid = sample['valid'].numpy()
    assert scene.grid.crs == UTM
    assert scene.grid.res == pytest.approx((10, 10), rel=0.1)
    assert valid[height // 4 : -height // 4, width // 4 : -width // 4].all()
    cols, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    expected = ground(*(scene.grid.transform @ (cols, rows)))
    # A shift of half a pixel would give an error of 0.03.
    inner = valid.copy()
    inner[1:-1, 1:-1] &= valid[2:, 1:-1] & valid[:-2, 1:-1] & valid[1:-1, 2:] & valid[1:-1, :-2]
    error = np.abs(sample['image'][0].numpy() - expected)[inner]
    # Corners of the rotated raster have neighbours on one side only.
    assert np.percentile(error, 99) < 0.01
    assert error.max() < 0.03


def test_ground_control_points_lead_onto_the_grid_of_s2(tmp_path: Path) -> None:
    s1 = by_points(tmp_path / 's1.tif')
    place = NORTH_UP @ Affine.translation(24, 24)
    s2 = write(tmp_path / 's2.tif', DN, transform=place, descriptions=S2)
    with pytest.warns(UserWarning, match='ground control points'):
        scene = Scene(('VV', 'B02'), s1, s2)
    with scene:
        sample = scene.read(0, 0, 32, 32)
        part = scene.read(8, 16, 8, 8)
    cols, rows = np.meshgrid(np.arange(32) + 0.5, np.arange(32) + 0.5)
    assert sample['valid'].all()
    np.testing.assert_allclose(sample['image'][0], ground(*(place @ (cols, rows))), atol=0.015)
    np.testing.assert_allclose(part['image'][0], sample['image'][0, 8:16, 16:24], atol=0.005)


def test_a_raster_with_ground_control_points_is_mapped(tmp_path: Path) -> None:
    s1 = by_points(tmp_path / 's1.tif')
    with pytest.warns(UserWarning, match='ground control points'):
        files = map_scene(
            GroundModel(('VV', 'VH')), s1, None, tmp_path, ['embedding'], Options(window=32)
        )
    with rasterio.open(files['embedding']) as src:
        assert src.crs == UTM
        assert np.isfinite(src.read()).mean() > 0.7


def test_advice_for_a_raster_without_georeference_works(tmp_path: Path) -> None:
    path = write(tmp_path / 's2.tif', DN, crs=None, transform=Affine.identity(), descriptions=S2)
    with pytest.raises(ValueError, match=r'no CRS or no transform.*rio edit-info --crs'):
        Scene(('B02',), None, path)
    with rasterio.open(path, 'r+') as dst:
        dst.crs = 'EPSG:32633'
    with pytest.raises(ValueError, match=r'no CRS or no transform.*--transform'):
        Scene(('B02',), None, path)
    with rasterio.open(path, 'r+') as dst:
        dst.transform = Affine(10, 0, 500000, 0, -10, 5000000)
    Scene(('B02',), None, path).__exit__()


def test_rasters_in_archives_and_containers_are_mapped(tmp_path: Path) -> None:
    s2 = write(tmp_path / 'scene_2020-01-01.tif', DN, descriptions=S2)
    archive = tmp_path / 'archive.zip'
    with zipfile.ZipFile(archive, 'w') as file:
        file.write(s2, 'scene_2020-01-01.tif')
    path = Path(f'zip://{archive}!scene_2020-01-01.tif')
    files = map_scene(GroundModel(S2), None, path, tmp_path, ['embedding'], Options(window=32))
    assert files['embedding'] == tmp_path / 'scene_2020-01-01_embedding.tif'
    vv = write(tmp_path / 'vv.tif', noise('s1', 32, 32)[:1])
    rasterio.shutil.copy(vv, tmp_path / 'radar.nc', driver='netCDF')
    address = Path(f'NETCDF:"{tmp_path / "radar.nc"}":Band1')
    with Scene(('VV',), address, names={'s1': ['VV']}) as scene:
        np.testing.assert_array_equal(
            np.sort(scene.read(0, 0, 32, 32)['image'].numpy().ravel()),
            np.sort(noise('s1', 32, 32)[0].ravel()),
        )
