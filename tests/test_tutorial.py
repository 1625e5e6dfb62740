"""All commands of docs/tutorial.md, run with small data."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import timm
import yaml

from geofm.datasets import RasterArchive
from geofm.legend import NO_CLASS
from geofm.models import MultiSensorViT
from geofm.sample import DEFAULT_ROIS
from tests.docs_commands import ROOT, run, sections


def places_of_training(run_folder: Path) -> set[str]:
    """Places in the training split of a run, by its stored configuration."""
    config = yaml.safe_load((run_folder / 'lightning_logs/version_0/config.yaml').read_text())
    args = config['data']['init_args']
    archive = RasterArchive(
        Path(args['table']),
        args['sensors'],
        split_by=args['split'],
        window_size=args['window_size'],
    )
    paths = [archive.matches.paths(i, 's2')[0] for i in range(len(archive))]
    assert paths
    return {Path(path).parent.name for path in paths}


def test_the_tutorial_leads_from_scenes_to_a_validated_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / 'configs', tmp_path / 'configs')
    monkeypatch.chdir(tmp_path)
    for lines in sections((ROOT / 'docs' / 'tutorial.md').read_text()).values():
        for line in lines:
            run(line, DEFAULT_ROIS[:6])
    few = Path('maps')
    assert {'classify.json', 'head.safetensors', 's2_classes.tif'} <= {
        f.name for f in few.iterdir()
    }
    assert list(few.rglob('*.html'))
    accuracy = json.loads(Path('predicted/accuracy.json').read_text())
    assert accuracy
    maps = sorted(Path('predicted').glob('*/*_classes.tif'))
    # Two dates of the only place of the test split.
    assert len(maps) == 2
    (place,) = {path.parent.name.rpartition('_')[0] for path in maps}
    assert place not in places_of_training(Path('output/archive'))
    assert place not in places_of_training(Path('output/archive_segmentation'))
    for path in maps:
        scene = next(Path('data/scenes', place).glob('s2_*.tif'))
        with rasterio.open(path) as made, rasterio.open(scene) as given:
            assert (made.crs, made.transform, made.shape) == (
                given.crs,
                given.transform,
                given.shape,
            )
            classes = made.read(1)
            assert set(np.unique(classes)) <= {*range(8), NO_CLASS}
            assert (classes != NO_CLASS).mean() > 0.5
    model = timm.create_model('local-dir:backbone')
    assert isinstance(model, MultiSensorViT)
