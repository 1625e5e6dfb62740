"""User-defined labels for a table, compared with NumPy and rasterio, and in TorchGeo's tasks."""

import json
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pytest
import rasterio
import shapely
import torch
from lightning import Trainer
from rasterio.features import rasterize
from rasterio.transform import Affine
from torchgeo.datamodules.utils import MisconfigurationException
from torchgeo.tasks import Classification, PixelwiseRegression, SemanticSegmentation

from geofm.datamodules import LabelledArchiveDataModule
from geofm.datasets import LAND_COVER, write_sample_scenes
from geofm.datasets.archive.labelled import LabelledArchive
from geofm.datasets.labels import LabelError
from geofm.evaluation.data import labelled_data
from geofm.legend import LEGEND_TAG, Legend
from geofm.messages import describe
from geofm.sensors import bands_of

NAMES = [c.name for c in LAND_COVER]
SENSORS = ['s1', 's2']
PLACES = {'by': 'place', 'val': 0.33, 'test': 0.33}
BLOCKS = {'by': 'blocks', 'val': 0.25, 'test': 0.25, 'block_km': 0.96}
MODEL = 'geofm_vit_nano_patch16_linear'


@pytest.fixture(scope='module')
def folder(module_path: Path) -> Path:
    """Scenes of three places, a table of them, and polygons with a class and a height."""
    rois = [('ROIs1868', 36), ('ROIs1970', 57), ('ROIs1868', 121)]
    root = write_sample_scenes(module_path / 'scenes', 'scene', rois, dates=1, size=192)
    rows = []
    for path in sorted(root.glob('*/s[12]_*.tif')):
        sensor, day = path.stem.split('_')
        rows.append(f'{path},{sensor},{day},{path.parent.name}')
    (module_path / 'table.csv').write_text('\n'.join(['path,sensor,datetime,place', *rows]) + '\n')
    with rasterio.open(min(root.glob('*/land_cover.tif'))) as src:
        left, bottom, right, top = src.bounds
        crs = src.crs
    middle = (left + right) / 2, (bottom + top) / 2
    polygons = [
        shapely.box(left - 50, middle[1] + 3, middle[0] + 3, top + 50),
        shapely.Point(*middle).buffer(400),
        shapely.box(right - 300, bottom + 5, right - 5, bottom + 400),
    ]
    frame = gpd.GeoDataFrame(
        {'kind': ['field', 'lake', 'field'], 'height': [2.5, 0.0, 7.25]},
        geometry=polygons,
        crs=crs,
    )
    frame.to_file(module_path / 'fields.gpkg')
    return module_path


def archive(folder: Path, labels: Any, **kwargs: Any) -> LabelledArchive:
    kwargs = {'split': 'all', 'window_size': 96, **kwargs}
    return LabelledArchive(folder / 'table.csv', SENSORS, labels, **kwargs)


def module(folder: Path, labels: Any, **kwargs: Any) -> LabelledArchiveDataModule:
    kwargs = {'split': PLACES, 'window_size': 48, 'batch_size': 4, **kwargs}
    return LabelledArchiveDataModule(folder / 'table.csv', SENSORS, labels, **kwargs)


def masks(folder: Path) -> dict[str, Any]:
    return {'path': str(folder / 'scenes/*/land_cover.tif')}


def fields(folder: Path, column: str = 'kind', **kwargs: Any) -> dict[str, Any]:
    return {'path': str(folder / 'fields.gpkg'), 'column': column, **kwargs}


# -- samples ---------------------------------------------------------------------------------------


def test_raster_labels_are_read_without_resampling(folder: Path) -> None:
    dataset = archive(folder, masks(folder), classes=NAMES, window_size=None)
    assert len(dataset) == 3
    assert dataset.bands == bands_of(SENSORS)
    pixels = np.zeros(8, int)
    for i in range(3):
        sample = dataset[i]
        with rasterio.open(dataset.files_of(i)[0].parent / 'land_cover.tif') as src:
            expected = src.read(1)
        valid = sample['valid'].numpy()
        assert valid.any()
        np.testing.assert_array_equal(sample['mask'], np.where(valid, expected, 255))
        pixels += np.bincount(expected.ravel(), minlength=8)
    np.testing.assert_array_equal(dataset.counts, pixels)


