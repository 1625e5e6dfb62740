"""Files that differ from those of the data set: other bands, masks, scales, units, damage."""

from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from rasterio.enums import ColorInterp
from rasterio.transform import Affine

from geofm.datasets import SEN12MSCRTS, EmptySplitError
from geofm.datasets.catalogue.catalogue import update_catalogue
from geofm.datasets.catalogue.inspection import Problem, inspect
from geofm.datasets.pairs.skipped import Reason
from geofm.sen12ms import PairKey
from geofm.sensors import SENTINEL1, SENTINEL2
from tests.datasets.tree import SIZE, grid_at, random_pixels, write_pair, write_raster

KEY = PairKey('ROIs1868', 36, 0, 0)
GRID = grid_at(32632, 500000, 5300000)
L2A = tuple(band for band in SENTINEL2.band_names if band != 'B10')
S1, S2 = SENTINEL1.band_names, SENTINEL2.band_names

type Array = npt.NDArray[Any]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pair(tmp_path, KEY, GRID)


def describe(path: Path, names: Sequence[str]) -> None:
    with rasterio.open(path, 'r+') as dst:
        dst.descriptions = list(names)


def read(root: Path, **kwargs: Any) -> tuple[Array, Array]:
    sample = SEN12MSCRTS(root, 'all', **kwargs)[0]
    return sample['image'].numpy(), sample['valid'].numpy()


# Bands


