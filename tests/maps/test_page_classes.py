"""Classes of the page from clicked examples, compared with scikit-learn."""

import base64
import json
import re
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import rasterio
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import normalize

pytest.importorskip('rio_tiler', reason='the page needs rio-tiler, of the extra "maps"')
pytest.importorskip('xstatic.pkg.leaflet', reason='the page needs xstatic-leaflet, of "maps"')

from geofm.cli import main
from geofm.legend import NO_CLASS, Legend
from geofm.maps.view.page import EmbeddingGrid
from tests.maps.pages import COLS, EMPTY, GRIDS, ROWS, SHIFTS, Browser, Made, shown_colors

everywhere = pytest.mark.parametrize('opened', GRIDS, indirect=True)


def nearest_means(
    small: npt.NDArray[np.int8], examples: dict[int, list[tuple[int, int]]]
) -> npt.NDArray[np.int64]:
    """Class with the most similar mean unit vector, by scikit-learn; 255 without data."""
    unit = normalize(small.reshape(-1, small.shape[-1]).astype(np.float64))
    given = [(row * small.shape[1] + col, k) for k, all_ in examples.items() for row, col in all_]
    rows, classes = np.array(given).T
    # NearestCentroid predicts by Euclidean distance.
    means = NearestCentroid().fit(unit[rows], classes).centroids_
    nearest = KNeighborsClassifier(1, metric='cosine').fit(means, [*examples])
    found = nearest.predict(unit)
    return np.where(unit.any(axis=1), found, 255).reshape(small.shape[:2])


def classes_found(browser: Browser) -> npt.NDArray[np.int64]:
    return np.array(browser.run('return [...geofm.classes.result().found]')).reshape(ROWS, COLS)


def label(browser: Browser, made: Made, examples: dict[int, list[tuple[int, int]]]) -> None:
    """Classify with clicks; digits choose the class."""
    browser.choose('Click to', 'Classify')
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
    # A patch has the class of its last example.
    label(browser, made, {0: [(4, 8)]})
    assert browser.text('#pointer').endswith('Class 1')
    moved = {0: [*EXAMPLES[0], (4, 8)], 1: EXAMPLES[1], 2: [(0, 5), (8, 11)]}
    found = nearest_means(small, moved)
    np.testing.assert_array_equal(classes_found(browser), found)

    browser.opaque()
    browser.settle()
    # The markers of examples would hide the patches below them.
    browser.run('geofm.classes.marks.remove()')
    names = browser.run('return geofm.classes.state().classes.map((c) => c.color.slice(1))')
    palette = np.array([[*bytes.fromhex(name)] for name in names])
    known = found != 255
    for shift in SHIFTS:
        colors = shown_colors(browser, made, shift).astype(int)
        # Blending in the browser may change a colour by one.
        assert np.abs(colors[known] - palette[found[known]]).max() <= 2
    shares = [round(100 * float((found[known] == i).mean())) for i in range(3)]
    assert [int(n) for n in re.findall(r'(\d+) %', browser.text('#class-list'))] == shares
    browser.choose('Click to', 'Compare')
    browser.choose('On the map', 'Classes')
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
    # A click without data adds no example, and a digit without a class has no effect.
    browser.press('9')
    assert 'no class 9' in browser.text('#spoken')
    browser.click(made.place(EMPTY[0] + 0.5, EMPTY[1] + 0.5))
    assert browser.run('return geofm.classes.state().examples') == []
    # Keys in a text field are text.
    name = browser.driver.find_element('css selector', '[data-focus=name0]')
    browser.run('arguments[0].select()', name)
    name.send_keys('1 <b>water</b>', Keys.DELETE, Keys.ENTER)
    names = 'return geofm.classes.state().classes.map((c) => c.name)'
    assert browser.run(names)[0] == '1 <b>water</b>'
    # A click on another row commits the name, and still has its effect.
    name.click()
    name.send_keys('!')
    browser.driver.find_element('css selector', '#class-list li:nth-child(2) .pick').click()
    assert '!' in browser.run(names)[0]
    assert browser.run('return geofm.classes.state().chosen') == 1
    browser.press('1')
    # Cursor and Enter act like a click.
    browser.run('document.getElementById("map").focus()')
    browser.press('2', Keys.ARROW_LEFT, Keys.ENTER)
    (example,) = browser.run('return geofm.classes.state().examples')
    assert example['index'] == 1
    browser.press('1', Keys.ARROW_LEFT, Keys.ENTER, Keys.ARROW_LEFT)
    found = classes_found(browser).ravel()[example['patch'] - 2]
    assert browser.text('#spoken').endswith(f', {browser.run(names)[found]}')


