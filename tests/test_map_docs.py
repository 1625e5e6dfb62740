"""Commands of docs/maps.md and docs/few_labels.md, run with a small scene and model."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import timm
import torch
from pyproj import Transformer
from rasterio.transform import Affine

from geofm.sensors import DEFAULT_SENSORS, SENSORS
from tests.docs_commands import ROOT, run, sections
from tests.maps.scenes import UTM, noise, write

SIDE = 160
#: The place in docs/maps.md.
PLACE = (-0.78, 41.60)
MODEL = {
    'model': 'geofm_vit_nano_patch16_linear',
    'in_channels': 15,
    'bands': None,
    'model_args': {'depth': 2, 'embed_dim': 24, 'num_heads': 2},
}


def write_scene(folder: Path, names: Mapping[str, str], seed: int) -> None:
    """Write a scene around the place, with a field in the west and water in the east."""
    folder.mkdir(parents=True, exist_ok=True)
    easting, northing = Transformer.from_crs(4326, 32630, always_xy=True).transform(*PLACE)
    transform = Affine(10, 0, round(easting) - 5 * SIDE, 0, -10, round(northing) + 5 * SIDE)
    random = np.random.default_rng(seed)
    for sensor, name in names.items():
        pixels = noise(sensor, SIDE, SIDE) * random.uniform(0.95, 1.05, (SIDE, SIDE))
        pixels[:, :, SIDE // 2 :] *= 0.5
        bands = [band.name for band in SENSORS[sensor].bands]
        write(folder / name, pixels.astype(np.float32), UTM, transform, bands)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint, two similar scenes, and labels."""
    monkeypatch.chdir(tmp_path)
    network = timm.create_model(str(MODEL['model']), in_chans=15, **MODEL['model_args'])  # type: ignore[arg-type]
    state = {f'model.{key}': value for key, value in network.state_dict().items()}
    torch.save({'state_dict': state, 'hyper_parameters': MODEL}, 'last.ckpt')
    first, second = DEFAULT_SENSORS
    write_scene(tmp_path, {first: f'{first}.tif', second: f'{second}.tif'}, 0)
    write_scene(tmp_path, {first: f'next_{first}.tif', second: 'next.tif'}, 1)
    for year in (2019, 2021):
        write_scene(tmp_path / str(year), {second: f'{second}.tif'}, year)
    with rasterio.open(f'{second}.tif') as src:
        rows, cols = np.mgrid[8:SIDE:24, 8:SIDE:24].reshape(2, -1)
        x, y = src.transform @ (cols, rows)
    names = np.where(cols < SIDE // 2, 'field', 'water')
    frame = gpd.GeoDataFrame({'class': names}, geometry=gpd.points_from_xy(x, y), crs=UTM.to_wkt())
    frame.to_file('points.gpkg')
    return tmp_path


def run_page(name: str) -> str:
    """Run the commands of a page. Scripts of experiments only have to exist."""
    page = (ROOT / 'docs' / name).read_text()
    for title, lines in sections(page).items():
        for line in lines:
            command = line.partition('#')[0].strip()
            if command.startswith('python '):
                assert (ROOT / command.split()[1]).is_file(), (title, command)
            else:
                run(command)
    return page


def written(page: str, folder: Path) -> None:
    """Check that each file that a table of the page names was written."""
    patterns = [
        pattern
        for row in re.findall(r'^\|(.*)\|$', page, re.MULTILINE)
        for pattern in re.findall(r'`(\S+\.(?:tif|parquet|safetensors|json|png))`', row)
    ]
    assert len(patterns) > 5
    for pattern in patterns:
        assert [*folder.rglob(pattern)], pattern


def test_few_labels(place: Path) -> None:
    page = run_page('few_labels.md')
    written(page, place / 'maps')
    report = json.loads((place / 'maps' / 'classify.json').read_text())
    assert {*report['accuracy']} == {'embeddings', 'band statistics'}
    assert (place / 'maps' / 'next_classes.tif').exists()


def test_maps(place: Path) -> None:
    pytest.importorskip('rio_tiler', reason='the page needs rio-tiler, of the extra "maps"')
    # The scene at another date, for the first lines of the page.
    run('geofm embed --checkpoint last.ckpt --s2 2019/s2.tif --s1 s1.tif --output old')
    page = run_page('maps.md')
    written(page, place)
    data = (place / '2021' / 's2_page' / 'data.js').read_text()
    assert '"name": "Change"' in data
