import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from rasterio.crs import CRS
from rasterio.transform import Affine
from torch import Tensor, nn
from torchgeo.datamodules import (
    BigEarthNetDataModule,
    EuroSATDataModule,
    GeoDataModule,
    SSL4EOS12DataModule,
)
from torchgeo.datasets import SSL4EOS12, EuroSAT, SatlasPretrain

from geofm.cli import main
from geofm.datamodules import NamedBandsDataModule
from geofm.datasets import SEN12MSCRTS
from geofm.grid import Grid
from geofm.models import create_backbone
from geofm.sen12ms import PairKey
from geofm.sensors import BANDS, SENTINEL2, BandError, band_statistics
from tests.datasets.tree import grid_at, write_pair, write_raster
from tests.tasks.test_dinov2 import SMALL, small_task, small_trainer

S2 = SENTINEL2.band_names
EUROSAT = [*(band for band in S2 if band != 'B8A'), 'B8A']
BIGEARTHNET = ['VH', 'VV', *(band for band in S2 if band != 'B10')]
SATLAS = ['B04', 'B03', 'B02', 'B05', 'B06', 'B07', 'B08', 'B11', 'B12']
CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'pretrain'


@pytest.fixture(scope='module')
def eurosat(module_path: Path) -> str:
    """Four images for training and two for validation, in the layout of TorchGeo's EuroSAT."""
    rng = np.random.default_rng(0)
    grid = Grid(CRS.from_epsg(32632), Affine(10, 0, 0, 0, -10, 0), 64, 64)
    names = [f'Forest_{i}' for i in range(6)]
    for name in names:
        pixels = rng.integers(500, 5000, (13, 64, 64), dtype='uint16')
        write_raster(module_path / EuroSAT.base_dir / 'Forest' / f'{name}.tif', pixels, grid)
    for split, part in (('train', names[:4]), ('val', names[4:]), ('test', names[4:])):
        (module_path / f'eurosat-{split}.txt').write_text('\n'.join(f'{name}.jpg' for name in part))
    return str(module_path)


@pytest.fixture
def ssl4eo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two places with two acquisitions each, in the layout of TorchGeo's SSL4EOS12."""
    rng = np.random.default_rng(0)
    grid = Grid(CRS.from_epsg(32632), Affine(10, 0, 0, 0, -10, 0), 33, 33)
    for place in range(2):
        for month in ('03', '09'):
            folder = tmp_path / 's2c' / f'{place:07}' / f'2020{month}01T103021_2020_T32TQM'
            for band in SSL4EOS12.metadata['s2c']['bands']:
                pixels = rng.integers(500, 5000, (1, 33, 33), dtype='uint16')
                write_raster(folder / f'{band}.tif', pixels, grid)
    # The original has a constant length.
    monkeypatch.setattr(SSL4EOS12, '__len__', lambda _: 2)
    return str(tmp_path)