def test_polygons_are_rasterised_like_rasterio_does(folder: Path) -> None:
    frame = gpd.read_file(folder / 'fields.gpkg')
    for all_touched in (False, True):
        with pytest.warns(UserWarning, match='samples? without a label, of 12 in split'):
            dataset = archive(folder, fields(folder, all_touched=all_touched))
        assert 0 < len(dataset) < 12
        assert dataset.legend == Legend.of(['field', 'lake'])
        for sample in (dataset[i] for i in range(len(dataset))):
            burnt = rasterize(
                zip(frame.geometry, [0, 1, 0], strict=True),
                (96, 96),
                255,
                transform=Affine(*sample['transform'].tolist()),
                all_touched=all_touched,
                dtype='uint8',
            )
            assert (burnt != 255).any()
            expected = np.where(sample['valid'], burnt, 255)
            np.testing.assert_array_equal(sample['mask'], expected)


def test_regression_targets_without_a_label_are_nan(folder: Path) -> None:
    with pytest.warns(UserWarning, match='without a label'):
        dataset = archive(folder, fields(folder, 'height'), target='regression')
    assert (dataset.legend, dataset.classes) == (None, ())
    numbers = torch.cat([sample['mask'].flatten() for sample in map(dataset.__getitem__, range(2))])
    assert numbers.dtype == torch.float32
    assert set(numbers[~numbers.isnan()].tolist()) <= {0.0, 2.5, 7.25}
    assert numbers.isnan().any()


def test_labels_of_whole_samples(folder: Path) -> None:
    several = archive(folder, masks(folder), classes=NAMES, target='multilabel')
    one = archive(folder, masks(folder), classes=NAMES, target='majority')
    each, of_all = np.zeros(8, int), np.zeros(8, int)
    for i in range(len(one)):
        labels = one.labels_of(i)
        counts = np.bincount(labels.ravel().astype(int), minlength=8)
        assert int(one[i]['label']) == counts.argmax()
        np.testing.assert_array_equal(several[i]['label'], counts > 0)
        each[counts.argmax()] += 1
        of_all += counts > 0
    np.testing.assert_array_equal(one.counts, each)
    np.testing.assert_array_equal(several.counts, of_all)


def test_class_weights_equal_those_of_scikit_learn(folder: Path) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    dataset = archive(folder, masks(folder), classes=[*NAMES, 'never'])
    labels = np.concatenate([dataset.labels_of(i).ravel() for i in range(len(dataset))])
    occurs = np.unique(labels)
    expected = np.ones(9)
    expected[occurs] = compute_class_weight('balanced', classes=occurs, y=labels)
    np.testing.assert_allclose(dataset.balanced_weights(), expected, rtol=1e-5)
    several = archive(folder, masks(folder), classes=NAMES, target='multilabel')
    some = (several.counts > 0) & (several.counts < len(several))
    weights = several.balanced_weights().numpy()
    np.testing.assert_allclose(weights[some], (len(several) / several.counts - 1)[some], rtol=1e-5)


def test_splits_do_not_overlap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr('geofm.datamodules.labelled_archive.rank_zero_info', said.append)
    data = module(folder, masks(folder), classes=NAMES, split=BLOCKS)
    data.setup('fit')
    data.setup('test')
    counts = {'train': len(data.train_dataset), 'val': len(data.val_dataset)}  # type: ignore[arg-type]
    assert said == [f'{split}: {count} windows with labels' for split, count in counts.items()]
    grounds = []
    for dataset in (data.train_dataset, data.val_dataset, data.test_dataset):
        assert isinstance(dataset, LabelledArchive)
        grounds.append(shapely.union_all(dataset.archive.index.to_crs(4326).geometry))
    for i in range(3):
        for other in grounds[:i]:
            assert grounds[i].intersection(other).area < 1e-12


def test_too_few_labels_are_left_out(folder: Path) -> None:
    with pytest.warns(UserWarning, match='without labels on 50%'):
        dataset = archive(folder, fields(folder), min_labelled=0.5)
    assert 0 < len(dataset) < 4
    for i in range(len(dataset)):
        assert (dataset.labels_of(i) != 255).mean() >= 0.5


