"""Draw the pictures of the map page in docs/maps.md.

The page of a scene is opened in headless Chromium, and real mouse clicks choose places. The scene
is Spain_7370579 of Sen1Floods11, in its folder ``sample``.

    ln -s Spain_7370579_S1Hand.tif s1.tif
    ln -s Spain_7370579_S2Hand.tif s2.tif
    geofm map eurosat-rgb-nano --s2 s2.tif --output explore --stride 4 \
        --products '[attention,rollout,pca,segments,embedding]'
    geofm page explore --s1 s1.tif --s2 s2.tif --title 'Segura plain, September 2019'
    python experiments/page_pictures.py explore/s2_page/index.html
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

from benchmarks.page_click import start_browser
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

#: Window in CSS pixels, and pixels of the picture per CSS pixel.
SIZE, SCALE = (980, 720), 1.5

#: Latitude and longitude of examples, by class.
PLACES = {
    'flooded': ((38.1157, -0.7474), (38.1189, -0.7500), (38.1207, -0.7401)),
    'town': ((38.1135, -0.7606), (38.0860, -0.7469), (38.1046, -0.7378)),
    'fields': ((38.1004, -0.7743), (38.0944, -0.7446), (38.1070, -0.7773)),
}


def open_page(driver: webdriver.Chrome, index: Path) -> None:
    """Open the page without labels of an earlier visit."""
    width, height = SIZE
    driver.execute_cdp_cmd(
        'Emulation.setDeviceMetricsOverride',
        {'width': width, 'height': height, 'deviceScaleFactor': SCALE, 'mobile': False},
    )
    driver.get('about:blank')
    storage = {'origin': 'file://', 'storageTypes': 'local_storage'}
    driver.execute_cdp_cmd('Storage.clearDataForOrigin', storage)
    driver.get(index.resolve().as_uri())


def choose(driver: webdriver.Chrome, group: str, name: str) -> None:
    """Select a choice of the panel by its label."""
    driver.execute_script(
        'const set = [...document.querySelectorAll("fieldset")]'
        '.find((f) => f.querySelector("legend").textContent === arguments[0]);'
        '[...set.querySelectorAll("label")]'
        '.find((l) => l.textContent === arguments[1]).querySelector("input").click();',
        group,
        name,
    )


def click(driver: webdriver.Chrome, place: tuple[float, float]) -> None:
    """Click a place on the map."""
    x, y = driver.execute_script(
        'const p = geofm.map.latLngToContainerPoint(arguments[0]); return [p.x, p.y];', place
    )
    for kind in ('mouseMoved', 'mousePressed', 'mouseReleased'):
        driver.execute_cdp_cmd(
            'Input.dispatchMouseEvent',
            {'type': kind, 'x': x, 'y': y, 'button': 'left', 'clickCount': 1},
        )


def classify(driver: webdriver.Chrome) -> None:
    """Name the classes and click their examples."""
    choose(driver, 'Click to', 'Classify')
    rows = '#class-list li'
    while len(driver.find_elements(By.CSS_SELECTOR, rows)) < len(PLACES):
        driver.find_element(By.ID, 'class-add').click()
    for number, (name, places) in enumerate(PLACES.items(), 1):
        field = driver.find_element(By.CSS_SELECTOR, f'{rows}:nth-child({number}) [type=text]')
        field.send_keys(Keys.CONTROL, 'a')
        field.send_keys(name, Keys.ENTER)
        driver.find_element(By.CSS_SELECTOR, f'{rows}:nth-child({number}) .pick').click()
        for place in places:
            click(driver, place)


def save(driver: webdriver.Chrome, path: Path) -> None:
    """Write a screenshot once all tiles are shown."""
    time.sleep(3)
    Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert('RGB').save(path, quality=85)
    print(path)


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('page', type=Path, help='index.html of the page')
    parser.add_argument('--output', type=Path, default=Path('docs/images'))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as profile:
        driver = start_browser(Path(profile))
        try:
            open_page(driver, args.page)
            click(driver, PLACES['flooded'][0])
            save(driver, args.output / 'page-similarity.jpg')
            click(driver, PLACES['town'][0])
            choose(driver, 'Show', 'A \N{MINUS SIGN} B')
            save(driver, args.output / 'page-compare.jpg')
            classify(driver)
            save(driver, args.output / 'page-classes.jpg')
            open_page(driver, args.page)
            attention = '[...document.querySelectorAll("legend")].map((l) => l.textContent)'
            groups = driver.execute_script(f'return {attention}')
            choose(driver, next(name for name in groups if name.startswith('Attention:')), 'Mean')
            save(driver, args.output / 'page-attention.jpg')
        finally:
            driver.quit()


if __name__ == '__main__':
    main()