@pytest.mark.parametrize('size', [(390, 844), (1200, 800)])
def test_a_click_that_ends_the_editing_of_a_name_selects(
    opened: tuple[Browser, Made], size: tuple[int, int]
) -> None:
    """The message about the name must not move the list between press and release."""
    browser, made = opened
    browser.open(made.index.as_uri(), *size)
    browser.choose('Click to', 'Classify')
    chosen = 'return geofm.classes.state().chosen'
    names = 'return geofm.classes.state().classes.map((c) => c.name)'
    message = 'return document.getElementById("class-message").textContent'

    def edit(index: int, name: str) -> None:
        field = browser.driver.find_element('css selector', f'[data-focus=name{index}]')
        field.click()
        browser.run('arguments[0].select()', field)
        field.send_keys(name)

    def click_number(index: int) -> None:
        x, y = browser.run(
            'const b = document.querySelector(`#class-list li:nth-child(${arguments[0]}) .pick`)'
            '.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2];',
            index + 1,
        )
        browser.mouse(x, y)

    # A message appears, as the name is taken.
    edit(0, 'Class 2')
    click_number(1)
    assert browser.run(chosen) == 1
    browser.wait('document.getElementById("class-message").textContent.includes("Not renamed")')
    assert browser.run(names) == ['Class 1', 'Class 2']
    # It disappears, as the next name is free.
    edit(1, 'Wald')
    assert 'Not renamed' in browser.run(message)
    click_number(0)
    assert browser.run(chosen) == 0
    browser.wait('document.getElementById("class-message").hidden')
    assert browser.run(names) == ['Class 1', 'Wald']


@pytest.mark.parametrize('opened', ['utm', 'fiji'], indirect=True)
def test_labels_are_exported_and_imported(opened: tuple[Browser, Made], tmp_path: Path) -> None:
    browser, made = opened
    label(browser, made, EXAMPLES)
    browser.run(
        'const field = document.querySelector("[data-focus=name1]");'
        'field.value = "<img src=x> & Wald"; field.dispatchEvent(new Event("change"));'
    )
    file = export(browser, tmp_path)
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
    browser.choose('Click to', 'Classify')
    upload(browser, file)
    browser.wait('geofm.classes.state().examples.length === 4')
    assert browser.run(state) == {**before, 'chosen': 0}
    np.testing.assert_array_equal(classes_found(browser), found)
    assert browser.run('return document.querySelectorAll("#panel img").length') == 0
    assert browser.run('return document.querySelector("[data-focus=name1]").value').endswith('Wald')

    for text, fault in WRONG_LABELS.items():
        wrong = tmp_path / 'wrong.geojson'
        wrong.write_text(text)
        upload(browser, wrong)
        browser.wait(f'document.getElementById("class-message").textContent.includes({fault!r})')
        assert browser.run(state) == {**before, 'chosen': 0}
    # Points outside the scene are left out, with a message.
    outside = {**json.loads(file.read_text('utf-8'))}
    outside['features'][0]['geometry']['coordinates'] = [0, 0]
    file.write_text(json.dumps(outside))
    upload(browser, file)
    browser.wait('geofm.classes.state().examples.length === 3')
    assert 'Left out: 1 point where this scene has no data' in browser.text('#class-message')
    # Of two points in one patch, the later one is used.
    both = {**outside, 'features': outside['features'][1:] + outside['features'][2:3]}
    file.write_text(json.dumps(both))
    upload(browser, file)
    browser.wait('document.getElementById("class-message").textContent.includes("share a patch")')
    assert browser.run(f'{state}.examples.length') == 3


def export(browser: Browser, folder: Path) -> Path:
    """Export the labels in the browser and return the file."""
    browser.driver.execute_cdp_cmd(
        'Browser.setDownloadBehavior', {'behavior': 'allow', 'downloadPath': str(folder)}
    )
    browser.run('document.getElementById("class-export").click()')
    file = folder / 'A_place_its_patches_labels.geojson'
    deadline = time.monotonic() + 10
    while not file.exists():
        assert time.monotonic() < deadline, [*folder.iterdir()]
        time.sleep(0.05)
    return file