def test_errors(folder: Path) -> None:
    with pytest.raises(LabelError, match="give 'path'"):
        archive(folder, {'file': 'x.gpkg'})
    with pytest.raises(LabelError, match='no file matches'):
        archive(folder, {'path': str(folder / '*.png')})
    with pytest.raises(LabelError, match='need the argument classes'):
        archive(folder, 'dem.elevation')
    with pytest.raises(LabelError, match='columns are kind, height'):
        archive(folder, fields(folder, 'crop'))
    with pytest.raises(LabelError, match='not numbers'):
        archive(folder, fields(folder), target='regression')
    with pytest.raises(LabelError, match='not among the classes'):
        archive(folder, masks(folder), classes=2)
    away = {'type': 'Point', 'coordinates': [-60, -10]}
    feature = {'type': 'Feature', 'properties': {'class': 'a'}, 'geometry': away}
    file = folder / 'away.geojson'
    file.write_text(json.dumps({'type': 'FeatureCollection', 'features': [feature]}))
    with pytest.raises(ValueError, match='Check that labels and scenes overlap'):
        archive(folder, {'path': str(file)})


# -- in TorchGeo's tasks ---------------------------------------------------------------------------


def fit(task: Any, data: LabelledArchiveDataModule, folder: Path) -> Trainer:
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=2,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        limit_test_batches=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator='cpu',
        log_every_n_steps=1,
        enable_checkpointing=False,
    )
    trainer.fit(task, datamodule=data)
    assert all(parameter.isfinite().all() for parameter in task.parameters())
    assert torch.isfinite(trainer.callback_metrics['train_loss'])
    assert torch.isfinite(trainer.callback_metrics['val_loss'])
    return trainer


def weights(task: Any) -> torch.Tensor:
    found: torch.Tensor = task.criterion.weight
    return found


def test_segmentation_trains_and_its_checkpoint_contains_the_classes(
    folder: Path, tmp_path: Path
) -> None:
    labels = {'path': str(folder / 'scenes/points.geojson'), 'column': 'class'}
    arguments: Any = {'in_channels': 15, 'num_classes': 8, 'num_filters': 8, 'ignore_index': 255}
    task = SemanticSegmentation('fcn', **arguments)
    data = module(folder, labels, classes=NAMES, class_weights='balanced', window_size=64)
    trainer = fit(task, data, tmp_path)
    train = data.train_dataset
    assert isinstance(train, LabelledArchive)
    assert torch.equal(weights(task), train.balanced_weights())
    trainer.save_checkpoint(tmp_path / 'last.ckpt')
    state = torch.load(tmp_path / 'last.ckpt', weights_only=False)
    entry = state['LabelledArchiveDataModule'][LEGEND_TAG]
    assert Legend.from_entry(entry) == Legend.of(NAMES)
    loaded = SemanticSegmentation.load_from_checkpoint(tmp_path / 'last.ckpt')
    assert torch.equal(weights(loaded), weights(task))
    fresh = SemanticSegmentation('fcn', **arguments)
    data = module(folder, labels, classes=NAMES, class_weights='balanced', window_size=64)
    trainer.test(fresh, data, ckpt_path=str(tmp_path / 'last.ckpt'), verbose=False)
    assert torch.equal(weights(fresh), weights(task))


def test_regression_ignores_pixels_without_a_label(folder: Path, tmp_path: Path) -> None:
    task = PixelwiseRegression('fcn', in_channels=15, num_filters=8)
    for place in sorted((folder / 'scenes').glob('*/land_cover.tif')):
        with rasterio.open(place) as src:
            heights = np.where(src.read(1) < 3, np.nan, src.read(1)).astype(np.float32)
            profile = {'driver': 'GTiff', 'count': 1, 'dtype': 'float32', 'nodata': np.nan}
            profile |= {key: src.profile[key] for key in ('crs', 'transform', 'height', 'width')}
        with rasterio.open(place.with_name('heights.tif'), 'w', **profile) as dst:
            dst.write(heights, 1)
    labels = {'path': str(folder / 'scenes/*/heights.tif')}
    data = module(folder, labels, target='regression', window_size=64)
    fit(task, data, tmp_path)
    task.eval()
    batch = next(iter(data.val_dataloader()))
    target, known = batch['mask'], ~batch['mask'].isnan()
    assert 0 < known.sum() < known.numel()
    prediction = torch.randn_like(target)
    expected = ((prediction - target)[known] ** 2).mean()
    assert torch.isclose(task.criterion(prediction, target), expected)
    metrics = task.test_metrics(prediction, target)
    assert torch.isclose(metrics['test_MSE'], expected)


