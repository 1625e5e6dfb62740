"""Warnings of values in another unit in the first training batches."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from geofm.commands.data import index
from geofm.commands.stats import stats
from geofm.datamodules import NamedBandsDataModule, SEN12MSCRTSDataModule
from geofm.datasets import NamedBands
from geofm.sen12ms import PairKey
from geofm.sensors import SENTINEL2
from geofm.units import UnitWarning
from tests.datasets.tree import SIZE, grid_at, random_pixels, write_pair, write_raster


class Task(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return batch['image'].mean() * self.weight

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Images(Dataset[dict[str, Tensor]]):
    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(8, 13, 16, 16, generator=generator) * 4000 + 100
        images[:, 10] = 20
        self.images = change(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {'image': self.images[index]}


def said_in_training(data: LightningDataModule, folder: Path) -> list[str]:
    trainer = Trainer(
        max_epochs=2, accelerator='cpu', logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        trainer.fit(Task(), data)
    return [str(w.message) for w in caught if issubclass(w.category, UnitWarning)]


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (lambda x: x, []),
        (lambda x: x / 1e4, ['reflectance']),
        (lambda x: x + 1000, ['baseline 04.00']),
    ],
    ids=['DN', 'reflectance', 'offset'],
)
def test_any_data_set(tmp_path: Path, change: Callable[[Tensor], Tensor], said: list[str]) -> None:
    data = NamedBandsDataModule(
        list(SENTINEL2.band_names), train_dataset=Images(change), batch_size=4
    )
    found = said_in_training(data, tmp_path)
    assert len(found) == len(said)
    assert all(part in text for part, text in zip(said, found, strict=True))


@pytest.fixture
def shifted(tmp_path: Path) -> Path:
    """Four pairs with the offset of processing baseline 04.00 in Sentinel-2."""
    root = tmp_path / 'tree'
    for patch in range(4):
        grid = grid_at(32632, 500_000 + 10 * SIZE * patch, 5_300_000)
        _, s2 = write_pair(root, PairKey('ROIs1868', 36, patch, 0), grid)
        write_raster(s2, random_pixels('s2', grid, patch).astype(np.uint16) + np.uint16(1000), grid)
    return root


def test_pairs(shifted: Path) -> None:
    data = SEN12MSCRTSDataModule(str(shifted), batch_size=2, patch_size=16)
    (said,) = said_in_training(data, shifted)
    assert 'SEN12MSCRTSDataModule: values of Sentinel-2 Level-1C (mostly ' in said


def test_index_and_stats(shifted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UnitWarning, match=r'4 of 4 files.*baseline 04\.00'):
        index(shifted)
    printed = capsys.readouterr().out
    assert 'that do not name their bands are assumed to have B01 B02 B03' in printed
    assert 'assumed to have VV VH, in this order' in printed
    with pytest.warns(UnitWarning, match=r'tree: values of Sentinel-2.*baseline 04\.00'):
        stats(shifted, tmp_path / 'stats.yaml')


def test_values_that_no_sensor_measures_are_not_valid() -> None:
    def damage(images: Tensor) -> Tensor:
        images[0, 3, 5, 6], images[0, 4, 7, 8], images[0, 2, 1, 1] = 3e38, -9999, torch.nan
        return images

    valid = NamedBands(Images(damage), SENTINEL2.band_names)[0]['valid']
    assert (~valid).nonzero().tolist() == [[1, 1], [5, 6], [7, 8]]