class Spy(LightningModule):
    """Model that keeps its inputs."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.weight = nn.Parameter(torch.zeros(()))
        self.batches: list[dict[str, Tensor]] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.batches.append(batch)
        return batch['image'].mean() * self.weight

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.batches.append(batch)

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def pretrain(path: Path, datamodule: NamedBandsDataModule, **kwargs: Any) -> Trainer:
    """Train for two steps."""
    trainer = small_trainer(path, max_steps=2, limit_val_batches=1)
    trainer.fit(small_task(**kwargs), datamodule=datamodule)
    assert trainer.global_step == 2
    return trainer


# -- input of the model ---------------------------------------------------------------------------


def test_model_gets_its_own_bands_normalised(eurosat: str, tmp_path: Path) -> None:
    source = EuroSATDataModule(batch_size=2, root=eurosat)

    def no_augmentation(batch: Any) -> Any:
        raise AssertionError('the augmentation of the data module that is wrapped')

    source.aug = source.train_aug = source.val_aug = no_augmentation
    bands = ('B8A', 'B04', 'B01')
    model = create_backbone({**SMALL, 'in_channels': 3, 'bands': bands})
    spy = Spy(model)
    datamodule = NamedBandsDataModule(EUROSAT, source)
    small_trainer(tmp_path).validate(spy, datamodule, verbose=False)
    raw = EuroSAT(eurosat, 'val', bands)
    (batch,) = spy.batches
    mean, std = (v.view(3, 1, 1) for v in band_statistics(bands))
    for i in range(2):
        torch.testing.assert_close(batch['image'][i], (raw[i]['image'] - mean) / std)
    assert batch['valid'].all()
    assert batch['label'].shape == (2,)
    assert datamodule.bands == bands
    assert torch.equal(datamodule.mean, mean.flatten())


def test_statistics_given_by_the_user(eurosat: str) -> None:
    datamodule = NamedBandsDataModule(
        EUROSAT, EuroSATDataModule(root=eurosat), mean={'B8A': 7.0}, std={'B01': 9.0}
    )
    mean, std = band_statistics(S2)
    assert datamodule.mean.tolist() == [
        7.0 if b == 'B8A' else m for b, m in zip(S2, mean.tolist(), strict=True)
    ]
    assert datamodule.std.tolist() == [
        9.0 if b == 'B01' else s for b, s in zip(S2, std.tolist(), strict=True)
    ]


def test_errors_name_missing_bands(eurosat: str, tmp_path: Path) -> None:
    source = EuroSATDataModule(root=eurosat)
    datamodule = NamedBandsDataModule(EUROSAT, source)
    with pytest.raises(BandError, match=r"missing bands \['VV', 'VH'\]"):
        pretrain(tmp_path, datamodule)
    with pytest.raises(BandError, match=r"missing bands \['VV'\]"):
        NamedBandsDataModule(EUROSAT, source, bands=['VV', 'B04'])
    with pytest.raises(BandError, match=r"bands \['B04'\] requested, but the model has"):
        pretrain(tmp_path, NamedBandsDataModule(EUROSAT, source, bands=['B04']))
    with pytest.raises(BandError, match=r"mean or std of \['VV'\]"):
        NamedBandsDataModule(EUROSAT, source, mean={'VV': 1.0})


def test_either_a_data_module_or_data_sets(eurosat: str) -> None:
    source, dataset = EuroSATDataModule(root=eurosat), EuroSAT(eurosat)
    both: dict[str, Any] = {'datamodule': source, 'train_dataset': dataset}
    for arguments in ({}, both):
        with pytest.raises(ValueError, match='either a datamodule or a train_dataset'):
            NamedBandsDataModule(EUROSAT, **arguments)
    with pytest.raises(ValueError, match='val_dataset does not apply'):
        NamedBandsDataModule(EUROSAT, source, val_dataset=dataset)


def test_batch_size_and_workers_are_those_of_the_data_module(eurosat: str) -> None:
    source = EuroSATDataModule(batch_size=3, num_workers=2, root=eurosat)
    inherited = NamedBandsDataModule(EUROSAT, source)
    assert (inherited.batch_size, inherited.num_workers) == (3, 2)
    given = NamedBandsDataModule(EUROSAT, source, batch_size=5, num_workers=0)
    assert (given.batch_size, given.num_workers) == (5, 0)


def test_data_module_that_samples_places(tmp_path: Path) -> None:
    """The samplers of a GeoDataModule are used."""
    for patch in range(3):
        write_pair(
            tmp_path, PairKey('ROIs1868', 36, patch, 0), grid_at(4326, 7 + patch / 100, 47.5)
        )
    write_pair(tmp_path, PairKey('ROIs2017', 22, 0, 0), grid_at(4326, 9, 47.5))
    source = GeoDataModule(SEN12MSCRTS, 2, 16, 4, paths=tmp_path)
    spy = Spy()
    datamodule = NamedBandsDataModule(list(BANDS), source, bands=['B02', 'VV'])
    small_trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(spy, datamodule)
    assert [batch['image'].shape for batch in spy.batches] == [(2, 2, 16, 16)] * 2
    spy.batches.clear()
    small_trainer(tmp_path).validate(spy, datamodule, verbose=False)
    raw = SEN12MSCRTS(tmp_path, 'val', bands=('B02', 'VV'))[0]
    mean, std = (v.view(2, 1, 1) for v in band_statistics(('B02', 'VV')))
    expected = ((raw['image'] - mean) / std).clamp(-5, 5)
    for batch in spy.batches:
        for image, valid, transform in zip(
            batch['image'], batch['valid'], batch['transform'], strict=True
        ):
            offset = (transform - raw['transform'])[[2, 5]] / raw['transform'][[0, 4]]
            col, row = (round(v) for v in offset.tolist())
            window = torch.zeros_like(image)
            height, width = image.shape[1:]
            part = expected[:, row : row + height, col : col + width]
            window[:, : part.shape[1], : part.shape[2]] = part
            torch.testing.assert_close(image * valid, window * valid)
            assert valid.any()


# -- pretraining ----------------------------------------------------------------------------------


def test_pretrain_on_a_data_module(eurosat: str, tmp_path: Path) -> None:
    source = EuroSATDataModule(batch_size=2, root=eurosat)
    trainer = pretrain(
        tmp_path,
        NamedBandsDataModule(EUROSAT, source),
        model='geofm_vit_tiny_patch16_s2',
        in_channels=13,
    )
    assert 'val_loss' in trainer.callback_metrics


def test_pretrain_on_a_data_set(eurosat: str, tmp_path: Path) -> None:
    datamodule = NamedBandsDataModule(
        SATLAS, train_dataset=EuroSAT(eurosat, bands=SATLAS), batch_size=2
    )
    trainer = pretrain(
        tmp_path, datamodule, model='geofm_vit_tiny_patch16_s2', in_channels=9, bands=SATLAS
    )
    assert 'val_loss' not in trainer.callback_metrics


def test_pretrain_on_two_seasons(ssl4eo: str, tmp_path: Path) -> None:
    source = SSL4EOS12DataModule(batch_size=2, root=ssl4eo, seasons=2)
    datamodule = NamedBandsDataModule(list(S2), source, n_dates=2)
    pretrain(tmp_path, datamodule, model='geofm_vit_tiny_patch16_s2', in_channels=13)
    datamodule.setup('fit')
    batch = next(iter(datamodule.train_dataloader()))
    assert batch['image'].shape == (2, 2, 13, 264, 264)


def test_pretrain_on_bigearthnet(shared_data: Path, tmp_path: Path) -> None:
    root = str(shared_data / 'torchgeo' / 'bigearthnet' / 'v1')
    source = BigEarthNetDataModule(batch_size=2, root=root, bands='all')
    bands = ['VV', 'VH', *BIGEARTHNET[2:]]
    pretrain(tmp_path, NamedBandsDataModule(BIGEARTHNET, source), in_channels=14, bands=bands)


def test_pretrain_on_satlas(shared_data: Path, tmp_path: Path) -> None:
    root = str(shared_data / 'torchgeo' / 'satlas')
    dataset = SatlasPretrain(root, images=['sentinel2'], labels=[])
    datamodule = NamedBandsDataModule(
        {'image_sentinel2': SATLAS}, train_dataset=dataset, batch_size=2
    )
    model = {'model': 'geofm_vit_tiny_patch16_s2', 'in_channels': 9, 'bands': SATLAS}
    pretrain(tmp_path, datamodule, **model)


@pytest.mark.parametrize(
    ('config', 'key', 'data'),
    [
        ('eurosat', 'datamodule.dict_kwargs.root', 'eurosat'),
        ('bigearthnet', 'datamodule.dict_kwargs.root', 'bigearthnet/v1'),
        ('satlas_vitl16', 'train_dataset.init_args.root', 'satlas'),
        ('ssl4eos12', 'datamodule.dict_kwargs.root', None),
    ],
)
def test_configurations(
    config: str, key: str, data: str | None, shared_data: Path, ssl4eo: str, tmp_path: Path
) -> None:
    """`geofm fit` with each YAML file, a small model and the test data of TorchGeo."""
    root = ssl4eo if data is None else shared_data / 'torchgeo' / data
    small = {k: v for k, v in SMALL.items() if k != 'model'}
    arguments = [f'--model.init_args.{k}={json.dumps(v)}' for k, v in small.items()]
    main(
        [
            'fit',
            f'--config={CONFIGS / config}.yaml',
            f'--data.init_args.{key}={root}',
            '--data.init_args.batch_size=2',
            '--data.init_args.num_workers=0',
            f'--trainer.default_root_dir={tmp_path}',
            '--trainer.max_steps=2',
            '--trainer.limit_val_batches=1',
            '--trainer.accelerator=cpu',
            '--trainer.precision=32',
            '--trainer.enable_progress_bar=false',
            '--trainer.enable_model_summary=false',
            *arguments,
        ]
    )
    assert list(tmp_path.rglob('last.ckpt'))