@pytest.mark.parametrize('target', ['multilabel', 'majority'])
def test_classification(folder: Path, tmp_path: Path, target: Any) -> None:
    data = module(folder, masks(folder), classes=NAMES, target=target, class_weights='balanced')
    several = {'task': 'multilabel', 'loss': 'bce', 'num_labels': 8}
    arguments: Any = several if target == 'multilabel' else {'num_classes': 8}
    task = Classification(MODEL, in_channels=15, **arguments)
    trainer = fit(task, data, tmp_path)
    trainer.save_checkpoint(tmp_path / 'last.ckpt')
    Classification.load_from_checkpoint(tmp_path / 'last.ckpt', weights_only=False)


def test_the_benchmark_accepts_it(folder: Path) -> None:
    found = labelled_data(module(folder, masks(folder), classes=NAMES))
    assert (found.task, found.classes) == ('segmentation', tuple(NAMES))
    batch = next(iter(found.loader('train')))
    assert found.targets(batch).shape == (4, 48, 48)
    assert len(found.fingerprint('test')) == 64
    several = labelled_data(module(folder, masks(folder), classes=NAMES, target='multilabel'))
    assert several.task == 'multilabel'


# -- pixels without a label ------------------------------------------------------------------------


def test_ignore_index_must_not_be_a_class(folder: Path) -> None:
    with pytest.raises(ValueError, match=f"ignore_index 0 is the value of the class '{NAMES[0]}'"):
        archive(folder, masks(folder), classes=NAMES, ignore_index=0)
    values = {name: i + 1 for i, name in enumerate(['field', 'lake'])}
    kept = archive(folder, fields(folder), classes=values, ignore_index=0)
    mask = kept[0]['mask']
    burnt = kept.labels_of(0)
    assert (mask.numpy()[burnt == 255] == 0).all()
    assert set(mask.unique().tolist()) <= {0, 1, 2}


@pytest.mark.parametrize(
    ('task', 'kwargs', 'said'),
    [
        (lambda: segmentation(ignore_index=255), {'ignore_index': 9}, 'set both to the same value'),
        (
            lambda: segmentation(ignore_index=None),
            {'ignore_index': 9},
            'set both to the same value',
        ),
        (lambda: segmentation(ignore_index=255), {'target': 'majority'}, 'does not match the task'),
        (lambda: Classification('resnet18', in_channels=15, num_classes=8), {}, 'does not match'),
    ],
)
def test_a_task_that_does_not_match_the_data(
    folder: Path, task: Any, kwargs: Any, said: str
) -> None:
    """Otherwise, pixels without a label would be trained as class 9 of the task."""
    data = module(folder, masks(folder), classes=NAMES, **kwargs)
    trainer = Trainer(accelerator='cpu', logger=False, enable_checkpointing=False, max_steps=1)
    with pytest.raises(ValueError, match=said):
        trainer.fit(task(), data)


def segmentation(ignore_index: int | None) -> SemanticSegmentation:
    return SemanticSegmentation(
        'fcn', 'resnet18', in_channels=15, num_classes=10, num_filters=4, ignore_index=ignore_index
    )


def test_no_batches(folder: Path) -> None:
    data = module(folder, masks(folder), classes=NAMES, batch_size=0)
    trainer = Trainer(accelerator='cpu', logger=False, enable_checkpointing=False, max_steps=1)
    with pytest.raises(MisconfigurationException) as error:
        trainer.fit(segmentation(ignore_index=255), data)
    assert 'batch_size must be a positive number' in describe(error.value)
