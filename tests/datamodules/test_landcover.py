import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torchgeo.tasks import BaseTask, Classification, SemanticSegmentation

from geofm.datamodules.landcover import SampleLandCoverDataModule
from geofm.datasets.landcover import SampleLandCover
from geofm.sample import LAND_COVER, write_sample_data
from geofm.sensors import band_statistics

ROIS = (('ROIs1868', 36), ('ROIs1868', 17), ('ROIs1970', 132))
SIZE = 64


@pytest.fixture(scope='module')
def root(module_path: Path) -> Path:
    """One region per split."""
    path = module_path / 'data'
    return write_sample_data(path, ROIS, time_steps=2, size=SIZE).path


def arguments(root: Path, **more: Any) -> dict[str, Any]:
    return {'paths': root, 'batch_size': 4, 'window': 32, 'min_purity': 0.0, **more}


def test_batches_are_normalised_by_band(root: Path) -> None:
    datamodule = SampleLandCoverDataModule(**arguments(root, bands=('B08', 'VV')))
    datamodule.setup('fit')
    raw = next(iter(datamodule.val_dataloader()))
    batch = datamodule.aug(raw)
    mean, std = band_statistics(('B08', 'VV'))
    expected = (raw['image'] - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    torch.testing.assert_close(batch['image'], expected.clamp(-5, 5))
    assert torch.equal(datamodule.mean, mean)
    assert torch.equal(datamodule.std, std)
    assert batch['label'].shape == (4,)
    assert batch['mask'].shape == (4, 32, 32)


def test_splits_are_the_official_ones(root: Path) -> None:
    datamodule = SampleLandCoverDataModule(**arguments(root))
    datamodule.setup('fit')
    datamodule.setup('test')
    datasets = (datamodule.train_dataset, datamodule.val_dataset, datamodule.test_dataset)
    for dataset, roi in zip(datasets, ROIS, strict=True):
        assert isinstance(dataset, SampleLandCover)
        index = dataset.pairs.index
        assert {*zip(index.season, index.roi, strict=True)} == {roi}


@pytest.mark.parametrize(
    'task',
    [
        Classification(model='resnet18', in_channels=15, num_classes=len(LAND_COVER)),
        SemanticSegmentation(
            model='unet', backbone='resnet18', in_channels=15, num_classes=len(LAND_COVER)
        ),
    ],
    ids=['classification', 'segmentation'],
)
def test_torchgeo_tasks_train_and_plot(root: Path, tmp_path: Path, task: BaseTask) -> None:
    datamodule = SampleLandCoverDataModule(**arguments(root))
    settings: dict[str, Any] = {
        'max_epochs': 1,
        'limit_train_batches': 1,
        'limit_val_batches': 2,
        'limit_test_batches': 1,
        'accelerator': 'cpu',
        'enable_checkpointing': False,
        'enable_progress_bar': False,
        'enable_model_summary': False,
        'num_sanity_val_steps': 0,
    }
    trainer = Trainer(**settings, logger=TensorBoardLogger(tmp_path))
    with patch.object(SummaryWriter, 'add_figure') as add_figure:
        trainer.fit(task, datamodule=datamodule)
    assert [call.args[0] for call in add_figure.call_args_list] == ['image/0', 'image/1']
    figure: Figure = add_figure.call_args.args[1]
    assert 'label: ' in figure.get_suptitle()
    results = trainer.test(task, datamodule=datamodule, verbose=False)
    assert torch.isfinite(torch.tensor(results[0]['test_loss']))


def test_it_is_built_from_yaml(root: Path, tmp_path: Path) -> None:
    config = {
        'trainer': {'logger': False, 'accelerator': 'cpu'},
        'model': {
            'class_path': 'torchgeo.tasks.Classification',
            'init_args': {'model': 'resnet18', 'in_channels': 2, 'num_classes': 8},
        },
        'data': {
            'class_path': 'geofm.datamodules.landcover.SampleLandCoverDataModule',
            'init_args': {'paths': str(root), 'window': 16, 'bands': ['VV', 'VH']},
            'dict_kwargs': {'dates': 'clear'},
        },
    }
    path = tmp_path / 'config.yaml'
    path.write_text(json.dumps(config))  # JSON is YAML
    cli = LightningCLI(
        BaseTask,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        run=False,
        args=['--config', str(path)],
    )
    cli.datamodule.setup('validate')
    dataset = cli.datamodule.val_dataset
    assert (dataset.window, dataset.bands, dataset.dates) == (16, ('VV', 'VH'), 'clear')
    assert cli.datamodule.mean.shape == (2,)
