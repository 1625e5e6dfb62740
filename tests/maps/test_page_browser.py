"""The page in a browser without network, compared with values of NumPy at positions of pyproj."""

import functools
import http.server
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps

pytest.importorskip('rio_tiler', reason='the page needs rio-tiler, of the extra "maps"')
pytest.importorskip('xstatic.pkg.leaflet', reason='the page needs xstatic-leaflet, of "maps"')

from geofm.maps.view.page import EmbeddingGrid, Layer, write_page
from geofm.maps.view.tiles import Scalar
from tests.maps.pages import (
    COLS,
    EMPTY,
    GRIDS,
    ROWS,
    SHIFTS,
    Browser,
    Doubles,
    Made,
    cosines,
    read_data,
    rounding_bound,
    shown_colors,
)
from tests.maps.scenes import write

everywhere = pytest.mark.parametrize('opened', GRIDS, indirect=True)


@everywhere
def test_tiles_are_shown_at_their_place(opened: tuple[Browser, Made]) -> None:
    browser, made = opened
    assert browser.run(
        'return [...document.querySelectorAll("#map img.leaflet-tile")]'
        '.every((image) => image.complete && image.naturalWidth > 0)'
    )
    ground = browser.picture()
    browser.show('Background', 'Radar')
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
def test_a_click_shows_similarity(opened: tuple[Browser, Made]) -> None:
    browser, made = opened
    browser.opaque()
    row, col = 4, 7
    browser.click(made.place(row + 0.4, col + 0.7))
    assert browser.run('return geofm.chosen.A') == row * COLS + col
    painted = browser.run('return [...geofm.painted().values].map((v) => isNaN(v) ? null : v)')
    similar = np.array(painted, float).reshape(ROWS, COLS)
    known = np.isfinite(made.vectors).all(axis=-1)
    np.testing.assert_array_equal(np.isfinite(similar), known)
    # The browser's values equal NumPy's for the int8 vectors, and those of the float vectors up
    # to the error of int8 rounding.
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
        # Rounding may choose the next of 256 colours.
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


def test_patches_without_data_cannot_be_chosen(opened: tuple[Browser, Made]) -> None:
    browser, made = opened
    for row, col in (EMPTY, (-2, 4), (ROWS, COLS)):
        browser.click(made.place(row + 0.5, col + 0.5))
        assert browser.run('return geofm.chosen.A') == -1
    assert browser.text('#spoken') == 'No data here.'


@everywhere
def test_the_page_works_by_keyboard(opened: tuple[Browser, Made]) -> None:
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

    # Next are the layers: radio buttons are one tab stop, and arrow keys choose among them.
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


def test_every_control_has_a_name(opened: tuple[Browser, Made]) -> None:
    """Every element that can be focused has an accessible name."""
    browser, made = opened
    browser.click(made.place(1.5, 1.5))
    browser.click(made.place(6.5, 6.5))
    names = browser.run(
        'return [...document.querySelectorAll("a, button, input, [tabindex]")].map((e) =>'
        'e.getAttribute("aria-label") || e.innerText || e.closest("label")?.innerText)'
    )
    assert len(names) > 15
    assert all(names)


def test_narrow_and_wide_windows(opened: tuple[Browser, Made]) -> None:
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
        # The whole scene is visible beside or above the panel.
        for corner in ((0, 0), (ROWS, COLS)):
            x, y = browser.point(made.place(*corner))
            assert 0 <= x <= width
            assert 0 <= y <= height
            assert x >= box[2] or y <= box[1]
        browser.click(made.place(2.5, 3.5))
        assert browser.run('return geofm.chosen.A') == 2 * COLS + 3
        browser.run('document.getElementById("fold").click()')
        assert browser.run('return document.getElementById("content").offsetHeight') == 0


def test_touch_targets_are_large_enough(opened: tuple[Browser, Made]) -> None:
    """On a phone, touch targets are at least 40 px high and wide."""
    browser, made = opened
    browser.open(made.index.as_uri(), 390, 844)
    sizes = (
        'return [...document.querySelectorAll("button, label, .leaflet-bar a, #class-list input")]'
        '.filter((e) => e.offsetParent && e.id !== "opacity").map((e) => '
        '{ const b = e.getBoundingClientRect(); return [e.outerHTML, b.width, b.height]; })'
    )
    for mode in ('Compare', 'Classify'):
        browser.choose('Click to', mode)
        browser.click(made.place(2.5, 3.5))
        found = [entry for entry in browser.run(sizes) if 'pick' not in entry[0][:20]]
        assert len(found) > 15
        assert [entry for entry in found if min(entry[1:]) < 39.5] == []


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
    browser.choose('Background', 'Online map')
    assert 'tiles.example' in browser.text('.leaflet-control-attribution')
    browser.wait(asked)
    browser.messages()
