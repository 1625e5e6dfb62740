"""The page, driven in a browser without network, shows what NumPy says where pyproj says."""

import functools
import http.server
import io
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps
from pyproj import Transformer
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm.grid import Grid
from tests.maps.scenes import NORTH_UP, UTM, noise, write

pytest.importorskip('rio_tiler', reason='the page needs rio-tiler, of the extra "maps"')
pytest.importorskip('xstatic.pkg.leaflet', reason='the page needs xstatic-leaflet, of "maps"')

from geofm.commands.page import page
from geofm.maps.page import (
    EmbeddingGrid,
    Layer,
    find_products,
    product_layers,
    scene_layers,
    write_page,
)
from geofm.maps.page.mesh import TOLERANCE, PatchMap
from geofm.maps.tiles import Classes, Scalar

Doubles = npt.NDArray[np.float64]

PATCH = 16
ROWS, COLS, DIMS = 9, 12, 24
DEGREES = CRS.from_epsg(4326)
GRIDS = {
    'utm': (UTM, NORTH_UP),
    'degrees': (DEGREES, Affine(9e-5, 0, 5, 0, -9e-5, 60)),
    'south-up': (UTM, Affine(10, 0, 350_000, 0, 10, 4_190_000)),
    # Across the antimeridian.
    'fiji': (CRS.from_epsg(32760), Affine(10, 0, 819_430, 0, -10, 8_174_200)),
}
EMPTY = (3, 2)  # a patch without data


# ---- Vectors ----------------------------------------------------------------------------------


def vectors(rows: int = ROWS, cols: int = COLS, dims: int = DIMS) -> npt.NDArray[np.float32]:
    """Random vectors of different lengths, that resemble one another where patches are close."""
    random = np.random.default_rng(1)
    row, col = np.mgrid[:rows, :cols]
    smooth = np.stack([np.sin(row / 3), np.cos(col / 4), row / rows, col / cols], axis=-1)
    values = smooth @ random.standard_normal((4, dims)) + 0.5 * random.standard_normal(
        (rows, cols, dims)
    )
    return (values * random.uniform(0.1, 9, (rows, cols, 1))).astype(np.float32)


def cosines(vectors: npt.NDArray[Any], row: int, col: int) -> Doubles:
    """Cosine similarity of each patch to one, shape (rows, columns)."""
    v = vectors.astype(np.float64)
    with np.errstate(invalid='ignore'):
        v /= np.linalg.norm(v, axis=-1, keepdims=True)
    similar: Doubles = v @ v[row, col]
    return similar


def rounding_bound(exact: npt.NDArray[np.float32], row: int, col: int) -> Doubles:
    """How much int8 rounding may move a cosine: each component by half a step at most."""
    step = np.abs(exact).max(axis=-1) / 127
    angle = 0.5 * step * np.sqrt(exact.shape[-1]) / np.linalg.norm(exact, axis=-1)
    # An error e of a unit vector moves it by at most e, and its normalisation by as much again.
    bound: Doubles = 2 * (angle + angle[row, col])
    return bound


def test_int8_keeps_similarities_to_rounding() -> None:
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
    """Vectors of 4 dimensions in a space of 24: a projection onto 4 loses nothing."""
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


# ---- Where patches lie ------------------------------------------------------------------------


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
    # Between the points at which the mesh was checked, its error may be a little larger.
    there = patch_map.to_patch(s, t)
    np.testing.assert_allclose(there, np.stack([rows, cols], axis=-1), rtol=0, atol=2 * TOLERANCE)
    back = patch_map.to_box(cols / grid.width, rows / grid.height)
    again = patch_map.to_patch(*np.moveaxis(back, -1, 0))
    np.testing.assert_allclose(again, np.stack([rows, cols], axis=-1), rtol=0, atol=4 * TOLERANCE)


# ---- The folder -------------------------------------------------------------------------------


