"""Measure how soon the map page shows the classes of a scene after a click.

A page of 100,000 patches is opened from disk in headless Chromium, and real mouse clicks give
examples of three classes. The time is measured from the click event to the painted canvases, and to
the first task after the frame that shows them; frames come every 16.7 ms. Other work on the
machine increases both times, but not the CPU time of the main thread of the page. All clicks count
from the first one with two classes, including those before the compiler has warmed up. The last
classification is compared with NumPy's result for the same vectors.

    python experiments/benchmarks/page_click.py --output experiments/results/page_click.md
"""

import argparse
import os
import platform
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.crs import CRS
from rasterio.transform import Affine
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains

from geofm.grid import Grid
from geofm.maps.view.page import EmbeddingGrid, write_page
from geofm.maps.view.page.embedding import MOST_BYTES

ROWS, COLS, CLASSES, CLICKS = 250, 400, 3, 20
#: Width of ViT-S and ViT-B. A page holds as many dimensions as fit into MOST_BYTES.
WIDTHS = (384, 768)
#: Size of the window, and whether the browser has WebAssembly.
CASES = {
    'desktop, 1440 x 900': ((1440, 900), True),
    'phone, 390 x 844': ((390, 844), True),
    'desktop, without WebAssembly': ((1440, 900), False),
}

# Listeners of the window run before (capturing) and after those of the page.
_WATCH = """
window.times = [];
addEventListener('click', () => { window.start = performance.now(); }, true);
addEventListener('click', () => {
  const { start } = window;
  const painted = performance.now() - start;
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = () => window.times.push([painted, performance.now() - start]);
  requestAnimationFrame(() => port2.postMessage(null));
});
"""


