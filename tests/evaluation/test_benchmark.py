import csv
import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset

from geofm.evaluation import (
    BackboneConfig,
    ProbeSettings,
    Report,
    print_report,
    run_benchmark,
    write_report,
)
from geofm.evaluation.data import LabelledData, Split, Task
from geofm.evaluation.figures import write_figures
from geofm.models import MultiSensorViT
from geofm.sensors import BANDS
from tests.evaluation.labelled import TINY, noise_data

#: The smallest model: decoders build it with the width and depth of its name.
NAME = 'geofm_vit_nano_patch16_linear'
FEW = ProbeSettings(k=(1, 5), steps=20, epochs=1, progress=False)


@pytest.fixture(scope='module')
def checkpoint(module_path: Path) -> Path:
    # Another seed than the baseline, whose weights would otherwise be equal.
    torch.manual_seed(7)
    model = MultiSensorViT(**TINY)
    path = module_path / 'last.ckpt'
    hparams = {'model': NAME, 'in_channels': 15, 'bands': list(BANDS), 'model_args': TINY}
    state = {f'model.{key}': value for key, value in model.state_dict().items()}
    torch.save({'state_dict': state, 'hyper_parameters': hparams}, path)
    return path


def run(
    data: LabelledData, *models: Any, settings: ProbeSettings = FEW, cache: Path | None = None
) -> Report:
    configs = [m if isinstance(m, BackboneConfig) else BackboneConfig(str(m)) for m in models]
    return run_benchmark(configs, data, settings, cache, lambda line: None)


@pytest.fixture(scope='module')
def report_of(checkpoint: Path) -> Callable[[Task], Report]:
    """Reports on the checkpoint by task, made on demand."""
    return functools.cache(lambda task: run(noise_data(task), checkpoint))


@pytest.mark.parametrize('task', ['classification', 'multilabel', 'segmentation', 'regression'])
def test_baselines_are_always_reported(task: Task, report_of: Callable[[Task], Report]) -> None:
    report = report_of(task)
    assert {s.backbone for s in report.scores} == {'last', 'random weights', 'band mean and std'}
    # The classes differ in the mean of every band.
    best = max(s.value for s in report.scores if s.metric == report.columns()[0][1])
    assert best > 0.8
    for score in report.scores:
        assert score.low <= score.high
        assert (score.train, score.test) == (24, 24)


def test_an_architecture_has_one_random_baseline(checkpoint: Path) -> None:
    twins = [BackboneConfig(str(checkpoint), name=name) for name in ('one', 'two')]
    # The names do not depend on the probe.
    quick = ProbeSettings(('knn',), k=(1,), progress=False)
    report = run(noise_data(), *twins, 'rcf', settings=quick)
    names = list(dict.fromkeys(score.backbone for score in report.scores))
    assert names == ['one', 'two', 'RCF', 'random weights', 'band mean and std']
    # A model with random weights is a baseline itself.
    alone = run(noise_data(), BackboneConfig(NAME, model_args=TINY), settings=quick)
    assert {s.backbone for s in alone.scores} == {NAME, 'band mean and std'}
    with pytest.raises(ValueError, match="two backbones are named 'last'"):
        run(noise_data(), checkpoint, checkpoint, settings=quick)


@pytest.mark.parametrize('task', ['classification', 'segmentation'])
def test_one_seed_gives_one_result(
    task: Task, checkpoint: Path, report_of: Callable[[Task], Report]
) -> None:
    assert run(noise_data(task), checkpoint).scores == report_of(task).scores


