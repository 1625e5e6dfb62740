"""The data module of archives, and pretraining with it from a configuration."""

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from geofm.cli import main
from geofm.datamodules import RasterArchiveDataModule, raster_archive
from geofm.datamodules.raster_archive import archive_statistics
from geofm.datasets import RasterArchive, write_sample_scenes
from geofm.datasets.windows import RandomWindows
from geofm.sample.scenes import SceneFiles
from geofm.sensors import SENSORS, registry
from tests.datasets.table.rasters import dn, write_csv, write_raster

LAYOUT = {
    'files': [
        {'sensor': 's1', 'regex': r'(?P<place>[^/]+)/s1_(?P<date>\d{8})_(?P<band>\w+)\.tif'},
        {'sensor': 's2', 'regex': r'(?P<place>[^/]+)/s2_(?P<date>\d{8})_(?P<band>\w+)\.tif'},
        {'sensor': 'dem', 'regex': r'(?P<place>[^/]+)/dem\.tif'},
    ]
}
SPLIT = {'by': 'place', 'val': 0.2, 'test': 0.2}
#: A band of each sensor and pixel size. Each is a file to open.
FEW = ['VH', 'B02', 'B05', 'B01', 'dem.elevation']


@pytest.fixture(scope='module')
def root(module_path: Path) -> Path:
    """Scenes of 144 px with one file per band, and a layout beside them."""
    files: SceneFiles = 'band'
    write_sample_scenes(module_path / 'scenes', files, dates=2, size=144)
    (module_path / 'layout.yaml').write_text(yaml.safe_dump(LAYOUT))
    return module_path


def module(folder: Path, **kwargs: Any) -> RasterArchiveDataModule:
    given = {
        'table': str(folder / 'table.parquet'),
        'root': str(folder / 'scenes'),
        'layout': str(folder / 'layout.yaml'),
        'sensors': ['s1', 's2', 'dem'],
        'split': SPLIT,
        'window_size': 72,
        'batch_size': 4,
        'seed': 0,
    }
    return RasterArchiveDataModule(**{**given, **kwargs})


@pytest.mark.filterwarnings('ignore:.*does not name', 'ignore:.*matches nothing')
def test_batches(root: Path) -> None:
    data = module(root, patch_size=64, bands=FEW, statistics='compute')
    data.prepare_data()
    table, statistics = root / 'table.parquet', list(root.glob('table.statistics-*.yaml'))
    assert table.is_file()
    assert len(statistics) == 1
    data.setup('fit')
    batch = next(iter(data.train_dataloader()))
    assert batch['image'].shape == (4, 5, 64, 64)
    assert batch['dates'].shape == (4, 3)
    assert isinstance(data.train_dataset, RandomWindows)
    train = data.train_dataset.dataset
    assert isinstance(train, RasterArchive)
    # Compute the statistics from all pixels of the training windows.
    pixels = torch.cat(
        [s['image'][:, s['valid']] for s in map(train.__getitem__, range(len(train)))], 1
    )
    assert torch.allclose(data.mean, pixels.double().mean(1).float(), rtol=1e-4)
    assert torch.allclose(data.std, pixels.double().std(1, correction=0).float(), rtol=1e-4)
    # The second time, they are read from the file.
    made = statistics[0].stat().st_mtime_ns
    again = module(root, patch_size=64, bands=FEW, statistics='compute')
    again.setup('fit')
    assert statistics[0].stat().st_mtime_ns == made
    assert torch.equal(again.mean, data.mean)


