"""Commands of docs/archives.md, run on small data and with few steps."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml
from PIL import Image

from geofm.datasets import RasterArchive
from geofm.datasets.table import RasterTable
from geofm.models import load_backbone
from tests.docs_commands import ROOT, run, sections
from tests.registry import kept_registry

PAGE = (ROOT / 'docs' / 'archives.md').read_text()


@pytest.fixture(scope='module')
def place(module_path: Path) -> Path:
    """A folder with the configurations, and the definitions that the page shows."""
    shutil.copytree(ROOT / 'configs', module_path / 'configs')
    blocks = [
        block for block in re.findall(r'```yaml\n(.*?)```', PAGE, re.DOTALL) if 'canopy' in block
    ]
    sensors, layout = blocks
    (module_path / 'canopy.yaml').write_text(sensors)
    (module_path / 'canopy_layout.yaml').write_text(layout)
    rng = np.random.default_rng(0)
    for i in range(6):
        file = module_path / 'pictures' / f'class_{i % 2}' / f'{i}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (64, 80, 3), np.uint8)).save(file)
    return module_path


# A single test, since later sections use the results of earlier ones, and xdist may split a file.
def test_the_commands_of_the_page_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for title, lines in sections(PAGE).items():
        assert lines, title
        with kept_registry():
            for line in lines:
                run(line)
            _check_section(title, place)


def _check_section(title: str, place: Path) -> None:
    if title == 'Your own Sentinel-1/2 folder':
        assert list(place.glob('maps/*.tif'))
        _check_pixels(place)
    if title == 'Three sensors in one transformer':
        backbone = load_backbone('joint.ckpt')
        assert backbone.sensors == ('s1', 's2', 'dem')
        assert list(place.glob('maps/joint/**/*.html'))
        assert list(place.glob('output/benchmark/archive/**/*.csv'))
    if title == 'Add a sensor':
        assert list(place.glob('maps/canopy/*.tif'))
        assert list(place.glob('maps/canopy/**/*.html'))
        assert list(place.glob('output/benchmark/canopy/**/*.csv'))


def _check_pixels(place: Path) -> None:
    """Windows and scenes contain the pixels of the files."""
    table = RasterTable.read(place / 'data' / 'scenes.parquet')
    archive = RasterArchive(table, ['s2'], window_size=48, split='all')
    path = archive.matches.paths(0, 's2')[0]
    with rasterio.open(path) as src:
        image = archive[0]['image'].numpy()
        assert np.array_equal(image, src.read(window=((0, 48), (0, 48))).astype(np.float32))
    first = min((place / 'data/scenes/america_1868_36').glob('s2_*.tif'))
    with rasterio.open(place / 'place' / 's2.tif') as src, rasterio.open(first) as original:
        assert (src.crs, src.transform) == (original.crs, original.transform)
        values = src.read()
        assert np.array_equal(values, np.where(np.isnan(values), np.nan, original.read()), True)
        assert np.isfinite(values).mean() > 0.9


def test_the_page_shows_the_layout_that_it_names() -> None:
    shown = next(block for block in re.findall(r'```yaml\n(.*?)```', PAGE, re.DOTALL))
    stored = (ROOT / 'configs' / 'layouts' / 'scenes.yaml').read_text()
    assert yaml.safe_load(shown) == yaml.safe_load(stored)
