"""Pages of small scenes, and a browser without network to open them."""

import io
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from pyproj import Transformer
from rasterio.crs import CRS
from rasterio.transform import Affine

from geofm.commands.page import page
from geofm.grid import Grid
from geofm.sensors import SENSORS
from tests.maps.scenes import NORTH_UP, UTM, noise, write

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

# Near the corners of a patch: the overlay is accurate to less than an eighth of a patch.
SHIFTS = ((0, 0), (-0.38, -0.38), (0.38, -0.38), (0.38, 0.38), (-0.38, 0.38))


def vectors(rows: int = ROWS, cols: int = COLS, dims: int = DIMS) -> npt.NDArray[np.float32]:
    """Random vectors of different lengths that are similar for neighbouring patches."""
    random = np.random.default_rng(1)
    row, col = np.mgrid[:rows, :cols]
    smooth = np.stack([np.sin(row / 3), np.cos(col / 4), row / rows, col / cols], axis=-1)
    values = smooth @ random.standard_normal((4, dims)) + 0.5 * random.standard_normal(
        (rows, cols, dims)
    )
    return (values * random.uniform(0.1, 9, (rows, cols, 1))).astype(np.float32)


def cosines(vectors: npt.NDArray[Any], row: int, col: int) -> Doubles:
    """Cosine similarity of each patch to one patch, of shape (rows, columns)."""
    v = vectors.astype(np.float64)
    with np.errstate(invalid='ignore'):
        v /= np.linalg.norm(v, axis=-1, keepdims=True)
    similar: Doubles = v @ v[row, col]
    return similar


def rounding_bound(exact: npt.NDArray[np.float32], row: int, col: int) -> Doubles:
    """Upper bound of the change of a cosine by int8 rounding of half a step per component."""
    step = np.abs(exact).max(axis=-1) / 127
    angle = 0.5 * step * np.sqrt(exact.shape[-1]) / np.linalg.norm(exact, axis=-1)
    # An error e of a unit vector changes it by at most e, and its normalisation by at most e again.
    bound: Doubles = 2 * (angle + angle[row, col])
    return bound


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
        # The map continues beyond 180 degrees.
        return latitude, longitude + 360 if longitude < -170 else longitude


def make(folder: Path, crs: CRS, transform: Affine) -> Made:
    """Write a scene, products like those of a model, and the page."""
    patches = Grid(crs, transform, ROWS * PATCH, COLS * PATCH).coarsen(PATCH)
    s1 = write(
        folder / 's1.tif', noise('s1', ROWS * PATCH, COLS * PATCH), crs, transform, ['VV', 'VH']
    )
    s2 = folder / 'place.tif'
    pixels = noise('s2', ROWS * PATCH, COLS * PATCH).clip(1).astype(np.uint16)
    write(s2, pixels, crs, transform, [band.name for band in SENSORS['s2'].bands])
    exact = vectors()
    exact[EMPTY] = np.nan
    on_patches = {'crs': crs, 'transform': patches.transform}
    write(folder / 'place_embedding.tif', exact.transpose(2, 0, 1), **on_patches, nodata=np.nan)
    with rasterio.open(folder / 'place_embedding.tif', 'r+') as dst:
        dst.update_tags(weights_sha256=64 * 'a', model='vit')
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


def read_data(index: Path) -> dict[str, Any]:
    script = (index.parent / 'data.js').read_text('utf-8')
    data: dict[str, Any] = json.loads(script.removeprefix('window.geofm = ').rstrip(';\n'))
    return data


class Browser:
    """Chromium without network, which is started again if it stops responding."""

    def __init__(self, profile: Path) -> None:
        """Start it; *profile* is the folder that it stores data in."""
        self.profile = profile
        self.start()

    def start(self) -> None:
        """Start it with what it has stored."""
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
            f'--user-data-dir={self.profile}',
        ):
            options.add_argument(argument)
        options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
        self.driver = webdriver.Chrome(options, Service(shutil.which('chromedriver')))
        self.driver.set_page_load_timeout(60)

    def open(self, url: str, width: int = 1200, height: int = 800, keep: bool = False) -> None:
        """Open a page, with empty storage unless *keep* is true."""
        from selenium.common.exceptions import TimeoutException

        try:
            # Seen beside other tests: for minutes, Chromium loads nothing, not even local files.
            self.driver.set_page_load_timeout(8)
            self._load(url, width, height, keep)
        except TimeoutException:
            self.driver.quit()
            self.start()
            self._load(url, width, height, keep)
        self.wait('document.querySelectorAll("#map img.leaflet-tile").length > 0')
        self.settle()

    def _load(self, url: str, width: int, height: int, keep: bool) -> None:
        self.driver.get('about:blank')
        if not keep:
            self.driver.execute_cdp_cmd(
                'Storage.clearDataForOrigin', {'origin': 'file://', 'storageTypes': 'local_storage'}
            )
        self.driver.execute_cdp_cmd(
            'Emulation.setDeviceMetricsOverride',
            {'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': False},
        )
        self.driver.get(url)

    def run(self, script: str, *args: object) -> Any:
        return self.driver.execute_script(script, *args)

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + 60
        while not self.run(f'return {condition}'):
            assert time.monotonic() < deadline, f'{condition} did not come true'
            time.sleep(0.02)

    def settle(self) -> None:
        """Wait until all tiles are loaded and the map does not move."""
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
        self.mouse(*self.point(latlng))

    def mouse(self, x: float, y: float) -> None:
        """Press and release the button of the mouse at a pixel of the window."""
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
        """Choose a layer, and wait until it is shown."""
        self.choose(group, name)
        self.settle()

    def opaque(self) -> None:
        """Set the opacity to 100 %."""
        self.run(
            'const slider = document.querySelector("#opacity input"); slider.value = 100;'
            'slider.dispatchEvent(new Event("input"));'
        )

    def picture(self) -> npt.NDArray[np.uint8]:
        """Screenshot without marks and coordinates of the pointer, (H, W, 3)."""
        self.run(
            'for (const m of document.querySelectorAll(".chosen, .cursor, .name")) m.remove();'
            'document.getElementById("pointer").textContent = "";'
        )
        from matplotlib.pyplot import imread

        pixels = imread(io.BytesIO(self.driver.get_screenshot_as_png()))
        return np.rint(255 * pixels[..., :3]).astype(np.uint8)

    def text(self, selector: str) -> str:
        text: str = self.run('return document.querySelector(arguments[0]).innerText', selector)
        return text

    def messages(self) -> list[Any]:
        """Messages of the page on the console."""
        messages: list[Any] = self.driver.get_log('browser')
        return messages


def shown_colors(browser: Browser, made: Made, shift: tuple[float, float]) -> npt.NDArray[np.uint8]:
    """Colours on the screen at a place in each patch, (rows, columns, 3)."""
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