def test_features_are_computed_once(checkpoint: Path, tmp_path: Path) -> None:
    settings = replace(FEW, probes=('knn', 'linear'))
    first = run(noise_data(), checkpoint, settings=settings, cache=tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(files) == 3 * 3
    second = run(noise_data(), checkpoint, settings=settings, cache=tmp_path)
    assert second.scores == first.scores
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


def test_the_order_of_bands_changes_no_score(
    checkpoint: Path, report_of: Callable[[Task], Report]
) -> None:
    reversed_bands = run(noise_data(bands=BANDS[::-1]), checkpoint)
    assert reversed_bands.scores[:-5] == report_of('classification').scores[:-5]


@pytest.mark.parametrize('task', ['segmentation', 'regression'])
def test_torchgeo_decoders_use_the_backbone(task: Task, checkpoint: Path) -> None:
    """The backbone must have the width and depth of its name; others are left out with a note."""
    data = noise_data(task, length=8)
    named = BackboneConfig(NAME, name='named', model_args={'init_values': 1.0})
    frozen = ProbeSettings(('dpt',), epochs=1, progress=False)
    first = run(data, named, checkpoint, settings=frozen)
    # The other is left out for every decoder, and each would be built to find out.
    others = replace(frozen, probes=('dpt_tuned', 'upernet'))
    second = run(data, named, settings=others)
    probes = {(s.backbone, s.probe) for s in [*first.scores, *second.scores]}
    assert {('named', 'dpt, frozen'), ('named', 'dpt, tuned')} <= probes
    notes = '\n'.join([*first.notes, *second.notes])
    assert (
        'dpt, frozen: left out: last: its embed_dim differs from that of the model of its name'
        in notes
    )
    if ('named', 'upernet, frozen') not in probes:
        assert 'is not an encoder of segmentation-models-pytorch' in notes


def test_upernet_leaves_out_a_last_batch_of_one_image() -> None:
    """Batch normalisation of its pyramid pooling needs more than one pixel."""
    settings = ProbeSettings(('upernet',), epochs=1, progress=False)
    named = BackboneConfig(NAME, name='named', model_args={'init_values': 1.0})
    report = run(noise_data('segmentation', length=9), named, settings=settings)
    assert ('named', 'upernet, frozen') in {(s.backbone, s.probe) for s in report.scores}
    alone = run(noise_data('segmentation', length=1), named, settings=settings)
    assert 'UPerNet needs batches of at least 2 training images' in '\n'.join(alone.notes)


def test_dpt_takes_odd_grids_and_patch_sizes_of_powers_of_two() -> None:
    settings = ProbeSettings(('dpt',), epochs=1, progress=False)
    odd = noise_data('segmentation', length=4, size=48)
    named = BackboneConfig(NAME, name='named', model_args={'init_values': 1.0})
    report = run(odd, named, settings=settings)
    assert ('named', 'dpt, frozen') in {(s.backbone, s.probe) for s in report.scores}
    name = NAME.replace('patch16', 'patch14')
    other = BackboneConfig(name, name='other', model_args={'init_values': 1.0})
    notes = '\n'.join(run(odd, other, settings=settings).notes)
    assert 'DPT needs a patch size that is a power of two, such as 8 or 16 px, not 14' in notes


class Blank(Dataset[dict[str, Tensor]]):
    """Samples of another data set, with a constant mask."""

    def __init__(self, dataset: Any, value: float) -> None:
        self.dataset, self.value, self.bands = dataset, value, dataset.bands

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.dataset[index]
        return {**sample, 'mask': torch.full_like(sample['mask'], self.value)}


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
@pytest.mark.parametrize(('task', 'value'), [('segmentation', 255), ('regression', math.nan)])
def test_masks_without_a_known_pixel_are_an_error(task: Task, value: float, split: Split) -> None:
    data = noise_data(task, length=4)
    blank = replace(data, splits={**data.splits, split: Blank(data.splits[split], value)})
    with pytest.raises(ValueError, match=f'every pixel of the masks of the {split} split is'):
        run(blank)


def test_probes_of_another_task_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"probes \['dpt'\] are not available for classification"):
        run(noise_data(), settings=ProbeSettings(('dpt',)))
    with pytest.raises(ValueError, match=r"probes \['knn'\] are not available for segmentation"):
        run(noise_data('segmentation'), settings=ProbeSettings(('knn',)))


def test_more_neighbours_than_images_are_left_out_with_a_note() -> None:
    report = run(noise_data(length=6), settings=ProbeSettings(('knn',), k=(1, 20)))
    assert {s.probe for s in report.scores} == {'1-NN'}
    assert 'k = [20] left out: there are only 6 training images' in report.notes


@pytest.mark.parametrize('task', ['classification', 'segmentation', 'regression'])
def test_files_have_every_score(
    task: Task, report_of: Callable[[Task], Report], tmp_path: Path
) -> None:
    report = report_of(task)
    folder = tmp_path / 'new'
    files = [*write_report(report, folder, {'seed': 0}), *write_figures(report, folder)]
    assert sorted(folder.iterdir()) == sorted(files)
    content = json.loads((folder / 'scores.json').read_text())
    assert len(content['scores']) == len(report.scores)
    assert content['notes'] == report.notes
    with (folder / 'scores.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row['value']) for row in rows] == [s.value for s in report.scores]
    markdown = (folder / 'scores.md').read_text()
    assert all(score.text() in markdown for score in report.scores)
    pictures = {path.name for path in files if path.suffix == '.png'}
    assert pictures == ({'scores.png'} if task == 'classification' else {'scores.png', 'maps.png'})
    for name in pictures:
        assert imread(folder / name).std() > 0.05


def test_the_table_shows_every_row(report_of: Callable[[Task], Report]) -> None:
    report = report_of('classification')
    console = Console(width=200, record=True)
    print_report(report, console)
    text = console.export_text()
    for row in report.rows():
        assert row in text
    assert 'overall accuracy, %' in text