@dataclass
class Made:
    """Products of a scene, and the page of them."""

    index: Path
    grid: Grid
    vectors: npt.NDArray[np.float32]
    segments: npt.NDArray[np.uint8]

    def place(self, row: float, col: float) -> tuple[float, float]:
        """Latitude and longitude of a fractional row and column."""
        to_degrees = Transformer.from_crs(self.grid.crs, 4326, always_xy=True)
        longitude, latitude = to_degrees.transform(*(self.grid.transform @ (col, row)))
        # The map goes on beyond 180 degrees.
        return latitude, longitude + 360 if longitude < -170 else longitude


def make(folder: Path, crs: CRS, transform: Affine) -> Made:
    """Write a scene, its products as they come out of a model, and the page."""
    patches = Grid(crs, transform, ROWS * PATCH, COLS * PATCH).coarsen(PATCH)
    s1 = write(
        folder / 's1.tif', noise('s1', ROWS * PATCH, COLS * PATCH), crs, transform, ['VV', 'VH']
    )
    s2 = folder / 'place.tif'
    write(s2, noise('s2', ROWS * PATCH, COLS * PATCH).clip(1).astype(np.uint16), crs, transform)
    exact = vectors()
    exact[EMPTY] = np.nan
    on_patches = {'crs': crs, 'transform': patches.transform}
    write(folder / 'place_embedding.tif', exact.transpose(2, 0, 1), **on_patches, nodata=np.nan)
    attention = np.random.default_rng(2).gamma(2, 0.5, (4, ROWS, COLS)).astype(np.float32)
    attention[:, *EMPTY] = np.nan
    names = ['s1 block 11 mean', 's1 block 11 head 0', 's2 block 11 mean', 's2 block 11 head 0']
    write(
        folder / 'place_attention.tif', attention, **on_patches, descriptions=names, nodata=np.nan
    )
    pca = np.random.default_rng(3).integers(1, 255, (3, ROWS, COLS)).astype(np.uint8)
    write(folder / 'place_pca.tif', pca, **on_patches, nodata=0)
    segments = np.random.default_rng(4).integers(0, 5, (1, ROWS, COLS)).astype(np.uint8)
    segments[0, *EMPTY] = 255
    write(folder / 'place_segments.tif', segments, **on_patches, nodata=255)
    page(folder, s1=s1, s2=s2, title='A <place> & its "patches"')
    return Made(folder / 'place_page' / 'index.html', patches, exact, segments[0])