def test_level_2a_is_read_without_b10(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    pixels = random_pixels('s2', GRID, 0)[:12]
    write_raster(pair[1], pixels, GRID)
    describe(pair[1], L2A)
    write_pair(tmp_path, KEY._replace(patch=1), GRID)
    image, valid = read(tmp_path, bands=[*S1, *L2A])
    np.testing.assert_array_equal(image[2:], pixels)
    assert valid.all()
    assert len(SEN12MSCRTS(tmp_path, 'all', bands=L2A)) == 2
    with pytest.warns(UserWarning, match='1 without some of the requested bands'):
        ds = SEN12MSCRTS(tmp_path, 'all')
    assert ds.index['patch'].tolist() == [1]
    assert ds.skipped.count(Reason.BANDS) == 1


def test_missing_bands_in_all_files_are_reported(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    write_raster(pair[1], random_pixels('s2', GRID, 0)[:12], GRID)
    describe(pair[1], L2A)
    with (
        pytest.warns(UserWarning, match='left out'),
        pytest.raises(EmptySplitError, match='without some of the requested bands'),
    ):
        SEN12MSCRTS(tmp_path, 'all')


@pytest.mark.parametrize('sensor', ['s1', 's2'])
def test_bands_are_taken_by_the_names_in_the_files(
    tmp_path: Path, pair: tuple[Path, Path], sensor: str
) -> None:
    path, names = (pair[0], S1) if sensor == 's1' else (pair[1], S2)
    order = np.arange(len(names))[::-1]
    pixels = random_pixels(sensor, GRID, 0)
    write_raster(path, pixels[order], GRID)
    describe(path, [names[i] for i in order])
    image, _ = read(tmp_path)
    np.testing.assert_array_equal(image[:2] if sensor == 's1' else image[2:], pixels)
    mixed = ['B12', 'VH', 'B02', 'VV']
    np.testing.assert_array_equal(
        read(tmp_path, bands=mixed)[0], image[[(*S1, *S2).index(band) for band in mixed]]
    )


def test_a_file_that_loses_a_band_after_the_scan(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    ds = SEN12MSCRTS(tmp_path, 'all')
    write_raster(pair[1], random_pixels('s2', GRID, 0)[:12], GRID)
    describe(pair[1], L2A)
    with pytest.raises(ValueError, match=rf"{pair[1].name}.*missing bands \['B10'\]"):
        ds[0]


# Nodata


def hidden() -> Array:
    mask = np.full((SIZE, SIZE), 255, np.uint8)
    mask[:9, 4:] = 0
    return mask


@pytest.mark.parametrize('which', [0, 1])
@pytest.mark.parametrize('internal', [True, False], ids=['internal', 'msk'])
@pytest.mark.parametrize('scanned_before', [True, False])
def test_masks_of_files(
    tmp_path: Path, pair: tuple[Path, Path], which: int, internal: bool, scanned_before: bool
) -> None:
    if scanned_before:
        update_catalogue(tmp_path)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal), rasterio.open(pair[which], 'r+') as dst:
        dst.write_mask(hidden())
    _, valid = read(tmp_path)
    np.testing.assert_array_equal(valid, hidden() != 0)


def test_an_alpha_band(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    pixels = random_pixels('s2', GRID, 0)
    write_raster(pair[1], np.concatenate([pixels, hidden().astype('uint16')[None]]), GRID)
    with rasterio.open(pair[1], 'r+') as dst:
        dst.colorinterp = [*dst.colorinterp[:-1], ColorInterp.alpha]
    image, valid = read(tmp_path)
    np.testing.assert_array_equal(valid, hidden() != 0)
    np.testing.assert_array_equal(image[2:], pixels)


@pytest.mark.parametrize('tagged', [True, False], ids=['tagged', 'untagged'])
@pytest.mark.parametrize('sensor', ['s1', 's2'])
def test_fill_in_one_band(
    tmp_path: Path, pair: tuple[Path, Path], sensor: str, tagged: bool
) -> None:
    pixels = random_pixels(sensor, GRID, 0).astype('float32' if sensor == 's1' else 'int16')
    pixels[1, :5] = -9999
    write_raster(pair[sensor == 's2'], pixels, GRID, -9999 if tagged else None)
    _, valid = read(tmp_path)
    assert not valid[:5].any()
    assert valid[5:].all()


def test_a_nodata_value_of_0_in_one_band_of_s2_is_a_measurement(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    pixels = random_pixels('s2', GRID, 0)
    pixels[10] = 0
    pixels[:, 3, 4] = 0
    write_raster(pair[1], pixels, GRID, nodata=0)
    assert np.argwhere(~read(tmp_path)[1]).tolist() == [[3, 4]]


@pytest.mark.parametrize('beyond', [3e38, -9999.0, 1e30, np.nan, -np.inf])
def test_warped_pixels_are_not_mixed_with_nodata(tmp_path: Path, beyond: float) -> None:
    """With S1 shifted by half a pixel, neighbours of invalid pixels keep their level."""
    write_pair(tmp_path, KEY, GRID)
    s1 = next(tmp_path.rglob('s1_*.tif'))
    pixels = np.full((2, SIZE, SIZE), -12, 'float32')
    pixels[0, 10:13, 10:13] = beyond
    write_raster(s1, pixels, grid_at(32632, 500_004, 5_300_004))
    image, valid = read(tmp_path)
    assert not valid[11, 11]
    np.testing.assert_allclose(image[:2, valid], -12, atol=1e-4)


def splice(path: Path) -> None:
    """Random bytes among the pixels, as from a broken disk."""
    content = bytearray(path.read_bytes())
    junk = np.random.default_rng(0).bytes(len(content) // 3)
    content[len(content) // 2 : len(content) // 2 + len(junk)] = junk
    path.write_bytes(content)


def test_spliced_files(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    splice(pair[0])
    assert inspect(pair[0], 's1').problem == Problem.DAMAGED
    # Damage that the scan does not detect leaves the other pixels valid.
    update_catalogue(tmp_path)
    pixels = random_pixels('s1', GRID, 0)
    pixels[0, 7, 9], pixels[1, 8, 9] = 3e38, -101
    write_raster(pair[0], pixels, GRID)
    image, valid = read(tmp_path)
    assert np.argwhere(~valid).tolist() == [[7, 9], [8, 9]]
    assert np.abs(image[:2, valid]).max() <= 100


@pytest.mark.parametrize('where', ['end', 'middle'])
def test_files_that_are_longer_than_their_header_says(pair: tuple[Path, Path], where: str) -> None:
    content = pair[1].read_bytes()
    at = len(content) if where == 'end' else len(content) // 2
    pair[1].write_bytes(content[:at] + bytes(101) + content[at:])
    assert inspect(pair[1], 's2').problem == Problem.LONGER


@pytest.mark.parametrize('change', ['tags', 'overviews', 'nothing'])
def test_files_that_were_changed_in_place_are_not_too_long(
    pair: tuple[Path, Path], change: str
) -> None:
    with rasterio.open(pair[1], 'r+') as dst:
        if change == 'tags':
            dst.update_tags(note='x' * 500)
        elif change == 'overviews':
            dst.build_overviews([2])
    assert inspect(pair[1], 's2').problem is None


# Units


def scaled(path: Path) -> None:
    with rasterio.open(path) as src:
        pixels, count = src.read(), src.count
    write_raster(path, pixels + np.uint16(1000), GRID)
    with rasterio.open(path, 'r+') as dst:
        dst.scales, dst.offsets = [1e-4] * count, [-0.1] * count


def test_the_scale_of_a_file_is_applied(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    expected, _ = read(tmp_path)
    scaled(pair[1])
    image, valid = read(tmp_path)
    np.testing.assert_array_equal(image, expected)
    assert valid.all()


def test_decibels_as_integers_with_a_scale(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    stored = np.random.default_rng(0).integers(-2500, 100, (2, SIZE, SIZE)).astype('int16')
    write_raster(pair[0], stored, GRID)
    assert inspect(pair[0], 's1').problem == Problem.DTYPE
    with rasterio.open(pair[0], 'r+') as dst:
        dst.scales = [0.01] * 2
    np.testing.assert_allclose(read(tmp_path)[0][:2], stored / 100, rtol=1e-6)


UNITS: dict[str, tuple[Problem, int, Callable[[Array], Array]]] = {
    'power': (Problem.LINEAR, 0, lambda x: (10 ** (x / 10)).astype('float32')),
    'noisy power': (Problem.LINEAR, 0, lambda x: (10 ** (x / 10) - 2e-3).astype('float32')),
    'raw': (Problem.RAW, 0, lambda x: (300 * 10 ** (x / 20) + 30).astype('float32')),
    'raw, integers': (Problem.RAW, 0, lambda x: (300 * 10 ** (x / 20) + 30).astype('uint16')),
    'reflectance': (Problem.REFLECTANCE, 1, lambda x: (x / 1e4).astype('float32')),
}


@pytest.mark.parametrize('kind', UNITS)
@pytest.mark.parametrize('compress', ['none', 'deflate'])
def test_files_in_another_unit_are_refused(
    pair: tuple[Path, Path], kind: str, compress: str
) -> None:
    problem, which, change = UNITS[kind]
    path = pair[which]
    with rasterio.open(path) as src:
        pixels = change(src.read())
        profile = {**src.profile, 'dtype': pixels.dtype, 'compress': compress}
    with rasterio.open(path, 'w', **profile) as dst:
        dst.write(pixels)
    assert inspect(path, ('s1', 's2')[which]).problem == problem


# Files of other kinds, and memory


def test_a_virtual_raster_that_is_named_tif_is_not_opened(pair: tuple[Path, Path]) -> None:
    secret = pair[1].with_name('elsewhere.tif')
    pair[1].rename(secret)
    with rasterio.open(secret) as src, rasterio.vrt.WarpedVRT(src) as vrt:
        profile = vrt.profile
    assert profile['driver'] == 'VRT'
    bands = ''.join(
        f'<VRTRasterBand dataType="UInt16" band="{i}"><SimpleSource><SourceFilename>{secret}'
        f'</SourceFilename><SourceBand>{i}</SourceBand></SimpleSource></VRTRasterBand>'
        for i in range(1, 14)
    )
    a, b, c, d, e, f = tuple(GRID.transform)[:6]
    pair[1].write_text(
        f'<VRTDataset rasterXSize="{SIZE}" rasterYSize="{SIZE}"><SRS>EPSG:32632</SRS>'
        f'<GeoTransform>{c},{a},{b},{f},{d},{e}</GeoTransform>{bands}</VRTDataset>'
    )
    with rasterio.open(pair[1]) as src:
        assert src.read().any()
    assert inspect(pair[1], 's2').problem == Problem.UNREADABLE


@pytest.mark.parametrize('size', [12_000, 60_000])
def test_few_bytes_that_claim_many_pixels_are_not_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / 'a.tif'
    rasterio.open(
        path,
        'w',
        driver='GTiff',
        width=size,
        height=size,
        count=13,
        dtype='uint16',
        crs=GRID.crs,
        transform=Affine(10, 0, 0, 0, -10, 0),
        tiled=True,
        compress='deflate',
        SPARSE_OK=True,
    ).close()
    assert inspect(path, 's2').problem == Problem.TOO_LARGE


def test_pairs_are_not_read_whole_if_they_would_take_gigabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(tmp_path, KEY, GRID, date(2018, 1, 1), date(2018, 1, 2))
    ds = SEN12MSCRTS(tmp_path, 'all')
    monkeypatch.setattr('geofm.datasets.pairs.dataset.MOST_VALUES', 15 * SIZE * SIZE - 1)
    with pytest.raises(ValueError, match='patch_size'):
        ds[0]
    assert ds.read_pair(0, rasterio.windows.Window(0, 0, 8, 8))['valid'].all()
