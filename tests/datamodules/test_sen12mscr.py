from pathlib import Path

import pytest
import torch

from geofm.datamodules import SEN12MSCRDataModule
from tests.datasets.test_sen12mscr import write_patch
from tests.datasets.tree import SIZE, grid_at
from tests.tasks.test_dinov2 import small_task, small_trainer


@pytest.fixture(scope='module')
def tree(module_path: Path) -> str:
    for roi in (36, 19):
        for patch in range(4):
            grid = grid_at(32632, 500_000 + 1000 * roi + 160 * patch, 5_300_000)
            kinds = ('s1', 's2', 's2_cloudy')
            write_patch(module_path, 'ROIs1868_summer', roi, patch, grid, kinds)
    return str(module_path)


def test_samples_with_clear_and_cloudy_skies(tree: str) -> None:
    for sky, pairs in (('clear', 4), ('cloudy', 4), ('both', 8)):
        datamodule = SEN12MSCRDataModule(tree, 2, sky=sky)  # type: ignore[arg-type]
        datamodule.setup('fit')
        loader = datamodule.train_dataloader()
        assert sum(len(batch['image']) for batch in loader) == pairs
        assert next(iter(loader))['image'].shape == (2, 15, SIZE, SIZE)


def test_pretrain_on_clear_and_cloudy_views(tree: str, tmp_path: Path) -> None:
    datamodule = SEN12MSCRDataModule(tree, 2, n_dates=2, patch_size=24)
    trainer = small_trainer(tmp_path, max_steps=2)
    trainer.fit(small_task(), datamodule=datamodule)
    assert trainer.global_step == 2
    assert torch.isfinite(trainer.callback_metrics['train_loss'])
    datamodule.setup('fit')
    batch = next(iter(datamodule.train_dataloader()))
    assert batch['image'].shape == (2, 2, 15, 24, 24)
    assert len(datamodule.train_dataloader()) == 2
