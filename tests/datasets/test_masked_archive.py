"""A table of rasters with a band that is the target."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from geofm.datamodules import MaskedArchiveDataModule
from geofm.datasets import write_sample_scenes
from geofm.datasets.archive.masked import MaskedArchive
from geofm.evaluation.data import labelled_data
from geofm.sen12ms import Roi
from geofm.sensors import Band, BandError, Sensor, bands_of, register_sensor

from ..registry import kept_registry

ROIS: list[Roi] = [('ROIs1868', 36), ('ROIs1970', 57), ('ROIs1868', 121)]


@pytest.fixture(scope='module')
def table(module_path: Path) -> Iterator[Path]:
    """Scenes of three places with elevation and land cover."""
    root = write_sample_scenes(module_path / 'scenes', 'scene', ROIS, dates=1, size=96)
    keys = {'s1': 's1', 's2': 's2', 'de': 'dem', 'la': 'landcover'}
    rows = []
    for path in sorted(root.rglob('*.tif')):
        day = path.stem[3:] if path.stem.startswith(('s1_', 's2_')) else ''
        split = ('train', 'val', 'test')[sorted(root.glob('*/')).index(path.parent)]
        rows.append(f'{path},{keys[path.name[:2]]},{day},{path.parent.name},{split}')
    file = module_path / 'table.csv'
    file.write_text('\n'.join(['path,sensor,datetime,place,split', *rows]) + '\n')
    with kept_registry():
        register_sensor(
            Sensor(
                'landcover',
                'Land cover',
                (Band('class', 3.0, 2.0),),
                'other',
                'class',
                resampling='nearest',
                static=True,
            )
        )
        yield file


def test_the_mask_is_the_file_of_classes(table: Path) -> None:
    dataset = MaskedArchive(table, ['s2', 'dem'], 'landcover.class', split='all')
    assert dataset.bands == bands_of(['s2', 'dem'])
    assert len(dataset) == 3
    for i in range(len(dataset)):
        sample = dataset[i]
        files = {path.name[:2]: path for path in dataset.files_of(i)}
        with rasterio.open(files['s2']) as src:
            np.testing.assert_array_equal(sample['image'][:13], src.read())
            valid = src.read().any(axis=0)
        with rasterio.open(files['la']) as src:
            expected = np.where(valid, src.read(1), 255)
        np.testing.assert_array_equal(sample['mask'][sample['valid']], expected[sample['valid']])
        assert (sample['mask'][~sample['valid']] == 255).all()
        assert sample['mask'].dtype == torch.int64
        assert sample['image'].shape[0] == 14
        assert sample['dates'].shape == (2,)


def test_dates_of_one_sensor_have_both_columns(table: Path) -> None:
    dataset = MaskedArchive(table, ['s2'], 'landcover.class', ['B04', 'B02'], split='test')
    sample = dataset[0]
    assert sample['image'].shape[0] == 2
    assert sample['dates'][0] == torch.iinfo(torch.int64).min
    assert sample['dates'][1] > 17_000


def test_the_mask_is_no_band_of_the_image(table: Path) -> None:
    with pytest.raises(BandError, match='is one of the bands of the image'):
        MaskedArchive(table, ['s2', 'landcover'], 'landcover.class')


def test_a_benchmark_finds_the_task_and_the_splits(table: Path) -> None:
    module = MaskedArchiveDataModule(
        table, ['s1', 's2', 'dem'], 'landcover.class', batch_size=2, window_size=48
    )
    data = labelled_data(module)
    assert (data.task, data.bands) == ('segmentation', bands_of(['s1', 's2', 'dem']))
    assert [data.size(split) for split in data.splits] == [4, 4, 4]
    batch = next(iter(data.loader('train')))
    assert batch['image'].shape == (2, 16, 48, 48)
    assert data.targets(batch).shape == (2, 48, 48)