@pytest.mark.parametrize('opened', ['degrees', 'fiji'], indirect=True)
def test_geofm_classify_reads_the_exported_labels(
    opened: tuple[Browser, Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From clicks to a map, in which the clicked patches have their class."""
    browser, made = opened
    label(browser, made, EXAMPLES)
    file = export(browser, tmp_path)
    labels = json.loads(file.read_text('utf-8'))
    far = json.loads(json.dumps(labels['features'][0]))
    far['geometry']['coordinates'] = [10, 10]
    file.write_text(json.dumps({**labels, 'features': [*labels['features'], far]}))
    embedding = made.index.parents[1] / 'place_embedding.tif'
    main(['classify', str(embedding), '--labels', str(file), '--output', str(tmp_path / 'maps')])
    printed = ' '.join(capsys.readouterr().out.split())
    assert 'samples: Class 1 2, Class 2 2' in printed
    assert '1 of 5 points lie on no patch with data' in printed
    with rasterio.open(tmp_path / 'maps' / 'place_classes.tif') as src:
        classes, legend = src.read(1), Legend.from_tags(src.tags())
    assert legend is not None
    for index, places in EXAMPLES.items():
        for place in places:
            assert legend.name(int(classes[place])) == f'Class {index + 1}'
    assert classes[EMPTY] == NO_CLASS


def upload(browser: Browser, path: Path) -> None:
    browser.run('document.getElementById("class-message").textContent = ""')
    browser.driver.find_element('css selector', '#class-import input').send_keys(str(path))


def _point(coordinates: str, properties: str) -> str:
    return (
        '{"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": {"type":'
        f'"Point", "coordinates": {coordinates}}}, "properties": {properties}}}]}}'
    )


WRONG_LABELS = {
    'no JSON': 'The file is not JSON',
    _point('[1, 2]', '{"class": "a"}')[:-20]: 'or is damaged',
    '[1]': 'not a GeoJSON FeatureCollection',
    'null': 'not a GeoJSON FeatureCollection',
    '{"type": "FeatureCollection", "features": [null]}': 'Feature 1 is not a point',
    '{"type": "FeatureCollection", "features": []}': 'no classes',
    _point('[[1, 2]]', '{"class": "a"}').replace('Point', 'Polygon'): 'Give points only',
    _point('[500000, 4200000]', '{"class": "a"}'): 'Write the file in EPSG:4326',
    _point('["1", "2"]', '{"class": "a"}'): 'no longitude and latitude',
    _point('[1, 2]', '{}'): 'no property',
    _point('[1, 2]', '{"id": 7, "kind": "a"}'): 'but id, kind',
    _point('[1, 2]', '{"class": {"a": 1}}'): 'needs a name',
    _point('[1, 2]', '{"class": "a\\u0000"}'): 'control characters',
    _point('[1, 2]', f'{{"class": "{81 * "a"}"}}'): 'longer than 80',
    _point('[1, 2]', '{"class": "a", "color": ["#000000"]}'): 'None of 1 point',
}


def test_labels_are_restored_on_the_next_visit(opened: tuple[Browser, Made]) -> None:
    """Labels are restored; without storage, the page warns before it is closed."""
    browser, made = opened
    state = 'return geofm.classes.state()'
    label(browser, made, EXAMPLES)
    before, found = browser.run(state), classes_found(browser)
    browser.open(made.index.as_uri(), keep=True)
    assert browser.run(state) == {**before, 'chosen': 0}
    np.testing.assert_array_equal(classes_found(browser), found)
    assert 'Restored from your last visit: 4 examples.' in browser.text('#class-message')
    # Undone changes are stored, too.
    browser.run('document.getElementById("class-clear").click()')
    browser.wait('!JSON.parse(localStorage["geofm labels " + location.pathname]).features.length')
    browser.run('document.getElementById("class-undo").click()')
    browser.open(made.index.as_uri(), keep=True)
    assert len(browser.run(state)['examples']) == 4
    browser.run('document.getElementById("class-clear").click()')
    browser.open(made.index.as_uri(), keep=True)
    assert browser.run(state)['examples'] == []
    assert browser.run('return document.getElementById("classes").hidden')

    warned = (
        'const event = new Event("beforeunload", { cancelable: true }); dispatchEvent(event);'
        'return event.defaultPrevented;'
    )
    label(browser, made, EXAMPLES)
    assert not browser.run(warned)
    browser.run('Storage.prototype.setItem = () => { throw new Error("full"); };')
    label(browser, made, {0: [(8, 8)]})
    browser.run('dispatchEvent(new Event("pagehide"))')
    assert browser.run(warned)
    browser.run(
        'document.getElementById("class-clear").click(); dispatchEvent(new Event("pagehide"))'
    )
    assert not browser.run(warned)


def test_products_in_webassembly_and_without(opened: tuple[Browser, Made]) -> None:
    """Dot products equal NumPy's, exactly for integers, with and without SIMD."""
    browser, _ = opened
    script = (
        'const [text, dims, weights, without] = arguments; const saved = WebAssembly.Module;'
        'try { if (without) WebAssembly.Module = null; const v = new Vectors(text, 23, dims);'
        'return [!!compiled(1), [...v.products(weights)], [...v.products(v.row(4))],'
        'v.product(22, 3)]; } finally { WebAssembly.Module = saved; }'
    )
    for dims in (1, 7, 8, 19):
        random = np.random.default_rng(dims)
        rows = random.integers(-127, 128, (23, dims)).astype(np.int8)
        weights = random.standard_normal(dims)
        text = base64.b64encode(rows).decode()
        for without in (False, True):
            simd, real, whole, one = browser.run(script, text, dims, weights.tolist(), without)
            assert simd != without
            np.testing.assert_allclose(real, rows @ weights, rtol=0, atol=1e-12)
            np.testing.assert_array_equal(whole, rows.astype(int) @ rows[4])
            assert one == rows[22].astype(int) @ rows[3]


@pytest.mark.filterwarnings('ignore:The number of unique classes', 'ignore:invalid value')
@pytest.mark.parametrize('size', [(390, 844), (1280, 800)])
def test_the_panel_of_classes_fits(
    opened: tuple[Browser, Made], size: tuple[int, int], tmp_path: Path
) -> None:
    """Thirty classes with long names, which are not interpreted as HTML."""
    browser, made = opened
    browser.open(made.index.as_uri(), *size)
    browser.choose('Click to', 'Classify')
    names = ['<script>document.title = "x"</script>', 80 * 'W', *(f'{i} & "b"' for i in range(28))]
    features = []
    for k, name in enumerate(names):
        latitude, longitude = made.place(k // COLS + 0.5, k % COLS + 0.5)
        geometry = {'type': 'Point', 'coordinates': [longitude, latitude]}
        features.append({'type': 'Feature', 'geometry': geometry, 'properties': {'class': name}})
    path = tmp_path / 'many.geojson'
    path.write_text(json.dumps({'type': 'FeatureCollection', 'features': features}))
    upload(browser, path)
    browser.wait('geofm.classes.state().examples.length === 30')
    small = EmbeddingGrid.of(made.vectors, made.grid).vectors
    examples = {k: [(k // COLS, k % COLS)] for k in range(30)}
    np.testing.assert_array_equal(classes_found(browser), nearest_means(small, examples))
    shown = 'return [...document.querySelectorAll("#class-list [type=text]")].map((e) => e.value)'
    assert browser.run(shown) == names
    assert browser.run('return document.title') == 'A <place> & its "patches"'
    browser.choose('Click to', 'Compare')
    browser.choose('On the map', 'Classes')
    assert names[0] in browser.text('#legend')
    browser.choose('Click to', 'Classify')
    assert browser.run('return document.documentElement.scrollWidth') == size[0]
    assert browser.run('const c = document.getElementById("content"); return c.scrollWidth') <= (
        browser.run('return document.getElementById("content").clientWidth')
    )
    boxes = browser.run(
        'return [...document.querySelectorAll("#class-list *, .buttons *")].map((e) =>'
        '{ const b = e.getBoundingClientRect(); return [b.left, b.right]; })'
    )
    assert all(left >= 0 and right <= size[0] for left, right in boxes)
