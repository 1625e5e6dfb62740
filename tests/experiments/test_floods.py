"""The experiment on floods: its splits, its tables of rasters and its scores."""

import importlib
import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import jaccard_score

from geofm.datamodules import LabelledArchiveDataModule
from geofm.datasets.table import RasterTable
from geofm.evaluation.backbones import ViTEncoder
from geofm.tasks import MaskedWords
from tests.registry import kept_registry

EXPERIMENTS = Path(__file__).parents[2] / 'experiments'

#: Two places of training, one of them in no split before the flood; one each of the others; and
#: one at the border of two events.
PLACES = (1, 2, 121, 143, 110)


@pytest.fixture(scope='module')
def modules() -> Iterator[dict[str, Any]]:
    names = ('flood_data', 'flood_backbone', 'flood_heads', 'floods_report')
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXPERIMENTS)
        yield {name: importlib.import_module(name) for name in names}
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], '__file__', '')).startswith(str(EXPERIMENTS)):
            del sys.modules[name]


def write_zip(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """An archive named as OMBRIA's; what is in it."""
    draw = np.random.default_rng(0)
    written = {}
    with zipfile.ZipFile(path, 'w') as target:
        for number in PLACES:
            members = {
                f's1/after/{number:04}.png': draw.integers(0, 256, (256, 256)),
                f's2/after/{number:04}.png': draw.integers(0, 256, (256, 256, 3)),
                f'mask/{number:04}.png': 255 * draw.integers(0, 2, (256, 256)),
            }
            if number % 2 == 0:
                members[f's1/before/{number:04}.png'] = draw.integers(0, 256, (256, 256))
                members[f's2/before/{number:04}.png'] = draw.integers(0, 256, (256, 256, 3))
            for name, values in members.items():
                written[name] = values.astype(np.uint8)
                content = io.BytesIO()
                Image.fromarray(written[name]).save(content, 'png')
                target.writestr(name, content.getvalue())
    return written


def test_no_place_is_in_two_splits(modules: dict[str, Any]) -> None:
    data = modules['flood_data']
    numbers = [
        number
        for runs in data.RUNS.values()
        for first, last in runs
        for number in range(first, last + 1)
    ]
    assert len(numbers) == len(set(numbers))
    assert data.run_of(130) == ('test', (121, 135))
    assert data.run_of(110) is None


def test_tables_hold_the_places_of_the_splits(modules: dict[str, Any], tmp_path: Path) -> None:
    data, heads = modules['flood_data'], modules['flood_heads']
    written = write_zip(tmp_path / 'ombria.zip')
    with kept_registry():
        floods = data.prepare(tmp_path / 'ombria.zip', tmp_path / 'work')
        found = {split: floods.places(split) for split in ('train', 'val', 'test')}
        assert found == {'train': ['0001', '0002'], 'val': ['0143'], 'test': ['0121']}
        # Nothing of the other events, and no masks.
        unlabelled = RasterTable.read(floods.unlabelled)
        names = [unlabelled.places[i] for i in range(len(unlabelled.places))]
        assert sorted(names) == ['0001', '0002', '0002-before']
        assert len(unlabelled) == 6

        both = floods.image('train', '0002-before', ['radar', 'optical'])
        np.testing.assert_array_equal(both[0], written['s1/before/0002.png'])
        np.testing.assert_array_equal(both[1:], written['s2/before/0002.png'].transpose(2, 0, 1))

        # Windows as a network sees them, put together again: 255 is class 1, not "no label".
        module = LabelledArchiveDataModule(**heads.data_arguments(floods, ['optical']))
        for stage in ('fit', 'test'):
            module.setup(stage)
        for split, numbers in (('train', (1, 2)), ('test', (121,))):
            dataset = getattr(module, f'{split}_dataset')
            windows = [dataset[i]['mask'].numpy() for i in range(len(dataset))]
            expected = np.stack([written[f'mask/{n:04}.png'] // 255 for n in numbers])
            np.testing.assert_array_equal(heads.assemble(dataset, windows), expected)
            np.testing.assert_array_equal(floods.masks(split), expected)


def test_features_are_the_tokens_of_all_blocks(modules: dict[str, Any], tmp_path: Path) -> None:
    backbone, heads = modules['flood_backbone'], modules['flood_heads']
    write_zip(tmp_path / 'ombria.zip')
    with kept_registry():
        floods = modules['flood_data'].prepare(tmp_path / 'ombria.zip', tmp_path / 'work')
        model = backbone.configuration(floods, tmp_path, seed=0)['model']
        task = MaskedWords(**model['init_args'])
        side = modules['flood_data'].WINDOW
        batch = {'image': torch.randn(2, 4, side, side)}
        with torch.inference_mode():
            found = heads.BlocksEncoder(task.model.eval()).patches(batch)
            last = ViTEncoder(task.model).patches(batch)
        dim, depth = backbone.SHAPE['embed_dim'], backbone.SHAPE['depth']
        assert found.shape == (2, depth * dim, side // backbone.PATCH, side // backbone.PATCH)
        torch.testing.assert_close(found[:, :dim], last)
        # No block twice.
        assert len({part.sum().item() for part in found.split(dim, dim=1)}) == depth


def test_scores_pool_the_pixels_of_the_chosen_places(modules: dict[str, Any]) -> None:
    draw = np.random.default_rng(1)
    truth = draw.integers(0, 2, (5, 32, 32)).astype(np.uint8)
    seeds = [np.where(draw.random(truth.shape) < 0.3, 1 - truth, truth) for _ in range(2)]
    chosen = np.array([True, False, True, True, False])
    report = modules['floods_report']
    found = report.scores(report.confusions_of(seeds, truth)[torch.from_numpy(chosen)])

    guess = np.concatenate([seed[chosen].ravel() for seed in seeds])
    both = np.concatenate([truth[chosen].ravel()] * 2)
    for name, average in (('mean_iou', 'macro'), ('flood_iou', 'binary')):
        assert found[name].value == pytest.approx(jaccard_score(both, guess, average=average))
        assert found[name].low < found[name].value < found[name].high