@pytest.fixture(scope='session')
def pages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Pages by the name of their grid, made when they are asked for."""

    @functools.cache
    def made(name: str) -> Made:
        return make(tmp_path_factory.mktemp(name), *GRIDS[name])

    return made


def read_data(index: Path) -> dict[str, Any]:
    script = (index.parent / 'data.js').read_text('utf-8')
    data: dict[str, Any] = json.loads(script.removeprefix('window.geofm = ').rstrip(';\n'))
    return data


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
        # No address on the Internet, but Leaflet's name, which is a link.
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
    with pytest.raises(ValueError, match='not a page'):
        write_page(tmp_path, [layer], title='Three')
    with pytest.raises(ValueError, match='nothing to show'):
        write_page(tmp_path / 'none', [], title='Four')
    with pytest.raises(ValueError, match='basemap'):
        write_page(tmp_path / 'none', [layer], title='Five', basemap='https://tiles.example')
    assert {p.name for p in tmp_path.iterdir()} == {'a.tif', 'page'}


def test_products_of_one_scene(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='none of'):
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


# ---- In a browser -----------------------------------------------------------------------------


class Browser:
    """Chromium without network."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which('chromium') or ''
        for argument in (
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            '--no-first-run',
            '--hide-scrollbars',
            '--disable-background-networking',
            '--disable-component-update',
            '--disable-sync',
            '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
            f'--user-data-dir={profile}',
        ):
            options.add_argument(argument)
        options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
        self.driver = webdriver.Chrome(options, Service(shutil.which('chromedriver')))

    def open(self, url: str, width: int = 1200, height: int = 800) -> None:
        self.driver.execute_cdp_cmd(
            'Emulation.setDeviceMetricsOverride',
            {'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': False},
        )
        self.driver.get(url)
        self.wait('document.querySelectorAll("#map img.leaflet-tile").length > 0')
        self.settle()

    def run(self, script: str, *args: object) -> Any:
        return self.driver.execute_script(script, *args)

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + 10
        while not self.run(f'return {condition}'):
            assert time.monotonic() < deadline, f'{condition} did not come true'
            time.sleep(0.02)

    def settle(self) -> None:
        """Wait until all tiles are loaded and faded in, and the map stands still."""
        self.wait(
            '[...document.querySelectorAll("#map .leaflet-tile")].every((tile) => '
            'tile.classList.contains("leaflet-tile-loaded") && tile.style.opacity === "1")'
            ' && !document.querySelector(".leaflet-zoom-anim, .leaflet-pan-anim")'
        )

    def point(self, latlng: tuple[float, float]) -> tuple[float, float]:
        """Pixel of a place in the window."""
        x, y = self.run(
            'const p = geofm.map.latLngToContainerPoint(arguments[0]); return [p.x, p.y];', latlng
        )
        return x, y

    def click(self, latlng: tuple[float, float]) -> None:
        x, y = self.point(latlng)
        for kind in ('mouseMoved', 'mousePressed', 'mouseReleased'):
            self.driver.execute_cdp_cmd(
                'Input.dispatchMouseEvent',
                {'type': kind, 'x': x, 'y': y, 'button': 'left', 'clickCount': 1},
            )

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def choose(self, group: str, name: str) -> None:
        """Click a choice by its label."""
        self.run(
            'const set = [...document.querySelectorAll("fieldset")]'
            '.find((f) => f.querySelector("legend").textContent === arguments[0]);'
            '[...set.querySelectorAll("label")]'
            '.find((l) => l.textContent === arguments[1]).querySelector("input").click();',
            group,
            name,
        )

    def show(self, group: str, name: str) -> None:
        """Choose a layer, and wait until it is there."""
        self.choose(group, name)
        self.settle()

    def opaque(self) -> None:
        """Set the opacity to 100 %."""
        self.run(
            'const slider = document.querySelector("#opacity input"); slider.value = 100;'
            'slider.dispatchEvent(new Event("input"));'
        )

    def picture(self) -> npt.NDArray[np.uint8]:
        """What the window shows, without marks: (H, W, 3)."""
        self.run('for (const m of document.querySelectorAll(".chosen, .cursor, .name")) m.remove()')
        from matplotlib.pyplot import imread

        pixels = imread(io.BytesIO(self.driver.get_screenshot_as_png()))
        return np.rint(255 * pixels[..., :3]).astype(np.uint8)

    def text(self, selector: str) -> str:
        text: str = self.run('return document.querySelector(arguments[0]).innerText', selector)
        return text

    def messages(self) -> list[Any]:
        """What the page has written to the console."""
        messages: list[Any] = self.driver.get_log('browser')
        return messages


@pytest.fixture(scope='module')
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    pytest.importorskip('selenium')
    for program, package in (('chromium', 'chromium'), ('chromedriver', 'chromium-driver')):
        if shutil.which(program) is None:
            pytest.skip(f'needs {program}: on Debian, apt-get install {package}')
    browser = Browser(tmp_path_factory.mktemp('profile'))
    yield browser
    browser.driver.quit()


@pytest.fixture
def opened(
    browser: Browser, pages: Callable[[str], Made], request: pytest.FixtureRequest
) -> Iterator[tuple[Browser, Made]]:
    """A page in the browser; after the test, nothing is on its console."""
    made = pages(getattr(request, 'param', 'utm'))
    browser.messages()
    browser.open(made.index.as_uri())
    yield browser, made
    assert browser.messages() == []


