"""Contents of a page: vectors, their positions, and files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Transformer
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm.grid import Grid
from tests.maps.scenes import NORTH_UP, UTM, write

pytest.importorskip('rio_tiler', reason='the page needs rio-tiler, of the extra "maps"')
pytest.importorskip('xstatic.pkg.leaflet', reason='the page needs xstatic-leaflet, of "maps"')

from geofm.maps.view.page import (
    EmbeddingGrid,
    Layer,
    find_products,
    product_layers,
    scene_layers,
    write_page,
)
from geofm.maps.view.page.mesh import TOLERANCE, PatchMap
from geofm.maps.view.tiles import Classes, Scalar
from tests.maps.pages import (
    COLS,
    DEGREES,
    DIMS,
    EMPTY,
    ROWS,
    Made,
    cosines,
    read_data,
    rounding_bound,
    vectors,
)

# ---- Vectors ----------------------------------------------------------------------------------


def test_int8_preserves_similarities_up_to_rounding() -> None:
    exact = vectors()
    small = EmbeddingGrid.of(exact, Grid(UTM, NORTH_UP, ROWS, COLS)).vectors
    assert small.dtype == np.int8
    assert (np.abs(small.astype(int)).max(axis=-1) == 127).all()
    for row, col in ((0, 0), (4, 7)):
        error = np.abs(cosines(small, row, col) - cosines(exact, row, col))
        assert (error <= rounding_bound(exact, row, col)).all()
        assert error.max() < 0.02


@pytest.mark.parametrize('dtype', ['float32', 'int8'])
def test_embedding_rasters(tmp_path: Path, dtype: str) -> None:
    exact = vectors()
    exact[EMPTY] = np.nan
    path = tmp_path / 'embedding.tif'
    if dtype == 'float32':
        write(path, exact.transpose(2, 0, 1), nodata=np.nan)
    else:
        scales = np.nanmax(np.abs(exact), axis=(0, 1)) / 127
        codes = np.where(np.isnan(exact), -128, np.rint(exact / scales)).astype(np.int8)
        write(path, codes.transpose(2, 0, 1), nodata=-128)
        with rasterio.open(path, 'r+') as dst:
            dst.scales = tuple(scales.tolist())
        exact = np.where(codes == -128, np.nan, codes * scales).astype(np.float32)
    embedding = EmbeddingGrid.read(path)
    assert embedding.grid == Grid(UTM, NORTH_UP, ROWS, COLS)
    assert embedding.kept == 1
    assert (embedding.vectors[EMPTY] == 0).all()
    known = np.isfinite(exact).all(axis=-1)
    assert embedding.vectors.any(axis=-1)[known].all()
    error = np.abs(cosines(embedding.vectors, 0, 0) - cosines(exact, 0, 0))[known]
    assert (error <= rounding_bound(exact, 0, 0)[known]).all()


def test_large_embeddings_are_projected(tmp_path: Path) -> None:
    """Vectors in a 4-dimensional subspace of 24 dimensions are projected without loss."""
    random = np.random.default_rng(0)
    flat = random.standard_normal((ROWS, COLS, 4)) @ random.standard_normal((4, DIMS))
    path = write(tmp_path / 'a.tif', flat.astype(np.float32).transpose(2, 0, 1))
    embedding = EmbeddingGrid.read(path, most_bytes=ROWS * COLS * 4 + 5)
    assert embedding.vectors.shape == (ROWS, COLS, 4)
    assert embedding.kept == pytest.approx(1)
    np.testing.assert_allclose(
        cosines(embedding.vectors, 2, 2), cosines(flat, 2, 2), rtol=0, atol=0.02
    )
    less = EmbeddingGrid.read(path, most_bytes=ROWS * COLS * 2)
    assert less.vectors.shape == (ROWS, COLS, 2)
    assert 0.3 < less.kept < 0.999


def test_embedding_without_data(tmp_path: Path) -> None:
    path = write(tmp_path / 'a.tif', np.full((3, 4, 4), np.nan, np.float32))
    with pytest.raises(ValueError, match='no patch has data'):
        EmbeddingGrid.read(path)


# ---- Positions of patches ---------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    longitude=st.floats(-170, 170),
    latitude=st.floats(-70, 70),
    angle=st.floats(0, 360),
    pixel=st.sampled_from([80.0, 160.0, 640.0]),
    shape=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    degrees=st.booleans(),
)
def test_meshes_are_within_a_hundredth_of_a_patch(
    longitude: float,
    latitude: float,
    angle: float,
    pixel: float,
    shape: tuple[int, int],
    degrees: bool,
) -> None:
    zone = int((longitude + 180) // 6) + 1
    crs = DEGREES if degrees else CRS.from_epsg((32600 if latitude >= 0 else 32700) + zone)
    x, y = Transformer.from_crs(4326, crs, always_xy=True).transform(longitude, latitude)
    pixel = pixel / 111_320 if degrees else pixel
    transform = Affine.translation(x, y) @ Affine.rotation(angle) @ Affine.scale(pixel, -pixel)
    grid = Grid(crs, transform, *shape)
    patch_map = PatchMap.of(grid)
    random = np.random.default_rng(0)
    rows, cols = random.uniform(0, 1, (2, 100)) * np.array(shape)[:, None]
    to_world = Transformer.from_crs(crs, 3857, always_xy=True)
    easting, northing = to_world.transform(*(transform @ (cols, rows)))
    world = 2 * np.pi * 6_378_137
    west, north, east, south = patch_map.box
    s = (easting / world + 0.5 - west) / (east - west)
    t = (0.5 - northing / world - north) / (south - north)
    assert s.min() >= -1e-9
    assert s.max() <= 1 + 1e-9
    # Between the points where the mesh was checked, its error may be slightly larger.
    there = patch_map.to_patch(s, t)
    np.testing.assert_allclose(there, np.stack([rows, cols], axis=-1), rtol=0, atol=2 * TOLERANCE)
    back = patch_map.to_box(cols / grid.width, rows / grid.height)
    again = patch_map.to_patch(*np.moveaxis(back, -1, 0))
    np.testing.assert_allclose(again, np.stack([rows, cols], axis=-1), rtol=0, atol=4 * TOLERANCE)


# ---- The folder -------------------------------------------------------------------------------


def test_a_page_is_complete(pages: Callable[[str], Made]) -> None:
    index = pages('utm').index
    data = read_data(index)
    assert [(layer['group'], layer['name']) for layer in data['layers']] == [
        ('Scene', 'True colour'),
        ('Scene', 'Radar'),
        ('Attention: Sentinel-1, block 11', 'Mean'),
        ('Attention: Sentinel-1, block 11', 'Head 0'),
        ('Attention: Sentinel-2, block 11', 'Mean'),
        ('Attention: Sentinel-2, block 11', 'Head 0'),
        ('Features', 'PCA'),
        ('Features', 'Segments'),
    ]
    for layer in data['layers']:
        for zoom, (left, top, right, bottom) in layer['ranges'].items():
            tiles = {
                f'{zoom}/{x}/{y}' for x in range(left, right + 1) for y in range(top, bottom + 1)
            }
            there = tiles - {*layer['missing']}
            folder = index.parent / Path(layer['url']).parents[2]
            files = {
                path.relative_to(folder).with_suffix('').as_posix()
                for path in folder.glob(f'{zoom}/*/*.png')
            }
            assert files == there
            assert files
    text = index.read_text('utf-8')
    assert '<title>A &lt;place&gt; &amp; its &quot;patches&quot;</title>' in text
    for path in [index, *index.parent.glob('*.js'), *index.parent.glob('*.css')]:
        # No URL on the Internet except the link on Leaflet's name.
        words = path.read_text('utf-8').replace('https://leafletjs.com', '')
        assert 'http' not in words, path
    assert 'Redistribution' in (index.parent / 'leaflet' / 'LICENSE').read_text()


def test_a_page_replaces_a_page_and_nothing_else(tmp_path: Path) -> None:
    raster = write(tmp_path / 'a.tif', np.ones((1, 64, 64), np.float32))
    layer = Layer('a', raster, Scalar(0, 1), 'Group')
    index = write_page(tmp_path / 'page', [layer], title='One', zooms=(14, 15))
    assert write_page(tmp_path / 'page', [layer], title='Two', zooms=(14, 14)) == index
    assert 'Two' in index.read_text()
    assert [p.name for p in (index.parent / 'tiles' / '00-group-a').iterdir()] == ['14']
    with pytest.raises(ValueError, match='is not a page'):
        write_page(tmp_path, [layer], title='Three')
    with pytest.raises(ValueError, match='nothing to show'):
        write_page(tmp_path / 'none', [], title='Four')
    with pytest.raises(ValueError, match='basemap'):
        write_page(tmp_path / 'none', [layer], title='Five', basemap='https://tiles.example')
    assert {p.name for p in tmp_path.iterdir()} == {'a.tif', 'page'}


def test_products_of_one_scene(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='no product found'):
        find_products(tmp_path)
    for name in ('a_pca.tif', 'a_embedding.tif', 'b_pca.tif'):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="choose one: \\['a', 'b'\\]"):
        find_products(tmp_path)
    assert [*find_products(tmp_path, 'a')] == ['pca', 'embedding']
    with pytest.raises(ValueError, match='c_pca'):
        find_products(tmp_path, 'c')


def test_segments_have_their_own_colours(tmp_path: Path) -> None:
    path = write(tmp_path / 'a_segments.tif', np.arange(16, dtype=np.uint8).reshape(1, 4, 4) % 3)
    (layer,) = product_layers({'segments': path})
    assert isinstance(layer.style, Classes)
    assert len({*layer.style.colors.values()}) == 3
    with rasterio.open(path, 'r+') as dst:
        dst.write_colormap(1, {0: (1, 2, 3, 255), 1: (4, 5, 6, 255), 2: (7, 8, 9, 255)})
    (layer,) = product_layers({'segments': path})
    assert isinstance(layer.style, Classes)
    assert layer.style.colors == {0: (1, 2, 3), 1: (4, 5, 6), 2: (7, 8, 9)}


def test_all_products_have_a_layer(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).random((2, 4, 4)).astype(np.float32)
    maps[1] += 10
    products = {
        'attention': write(tmp_path / 'a.tif', maps, descriptions=['fusion last layer mean', 'x']),
        'rollout': write(tmp_path / 'r.tif', maps, descriptions=['s1 rollout', 's2 rollout']),
        'point': write(
            tmp_path / 'p.tif', maps, descriptions=['s2 block 3 mean', 's2 block 3 head 0']
        ),
        'foreground': write(tmp_path / 'f.tif', (maps[:1] > 0.5).astype(np.uint8)),
    }
    layers = product_layers(products)
    assert [(layer.group, layer.name) for layer in layers] == [
        ('Attention: Fusion, last layer', 'Mean'),
        ('Attention', 'X'),
        ('Attention rollout', 'Sentinel-1'),
        ('Attention rollout', 'Sentinel-2'),
        ('Attention of a point: Sentinel-2, block 3', 'Mean'),
        ('Attention of a point: Sentinel-2, block 3', 'Head 0'),
        ('Features', 'Foreground'),
    ]
    first, second, *shared = (layer.style for layer in layers if isinstance(layer.style, Scalar))
    assert (first.band, second.band) == (1, 2)
    assert first.high < 1 < 10 < second.low, 'each source has its own scale'
    assert all(style.low < 1 and style.high > 10 for style in shared), 'maps of one share theirs'


def test_pictures_need_their_bands(tmp_path: Path) -> None:
    pixels = np.ones((2, 32, 32), np.float32)
    path = write(tmp_path / 'a.tif', pixels, descriptions=['B04', 'B08'])
    with pytest.raises(ValueError, match='B03, B02'):
        scene_layers(s2=path)