def generate(folder: Path, width: int) -> tuple[Path, EmbeddingGrid]:
    """Write the page of random embeddings.

    Args:
        folder: Where to write.
        width: Width of the model.

    Returns:
        The page, and the embedding that it holds.
    """
    dims = min(width, MOST_BYTES // (ROWS * COLS))
    grid = Grid(CRS.from_epsg(32630), Affine(160, 0, 500_000, 0, -160, 4_200_000), ROWS, COLS)
    generator = np.random.default_rng(0)
    truth = (np.arange(ROWS)[:, None] // 10 + np.arange(COLS) // 10) % CLASSES
    centres = generator.standard_normal((CLASSES, dims), np.float32)
    vectors = centres[truth] + generator.standard_normal((ROWS, COLS, dims), np.float32)
    embedding = EmbeddingGrid.of(vectors, grid)
    return write_page(folder, [], embedding, title='Scene'), embedding


def start_browser(profile: Path) -> webdriver.Chrome:
    """Start headless Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which('chromium') or ''
    for argument in ('--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={profile}'):
        options.add_argument(argument)
    return webdriver.Chrome(options, Service(shutil.which('chromedriver')))


def cpu_time(driver: webdriver.Chrome) -> float:
    """Return the CPU time of the main thread of the page in milliseconds."""
    metrics = driver.execute_cdp_cmd('Performance.getMetrics', {})['metrics']
    return 1000 * float(next(m['value'] for m in metrics if m['name'] == 'TaskDuration'))


def measure(
    driver: webdriver.Chrome, index: Path, window: tuple[int, int], webassembly: bool
) -> list[tuple[float, float, float]]:
    """Click examples.

    Args:
        driver: The browser.
        index: The page.
        window: Width and height in pixels.
        webassembly: Whether the page may use it.

    Returns:
        Milliseconds to the painted canvases and to the frame, and of CPU time, of each click.
    """
    width, height = window
    driver.execute_cdp_cmd(
        'Emulation.setDeviceMetricsOverride',
        {'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': False},
    )
    # Labels of the last run would be there again.
    driver.get('about:blank')
    storage = {'origin': 'file://', 'storageTypes': 'local_storage'}
    driver.execute_cdp_cmd('Storage.clearDataForOrigin', storage)
    taken = driver.execute_cdp_cmd(
        'Page.addScriptToEvaluateOnNewDocument',
        {'source': '' if webassembly else 'WebAssembly.Module = null;'},
    )
    driver.get(index.as_uri())
    driver.execute_cdp_cmd('Page.removeScriptToEvaluateOnNewDocument', taken)
    driver.execute_cdp_cmd('Performance.enable', {'timeDomain': 'threadTicks'})
    driver.execute_script(
        'document.querySelectorAll("#modes input")[1].click();'
        'document.getElementById("class-add").click(); document.getElementById("map").focus();'
    )
    driver.execute_script(_WATCH)
    generator = np.random.default_rng(1)
    used = []
    for click in range(CLICKS + 1):
        ActionChains(driver).send_keys(str(click % CLASSES + 1)).perform()
        row, col = generator.integers((ROWS, COLS)).tolist()
        x, y = driver.execute_script(
            'const { map, patches } = geofm;'
            'const { x, y } = map.latLngToContainerPoint(L.CRS.EPSG3857.pointToLatLng('
            'L.point(patches.centre(arguments[0])).multiplyBy(256), 0)); return [x, y];',
            row * COLS + col,
        )
        before = cpu_time(driver)
        for kind in ('mousePressed', 'mouseReleased'):
            driver.execute_cdp_cmd(
                'Input.dispatchMouseEvent',
                {'type': kind, 'x': x, 'y': y, 'button': 'left', 'clickCount': 1},
            )
        driver.execute_async_script(
            'const [clicks, done] = arguments;'
            'const wait = () => (times.length > clicks ? done() : setTimeout(wait, 5)); wait();',
            click,
        )
        used.append(cpu_time(driver) - before)
    times: list[tuple[float, float]] = driver.execute_script('return times')
    return [(*two, one) for two, one in zip(times, used, strict=True)][1:]


def check(driver: webdriver.Chrome, embedding: EmbeddingGrid) -> None:
    """Compare the classes on the page with those of NumPy.

    Args:
        driver: The browser, after the clicks.
        embedding: Vectors of the page.

    Raises:
        RuntimeError: If a patch has another class, or a click gave no example.
    """
    examples = driver.execute_script(
        'return geofm.classes.state().examples.map((e) => [e.patch, e.index])'
    )
    if len(examples) != CLICKS + 1:
        raise RuntimeError(f'{len(examples)} examples after {CLICKS + 1} clicks')
    vectors = embedding.vectors.reshape(ROWS * COLS, -1).astype(np.float32)
    patches, classes = np.array(examples).T
    given = vectors[patches].astype(np.float64)
    given /= np.linalg.norm(given, axis=1, keepdims=True)
    means = np.stack([given[classes == k].mean(axis=0) for k in range(CLASSES)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    wanted = np.argmax([vectors.astype(np.float64) @ mean for mean in means], axis=0)
    found = np.array(driver.execute_script('return [...geofm.classes.result().found]'))
    if wrong := int((found != wanted).sum()):
        raise RuntimeError(f'{wrong} patches have another class than by NumPy')


def processor() -> str:
    """Return the name of the processor."""
    path = Path('/proc/cpuinfo')
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--output', type=Path, default=None)
    parser.add_argument('--note', default='', help='further information about the machine')
    args = parser.parse_args()
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        driver = start_browser(folder / 'profile')
        about: dict[str, Any] = driver.capabilities
        try:
            for width in WIDTHS:
                index, embedding = generate(folder / f'page_{width}', width)
                for name, (window, webassembly) in CASES.items():
                    times = zip(*measure(driver, index, window, webassembly), strict=True)
                    check(driver, embedding)
                    cells = [f'{statistics.median(t):.0f} ms | {max(t):.0f} ms' for t in times]
                    dims = embedding.vectors.shape[2]
                    rows.append(f'| {width} | {dims} | {name} | {" | ".join(cells)} |')
        finally:
            driver.quit()
    load = os.getloadavg()[0]
    lines = [
        '# The map page: time of a click',
        '',
        f'{ROWS * COLS:,} patches, {CLICKS} clicks on examples of {CLASSES} classes, after each of '
        'which the whole scene is classified and painted. A page holds at most '
        f'{MOST_BYTES // 2**20} MiB of vectors; wider embeddings are projected. The time runs from '
        'the click event to the painted canvases, and to the first task after the frame that '
        'shows them. CPU time is that of the main thread. The classes equal those of NumPy.',
        '',
        f'Chromium {about["browserVersion"]} without GPU, {processor()}, '
        f'{os.cpu_count()} cores, load average {load:.1f} at the end. {args.note}'.rstrip(),
        '',
        'Made by `experiments/benchmarks/page_click.py`.',
        '',
        '| Width of the model | Dimensions | Window | Painted, median | Painted, worst '
        '| Frame, median | Frame, worst | CPU time, median | CPU time, worst |',
        '|---:|---:|---|---:|---:|---:|---:|---:|---:|',
        *rows,
    ]
    text = '\n'.join([*lines, ''])
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == '__main__':
    main()