def shown_colors(browser: Browser, made: Made, shift: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Colour on screen at a place in each patch, (rows, columns, 3)."""
    picture = browser.picture()
    places = [
        made.place(row + 0.5 + shift[0], col + 0.5 + shift[1])
        for row in range(ROWS)
        for col in range(COLS)
    ]
    points = browser.run(
        'return arguments[0].map((at) => { const p = geofm.map.latLngToContainerPoint(at);'
        'return [p.x, p.y]; })',
        places,
    )
    x, y = np.floor(points).astype(int).T
    colors: npt.NDArray[np.uint8] = picture[y, x].reshape(ROWS, COLS, 3)
    return colors


everywhere = pytest.mark.parametrize('opened', GRIDS, indirect=True)

# Near the corners of a patch: the overlay lies right to less than an eighth of a patch.
SHIFTS = ((0, 0), (-0.38, -0.38), (0.38, -0.38), (0.38, 0.38), (-0.38, 0.38))


@everywhere
def test_tiles_show_where_they_belong(opened: tuple[Browser, Made]) -> None:
    browser, made = opened
    assert browser.run(
        'return [...document.querySelectorAll("#map img.leaflet-tile")]'
        '.every((image) => image.complete && image.naturalWidth > 0)'
    )
    ground = browser.picture()
    browser.show('Below', 'Radar')
    assert (browser.picture() != ground).any(axis=-1).mean() > 0.1
    browser.opaque()
    browser.show('Features', 'Segments')
    data = read_data(made.index)
    (layer,) = [layer for layer in data['layers'] if layer['name'] == 'Segments']
    wanted = np.zeros((ROWS, COLS, 3), np.uint8)
    for value, entry in enumerate(layer['legend']['classes']):
        wanted[made.segments == value] = [*bytes.fromhex(entry['color'])]
    known = made.segments != 255
    for shift in SHIFTS:
        np.testing.assert_array_equal(shown_colors(browser, made, shift)[known], wanted[known])
    assert browser.text('#legend').split()[:5] == ['0', '1', '2', '3', '4']


def test_layers_switch(opened: tuple[Browser, Made]) -> None:
    browser, made = opened
    seen = [browser.picture()]
    for layer in read_data(made.index)['layers'][2:]:
        browser.show(layer['group'], layer['name'])
        assert layer['description'] in browser.text('#legend')
        seen.append(browser.picture())
        assert all((seen[-1] != other).any(axis=-1).mean() > 0.05 for other in seen[:-1])
    browser.show('On the map', 'None')
    assert (browser.picture()[:, 400:1100] == seen[0][:, 400:1100]).all()


@everywhere
def test_a_click_paints_similarity(opened: tuple[Browser, Made]) -> None:
    browser, made = opened
    browser.opaque()
    row, col = 4, 7
    browser.click(made.place(row + 0.4, col + 0.7))
    assert browser.run('return geofm.chosen.A') == row * COLS + col
    painted = browser.run('return [...geofm.painted().values].map((v) => isNaN(v) ? null : v)')
    similar = np.array(painted, float).reshape(ROWS, COLS)
    known = np.isfinite(made.vectors).all(axis=-1)
    np.testing.assert_array_equal(np.isfinite(similar), known)
    # In the browser, as NumPy computes it from the same int8 vectors; and of the true vectors, to
    # what int8 rounding may do.
    small = EmbeddingGrid.of(made.vectors, made.grid).vectors
    np.testing.assert_allclose(similar[known], cosines(small, row, col)[known], rtol=0, atol=1e-6)
    exact = cosines(made.vectors, row, col)
    assert (np.abs(similar - exact) <= rounding_bound(made.vectors, row, col))[known].all()

    browser.settle()
    low, high = browser.run('return geofm.painted().limits')
    share = ((similar - low) / (high - low)).clip(0, 1)
    wanted = colormaps['viridis'](share)[..., :3] * 255
    for shift in SHIFTS:
        colors = shown_colors(browser, made, shift)[known]
        # One of 256 colours more or less where a value lies between two.
        assert np.abs(colors - wanted[known]).max() < 5
    latitude, longitude = made.place(row + 0.5, col + 0.5)
    text = browser.text('#places')
    found = re.search(r'([\d.]+)° ([NS]), ([\d.]+)° ([EW])', text)
    assert found
    signs = {'N': 1, 'S': -1, 'E': 1, 'W': -1}
    shown = float(found[1]) * signs[found[2]], float(found[3]) * signs[found[4]]
    longitude = (longitude + 180) % 360 - 180
    assert shown == pytest.approx((latitude, longitude), rel=0, abs=3e-5)
    assert f'row {row}, column {col}' in text
    assert 'Cosine similarity to A' in browser.text('#legend')


def test_a_second_click_compares(opened: tuple[Browser, Made]) -> None:
    browser, made = opened
    small = EmbeddingGrid.of(made.vectors, made.grid).vectors
    first, second, third = (1, 1), (7, 10), (5, 5)
    for row, col in (first, second):
        browser.click(made.place(row + 0.5, col + 0.5))
    to_a, to_b = cosines(small, *first), cosines(small, *second)
    known = np.isfinite(to_a)

    def painted() -> Doubles:
        values = browser.run('return [...geofm.painted().values].map((v) => isNaN(v) ? null : v)')
        return np.array(values, float).reshape(ROWS, COLS)[known]

    np.testing.assert_allclose(painted(), to_b[known], atol=1e-6)
    assert f'{to_a[second]:.3f}'.replace('-', '−') in browser.text('#mutual')
    browser.show('Show', 'A')
    np.testing.assert_allclose(painted(), to_a[known], atol=1e-6)
    browser.show('Show', 'A − B')
    np.testing.assert_allclose(painted(), (to_a - to_b)[known], atol=1e-6)
    low, high = browser.run('return geofm.painted().limits')
    assert low == -high
    browser.click(made.place(third[0] + 0.5, third[1] + 0.5))
    np.testing.assert_allclose(painted(), (to_a - cosines(small, *third))[known], atol=1e-6)
    browser.run('document.querySelector("#clear").click()')
    assert browser.run('return geofm.chosen') == {'A': -1, 'B': -1}


def test_nothing_is_chosen_where_there_is_no_data(opened: tuple[Browser, Made]) -> None:
    browser, made = opened
    for row, col in (EMPTY, (-2, 4), (ROWS, COLS)):
        browser.click(made.place(row + 0.5, col + 0.5))
        assert browser.run('return geofm.chosen.A') == -1
    assert browser.text('#spoken') == 'No data here.'


@everywhere
def test_the_keyboard_is_enough(opened: tuple[Browser, Made]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser, made = opened
    browser.press(Keys.TAB)
    assert browser.run('return document.activeElement.id') == 'map'
    browser.press(Keys.ARROW_LEFT)  # shows the cursor amid the scene
    up = -1 if made.grid.transform.e < 0 else 1
    row, col = ROWS // 2, COLS // 2
    browser.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_UP)
    row, col = row + up, col + 2
    assert f'row {row}, column {col}' in browser.text('#spoken')
    browser.press(Keys.ENTER)
    assert browser.run('return geofm.chosen.A') == row * COLS + col
    browser.press(Keys.ARROW_LEFT, Keys.ARROW_DOWN, Keys.ENTER)
    assert browser.run('return geofm.chosen.B') == (row - up) * COLS + col - 1
    assert 'Similarity of A and B' in browser.text('#spoken')
    browser.press(Keys.ESCAPE)
    assert browser.run('return geofm.chosen.A') == -1

    # On to the layers: one stop for the radio buttons, within which arrows choose.
    for _ in range(12):
        if browser.run('return document.activeElement.name') == 'overlay':
            break
        browser.press(Keys.TAB)
    label = 'return document.activeElement.closest("label").textContent'
    assert browser.run(label) == 'Similarity'
    browser.press(Keys.ARROW_DOWN)
    assert browser.run(label) == 'Classes'
    browser.press(Keys.ARROW_DOWN)
    assert browser.run(label) == 'None'
    browser.press(Keys.ARROW_DOWN)
    assert browser.run(label) == 'Mean'
    assert 'attention / uniform' in browser.text('#legend')


def test_everything_has_a_name(opened: tuple[Browser, Made]) -> None:
    """What can be reached by keyboard says what it is."""
    browser, made = opened
    browser.click(made.place(1.5, 1.5))
    browser.click(made.place(6.5, 6.5))
    names = browser.run(
        'return [...document.querySelectorAll("a, button, input, [tabindex]")].map((e) =>'
        'e.getAttribute("aria-label") || e.innerText || e.closest("label")?.innerText)'
    )
    assert len(names) > 15
    assert all(names)


def test_narrow_and_wide(opened: tuple[Browser, Made]) -> None:
    browser, made = opened
    for width, height in ((360, 640), (390, 844), (1200, 800), (1920, 1080)):
        browser.open(made.index.as_uri(), width, height)
        assert browser.run('return document.documentElement.scrollWidth') == width
        box = browser.run(
            'const b = document.getElementById("panel").getBoundingClientRect();'
            'return [b.left, b.top, b.right, b.bottom]'
        )
        assert box[0] >= 0
        assert box[2] <= width
        assert box[3] <= height
        # The whole scene lies beside the panel, or above it.
        for corner in ((0, 0), (ROWS, COLS)):
            x, y = browser.point(made.place(*corner))
            assert 0 <= x <= width
            assert 0 <= y <= height
            assert x >= box[2] or y <= box[1]
        browser.click(made.place(2.5, 3.5))
        assert browser.run('return geofm.chosen.A') == 2 * COLS + 3
        browser.run('document.getElementById("fold").click()')
        assert browser.run('return document.getElementById("content").offsetHeight') == 0


# ---- Classes ----------------------------------------------------------------------------------


def nearest_means(
    small: npt.NDArray[np.int8], examples: dict[int, list[tuple[int, int]]]
) -> npt.NDArray[np.int64]:
    """Index of the class whose mean unit vector is most similar, 255 without data."""
    v = small.astype(np.float64)
    lengths = np.linalg.norm(v, axis=-1, keepdims=True)
    v = np.divide(v, lengths, out=np.zeros_like(v), where=lengths > 0)
    means = np.stack(
        [np.mean([v[place] for place in given], axis=0) for given in examples.values()]
    )
    cosine = v @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    found = np.array([*examples])[cosine.argmax(axis=-1)]
    return np.where(lengths[..., 0] > 0, found, 255)


def classes_found(browser: Browser) -> npt.NDArray[np.int64]:
    return np.array(browser.run('return [...geofm.classes.result().found]')).reshape(ROWS, COLS)


def label(browser: Browser, made: Made, examples: dict[int, list[tuple[int, int]]]) -> None:
    """Classify with clicks; digits choose the class."""
    browser.choose('A click', 'Classifies')
    for index, places in examples.items():
        browser.press(str(index + 1))
        for row, col in places:
            browser.click(made.place(row + 0.5, col + 0.5))


EXAMPLES = {0: [(1, 1), (2, 10)], 1: [(7, 2), (6, 6)]}


@everywhere
def test_a_click_classifies_the_scene(opened: tuple[Browser, Made]) -> None:
    browser, made = opened
    small = EmbeddingGrid.of(made.vectors, made.grid).vectors
    label(browser, made, EXAMPLES)
    np.testing.assert_array_equal(classes_found(browser), nearest_means(small, EXAMPLES))
    browser.run('document.getElementById("class-add").click()')
    browser.run('document.getElementById("map").focus()')
    more = {**EXAMPLES, 2: [(4, 8), (0, 5), (8, 11)]}
    label(browser, made, {2: more[2]})
    found = nearest_means(small, more)
    np.testing.assert_array_equal(classes_found(browser), found)
    # A patch has one class: the last.
    label(browser, made, {0: [(4, 8)]})
    moved = {0: [*EXAMPLES[0], (4, 8)], 1: EXAMPLES[1], 2: [(0, 5), (8, 11)]}
    found = nearest_means(small, moved)
    np.testing.assert_array_equal(classes_found(browser), found)

    browser.opaque()
    browser.settle()
    # The markers of examples would hide what is below them.
    browser.run('geofm.classes.marks.remove()')
    names = browser.run('return geofm.classes.state().classes.map((c) => c.color.slice(1))')
    palette = np.array([[*bytes.fromhex(name)] for name in names])
    known = found != 255
    for shift in SHIFTS:
        colors = shown_colors(browser, made, shift).astype(int)
        # Blended by the browser, a colour may be off by one.
        assert np.abs(colors[known] - palette[found[known]]).max() <= 2
    shares = [round(100 * float((found[known] == i).mean())) for i in range(3)]
    assert [int(n) for n in re.findall(r'(\d+) %', browser.text('#legend'))] == shares


def test_undo_delete_and_digits(opened: tuple[Browser, Made]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser, made = opened

    def control_z() -> None:
        chain = ActionChains(browser.driver)
        chain.key_down(Keys.CONTROL).send_keys('z').key_up(Keys.CONTROL).perform()

    label(browser, made, EXAMPLES)
    state = 'return JSON.stringify(geofm.classes.state())'
    full, found = browser.run(state), classes_found(browser)
    browser.press(Keys.DELETE)
    fewer = {0: EXAMPLES[0], 1: EXAMPLES[1][:1]}
    small = EmbeddingGrid.of(made.vectors, made.grid).vectors
    np.testing.assert_array_equal(classes_found(browser), nearest_means(small, fewer))
    control_z()
    assert browser.run(state) == full
    np.testing.assert_array_equal(classes_found(browser), found)
    browser.run('document.querySelector("[data-focus=remove0]").click()')
    assert browser.run('return geofm.classes.state().classes.length') == 1
    assert browser.run('return geofm.classes.result().found') is None
    browser.run('document.getElementById("class-undo").click()')
    assert browser.run(state) == full
    for _ in range(4):
        control_z()
    assert browser.run('return geofm.classes.state().examples') == []
    control_z()
    assert browser.text('#spoken') == 'Nothing to undo.'
    # Where there is no data, a click adds nothing; digits without a class choose nothing.
    browser.press('9')
    assert 'no class 9' in browser.text('#spoken')
    browser.click(made.place(EMPTY[0] + 0.5, EMPTY[1] + 0.5))
    assert browser.run('return geofm.classes.state().examples') == []
    # Keys in a name are text.
    name = browser.driver.find_element('css selector', '[data-focus=name0]')
    browser.run('arguments[0].select()', name)
    name.send_keys('1 <b>water</b>', Keys.DELETE, Keys.ENTER)
    names = 'return geofm.classes.state().classes.map((c) => c.name)'
    assert browser.run(names)[0] == '1 <b>water</b>'
    # Cursor and Enter do what a click does.
    browser.run('document.getElementById("map").focus()')
    browser.press('2', Keys.ARROW_LEFT, Keys.ENTER)
    (example,) = browser.run('return geofm.classes.state().examples')
    assert example['index'] == 1


@pytest.mark.parametrize('opened', ['utm', 'fiji'], indirect=True)
def test_labels_go_out_and_come_back(opened: tuple[Browser, Made], tmp_path: Path) -> None:
    browser, made = opened
    label(browser, made, EXAMPLES)
    browser.run(
        'const field = document.querySelector("[data-focus=name1]");'
        'field.value = "<img src=x> & Wald"; field.dispatchEvent(new Event("change"));'
    )
    browser.driver.execute_cdp_cmd(
        'Browser.setDownloadBehavior', {'behavior': 'allow', 'downloadPath': str(tmp_path)}
    )
    browser.run('document.getElementById("class-export").click()')
    file = tmp_path / 'A_place_its_patches_labels.geojson'
    deadline = time.monotonic() + 10
    while not file.exists():
        assert time.monotonic() < deadline, [*tmp_path.iterdir()]
        time.sleep(0.05)
    features = json.loads(file.read_text('utf-8'))['features']
    assert [f['properties']['class'] for f in features] == [
        'Class 1',
        'Class 1',
        '<img src=x> & Wald',
        '<img src=x> & Wald',
    ]
    for feature, (row, col) in zip(features, EXAMPLES[0] + EXAMPLES[1], strict=True):
        lon, lat = feature['geometry']['coordinates']
        latitude, longitude = made.place(row + 0.5, col + 0.5)
        longitude = (longitude + 180) % 360 - 180
        assert (lat, lon) == pytest.approx((latitude, longitude), rel=0, abs=3e-5)
    state = 'return geofm.classes.state()'
    before, found = browser.run(state), classes_found(browser)
    browser.open(made.index.as_uri())
    browser.choose('A click', 'Classifies')
    upload(browser, file)
    browser.wait('geofm.classes.state().examples.length === 4')
    assert browser.run(state) == {**before, 'chosen': 0}
    np.testing.assert_array_equal(classes_found(browser), found)
    assert browser.run('return document.querySelectorAll("#panel img").length') == 0
    assert 'Wald' in browser.text('#legend')

    for text, fault in WRONG_LABELS.items():
        wrong = tmp_path / 'wrong.geojson'
        wrong.write_text(text)
        upload(browser, wrong)
        browser.wait(f'document.getElementById("class-fault").textContent.includes({fault!r})')
        assert browser.run(state) == {**before, 'chosen': 0}
    # Points outside of the scene are left out, which is said.
    outside = {**json.loads(file.read_text('utf-8'))}
    outside['features'][0]['geometry']['coordinates'] = [0, 0]
    file.write_text(json.dumps(outside))
    upload(browser, file)
    browser.wait('geofm.classes.state().examples.length === 3')
    assert '1 points were left out' in browser.text('#class-fault')


def upload(browser: Browser, path: Path) -> None:
    browser.driver.find_element('css selector', '#class-import input').send_keys(str(path))


def _point(coordinates: str, properties: str) -> str:
    return (
        '{"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": {"type":'
        f'"Point", "coordinates": {coordinates}}}, "properties": {properties}}}]}}'
    )


WRONG_LABELS = {
    'no JSON': 'The file is not JSON',
    '[1]': 'not a GeoJSON FeatureCollection',
    'null': 'not a GeoJSON FeatureCollection',
    '{"type": "FeatureCollection", "features": [null]}': 'Feature 1 is not a point',
    '{"type": "FeatureCollection", "features": []}': 'no classes',
    _point('[500000, 4200000]', '{"class": "a"}'): 'no longitude and latitude',
    _point('["1", "2"]', '{"class": "a"}'): 'no longitude and latitude',
    _point('[1, 2]', '{}'): 'no property',
    _point('[1, 2]', '{"class": {"a": 1}}'): 'needs a name',
    _point('[1, 2]', '{"class": "a\\u0000"}'): 'control characters',
}


@pytest.mark.parametrize('size', [(390, 844), (1280, 800)])
def test_the_panel_of_classes_fits(opened: tuple[Browser, Made], size: tuple[int, int]) -> None:
    browser, made = opened
    browser.open(made.index.as_uri(), *size)
    label(browser, made, EXAMPLES)
    assert browser.run('return document.documentElement.scrollWidth') == size[0]
    assert browser.run('const c = document.getElementById("content"); return c.scrollWidth') <= (
        browser.run('return document.getElementById("content").clientWidth')
    )
    boxes = browser.run(
        'return [...document.querySelectorAll("#class-list *, .buttons *")].map((e) =>'
        '{ const b = e.getBoundingClientRect(); return [b.left, b.right]; })'
    )
    assert all(left >= 0 and right <= size[0] for left, right in boxes)


def test_from_a_static_server(browser: Browser, pages: Callable[[str], Made]) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    browser.messages()
    made = pages('utm')
    handler = functools.partial(Quiet, directory=str(made.index.parent))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.open(f'http://127.0.0.1:{server.server_port}/')
        browser.click(made.place(2.5, 3.5))
        assert browser.run('return geofm.chosen.A') == 2 * COLS + 3
        for layer in read_data(made.index)['layers'][2:]:
            browser.show(layer['group'], layer['name'])
        server.shutdown()
    assert browser.messages() == []


def test_the_base_map_is_off_at_first(browser: Browser, tmp_path: Path) -> None:
    raster = write(tmp_path / 'a.tif', np.ones((1, 64, 64), np.float32))
    layer = Layer('a', raster, Scalar(0, 2), 'Scene')
    address = 'https://tiles.example/{z}/{x}/{y}.png'
    index = write_page(tmp_path / 'page', [layer], title='Place', basemap=address)
    browser.messages()
    browser.open(index.as_uri())
    asked = 'performance.getEntriesByType("resource").some((e) => e.name.includes(".example"))'
    assert not browser.run(f'return {asked}')
    assert browser.messages() == []
    browser.choose('Below', 'Online map')
    assert 'tiles.example' in browser.text('.leaflet-control-attribution')
    browser.wait(asked)
    browser.messages()