@pytest.mark.filterwarnings('ignore:.*does not name', 'ignore:.*matches nothing')
def test_statistics_of_large_data_are_computed_from_a_subset(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raster_archive, '_MOST_WINDOWS', 20)
    monkeypatch.setattr(raster_archive, '_MOST_PIXELS', 20 * 50 * 50)
    table = str(root / 'some.parquet')
    some = module(root, table=table, bands=FEW, statistics='compute')
    some.setup('fit')
    (file,) = root.glob('some.statistics-*.yaml')
    assert yaml.safe_load(file.read_text())['read'] == '20 of them, 50 x 50 pixels of each'
    train = some.train_dataset
    assert isinstance(train, RasterArchive)
    whole = archive_statistics(map(train.__getitem__, range(len(train))), train.bands, some.sensors)
    # Within the variation between samples of a landscape.
    mean, std = (torch.tensor([whole[b][k] for b in train.bands]) for k in ('mean', 'std'))
    assert (some.mean - mean).abs().lt(0.5 * std).all()
    again = module(root, table=str(root / 'again.parquet'), bands=FEW, statistics='compute')
    again.setup('fit')
    assert torch.equal(again.mean, some.mean)


@pytest.mark.filterwarnings('ignore:.*does not name', 'ignore:.*matches nothing')
def test_cached_statistics_are_invalidated_by_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / 'table.csv'
    rows = []
    for i in range(3):
        write_raster(tmp_path / f'{i}.tif', dn((13, 16, 16)))
        rows.append({'path': f'{i}.tif', 'sensor': 's2', 'datetime': '2018-06-01', 'place': str(i)})
    write_csv(file, rows)

    def mean() -> torch.Tensor:
        data = RasterArchiveDataModule(str(file), sensors=['s2'], statistics='compute')
        with pytest.warns(UserWarning, match='without validation'):
            data.setup('fit')
        return data.mean

    first = mean()
    assert torch.equal(mean(), first)
    assert len(list(tmp_path.glob('table.statistics-*.yaml'))) == 1
    # The table is unchanged.
    write_raster(tmp_path / '1.tif', 3 * dn((13, 16, 16)))
    second = mean()
    assert not torch.equal(second, first)
    assert len(list(tmp_path.glob('table.statistics-*.yaml'))) == 2
    monkeypatch.setitem(registry._sensors, 's2', replace(SENSORS['s2'], limits=(0, 5000)))
    mean()
    assert len(list(tmp_path.glob('table.statistics-*.yaml'))) == 3


