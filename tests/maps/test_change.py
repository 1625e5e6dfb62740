"""The map of change, compared with NumPy."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from rasterio.transform import Affine

from geofm.cli import main
from geofm.maps.make.change import map_change
from tests.maps.scenes import NORTH_UP, write

ROWS, COLS, DIMS = 7, 11, 6


def embedding(
    path: Path, values: npt.NDArray[np.float32], day: str, weights: str = 'a' * 64
) -> Path:
    """Write an embedding as `geofm embed` does: (D, rows, columns)."""
    write(path, values, nodata=np.nan)
    with rasterio.open(path, 'r+') as dst:
        dst.update_tags(weights_sha256=weights, model='vit', one_date=day, other_date='NaT')
    return path


@pytest.fixture
def two(tmp_path: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Path, Path]:
    first, second = np.random.default_rng(0).standard_normal((2, DIMS, ROWS, COLS), np.float32)
    second[:, 0, :3] = 4 * first[:, 0, :3]  # the same direction
    first[:, 2, 2] = np.nan
    second[3, 4, 5] = np.nan  # in one band
    second[:, 5, 5] = 0  # no direction
    before = embedding(tmp_path / 'old_embedding.tif', first, '2019-05-01')
    after = embedding(tmp_path / 'new_embedding.tif', second, '2021-05-03')
    return first, second, before, after


def test_change_equals_numpy(
    two: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Path, Path], tmp_path: Path
) -> None:
    first, second, before, after = two
    main(['change', str(before), str(after), '--output', str(tmp_path / 'maps')])
    with rasterio.open(tmp_path / 'maps' / 'new_change.tif') as src:
        change, tags = src.read(1), src.tags()
        assert (src.dtypes, src.count) == (('float32',), 1)
        assert np.isnan(src.nodata)
        with rasterio.open(after) as like:
            assert (src.crs, src.transform, src.shape) == (like.crs, like.transform, like.shape)
    a, b = first.astype(float), second.astype(float)
    with np.errstate(invalid='ignore'):
        wanted = 1 - (a * b).sum(0) / (np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0))
    np.testing.assert_allclose(change, wanted, rtol=0, atol=1e-6)
    assert np.isnan(change).sum() == 3
    assert np.abs(change[0, :3]).max() < 1e-6
    assert (tags['before_date'], tags['after_date']) == ('2019-05-01', '2021-05-03')
    assert (tags['before'], tags['after_one_date']) == ('old_embedding.tif', '2021-05-03')


def test_int8_embeddings(tmp_path: Path) -> None:
    """Scales of the file are applied, and nodata stays nodata."""
    codes = np.random.default_rng(1).integers(-127, 128, (2, DIMS, ROWS, COLS)).astype(np.int8)
    codes[0, :, 1, 1] = -128
    scales = np.linspace(0.1, 3, DIMS)
    paths = []
    for name, values in zip('ab', codes, strict=True):
        path = write(tmp_path / f'{name}_embedding.tif', values, nodata=-128)
        with rasterio.open(path, 'r+') as dst:
            dst.scales = tuple(scales)
            dst.update_tags(weights_sha256='a')
        paths.append(path)
    with rasterio.open(map_change(paths[0], paths[1], tmp_path / 'maps')) as src:
        change = src.read(1)
        assert src.tags()['before_date'] == 'unknown'
    a, b = codes * scales[:, None, None]
    wanted = 1 - (a * b).sum(0) / (np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0))
    wanted[1, 1] = np.nan
    np.testing.assert_allclose(change, wanted, rtol=0, atol=1e-5)


def test_embeddings_that_cannot_be_compared(
    two: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Path, Path], tmp_path: Path
) -> None:
    first, _, before, after = two
    other = embedding(tmp_path / 'other_embedding.tif', first, '2020-01-01', 'b' * 64)
    with pytest.raises(ValueError, match=r'other_embedding.*different models.*same checkpoint'):
        map_change(before, other, tmp_path / 'maps')
    moved = embedding(tmp_path / 'moved_embedding.tif', first, '2020-01-01')
    with rasterio.open(moved, 'r+') as dst:
        dst.transform = NORTH_UP @ Affine.translation(1, 0)
    with pytest.raises(ValueError, match=r'moved_embedding.*patch grids differ.*gdalwarp'):
        map_change(before, moved, tmp_path / 'maps')
    plain = write(tmp_path / 'plain.tif', first)
    with pytest.raises(ValueError, match=r'plain\.tif: not an embedding'):
        map_change(before, plain, tmp_path / 'maps')
    with pytest.raises(FileNotFoundError, match=r'none\.tif'):
        map_change(before, tmp_path / 'none.tif', tmp_path / 'maps')
    assert not [*(tmp_path / 'maps').glob('*.tif')]
    assert after.exists()


def test_change_is_a_layer_of_the_page(
    two: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], Path, Path], tmp_path: Path
) -> None:
    pytest.importorskip('rio_tiler', reason='the page needs rio-tiler, of the extra "maps"')
    from geofm.maps.view.page import find_products, product_layers
    from geofm.maps.view.tiles import Scalar

    _, _, before, after = two
    map_change(before, after, tmp_path)
    products = find_products(tmp_path, 'new')
    assert [*products] == ['change', 'embedding']
    (layer,) = product_layers(products)
    assert (layer.group, layer.name) == ('Features', 'Change')
    # The description has both dates and explains the values.
    for words in ('Before: 2019-05-01', 'After: 2021-05-03', '0 for', 'no change', '1 for'):
        assert words in layer.description
    assert isinstance(layer.style, Scalar)
    assert (layer.style.low, layer.style.unit) == (0, 'cosine distance')