@pytest.mark.filterwarnings('ignore:.*does not name', 'ignore:.*matches nothing')
def test_fitting_logs_the_number_of_samples(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level('INFO'):
        module(root).setup('fit')
    counts = [re.findall(r'(\w+): (\d+) samples? of (\d+) places?', m) for m in caplog.messages]
    said = [count for found in counts for count in found]
    assert [name for name, _, _ in said] == ['train', 'val']
    assert all(int(samples) == 8 * int(places) for _, samples, places in said)


@pytest.mark.filterwarnings('ignore:.*does not name', 'ignore:.*matches nothing')
def test_splits_are_disjoint(root: Path) -> None:
    data = module(root)
    for stage in ('fit', 'test', 'predict'):
        data.setup(stage)
    sets: dict[str, Any] = {
        'train': data.train_dataset,
        'val': data.val_dataset,
        'test': data.test_dataset,
    }
    places = {name: set(dataset.index['place']) for name, dataset in sets.items()}
    assert all(places.values())
    assert sum(map(len, places.values())) == len(set.union(*places.values())) == 6
    total = len(data.predict_dataset)  # type: ignore[arg-type]
    assert sum(map(len, sets.values())) == total == 6 * 2 * 4


def test_fitting_without_a_split(root: Path) -> None:
    data = module(root, split=None, n_dates=2, bands=['B04', 'VV'], sensors=['s1', 's2'])
    with pytest.warns(UserWarning, match='fitting without validation'):
        data.setup('fit')
    assert next(iter(data.train_dataloader()))['image'].shape == (4, 2, 2, 72, 72)


def test_wrong_arguments(root: Path) -> None:
    for kwargs, said in (
        ({'table': None, 'root': None, 'layout': None}, 'give a table'),
        ({'layout': None}, 'give both root and layout'),
        ({'sensors': []}, 'no sensors given'),
        ({'patch_size': 0}, 'positive number'),
        ({'split': {'by': 'date'}}, 'unknown'),
    ):
        with pytest.raises(ValueError, match=said):
            module(root, **kwargs)


def test_pictures_in_folders(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = {'train/n01/a.JPEG': (40, 60), 'train/n02/b.png': (70, 30), 'val/n01/c.jpg': (33, 33)}
    for name, size in sizes.items():
        path = tmp_path / 'pictures' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    data = RasterArchiveDataModule(
        None, ['rgb'], root=str(tmp_path / 'pictures'), layout='images', batch_size=2, seed=0
    )
    data.setup('fit')
    assert isinstance(data.val_dataset, RasterArchive)
    for dataset in (data.train_dataset, data.val_dataset):
        assert isinstance(dataset, RasterArchive)
        for i in range(len(dataset)):
            with Image.open(dataset.files_of(i)[0]) as picture:
                want = torch.from_numpy(np.array(picture.convert('RGB'))).permute(2, 0, 1)
            assert torch.equal(dataset[i]['image'], want.float())
    batch = next(iter(data.train_dataloader()))
    assert batch['image'].shape == (2, 3, 70, 60)
    assert batch['valid'].sum() == 40 * 60 + 70 * 30


TASK = {
    'global_size': 32,
    'local_size': 16,
    'n_local': 2,
    'local_scale': [0.1, 0.3],
    'prototypes': 64,
    'head_hidden_dim': 32,
    'head_bottleneck_dim': 16,
    'warmup_epochs': 0,
}
MODEL_ARGS = {'embed_dim': 48, 'depth': 2, 'num_heads': 2}
TRAINER = {
    'accelerator': 'cpu',
    'max_steps': 2,
    'enable_progress_bar': False,
    'logger': False,
    'limit_val_batches': 1,
    'enable_checkpointing': False,
    'num_sanity_val_steps': 0,
}


@pytest.mark.parametrize(
    ('sensors', 'model', 'kwargs'),
    [
        (['s2'], 'geofm_vit_nano_patch8_s2', {'window_size': 72, 'split': {'by': 'blocks'}}),
        (['s1', 's2'], 'geofm_vit_nano_patch8_linear', {'patch_size': 64, 'n_dates': 2}),
        (['s1', 's2', 'dem'], 'geofm_vit_nano_patch8_joint', {'window_size': 72}),
        (
            ['s1', 's2', 'dem'],
            'geofm_vit_nano_patch8_xattn',
            {'allow_missing': ['s1', 'dem'], 'max_day_gap': 3, 'statistics': 'compute'},
        ),
    ],
)
def test_pretraining_by_yaml(
    root: Path, tmp_path: Path, sensors: list[str], model: str, kwargs: dict[str, Any]
) -> None:
    if kwargs.get('split', {}).get('by') == 'blocks':
        kwargs = {**kwargs, 'split': {'by': 'blocks', 'block_km': 1.0}}
    data = {
        'root': str(root / 'scenes'),
        'layout': str(root / 'layout.yaml'),
        'batch_size': 4,
        'sensors': sensors,
        'split': SPLIT,
        'table': str(root / 'table.parquet'),
    }
    channels = {'s1': 2, 's2': 13, 'dem': 1}
    args = {**MODEL_ARGS, 'sensors': sensors}
    config = {
        'seed_everything': 0,
        'trainer': {**TRAINER, 'default_root_dir': str(tmp_path)},
        'model': {
            'class_path': 'geofm.tasks.DINOv2',
            'init_args': {
                **TASK,
                'model': model,
                'in_channels': sum(channels[key] for key in sensors),
                'model_args': args,
            },
        },
        'data': {
            'class_path': 'geofm.datamodules.RasterArchiveDataModule',
            'init_args': {**data, **kwargs},
        },
    }
    file = tmp_path / 'config.yaml'
    file.write_text(yaml.safe_dump(config))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        main(['fit', '--config', str(file)])
