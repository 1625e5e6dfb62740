"""Training on several processes, and in half precision."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from tests.pairs import RandomPairsDataModule
from tests.tasks.test_dinov2 import Record, small_task, small_trainer

EVERYTHING: dict[str, Any] = {
    'sensor_dropout': 0.3,
    'one_sensor_masks': 0.5,
    'gram_weight': 2.0,
    'centering': 'sinkhorn_knopp',
}
XATTN: dict[str, Any] = {
    'model': 'geofm_vit_tiny_patch16_xattn',
    'global_sensors': ['s1', 's2'],
    'grad_checkpointing': True,
}


class KeepWeights(Callback):
    """Keep what a process ends with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(pl_module.state_dict(), self.folder / f'{trainer.global_rank}.pt')


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('kwargs', [{}, EVERYTHING, XATTN], ids=['plain', 'everything', 'xattn'])
def test_processes_stay_in_step(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    """Student, teacher, heads and centres of two processes are the same after two epochs."""
    seed_everything(0)
    task = small_task(**kwargs)
    before = task.state_dict()['model.mask_token'].clone()
    trainer = small_trainer(
        tmp_path,
        max_epochs=2,
        devices=2,
        strategy='ddp_fork',
        enable_checkpointing=False,
        callbacks=[KeepWeights(tmp_path)],
    )
    trainer.fit(task, datamodule=RandomPairsDataModule())
    first, second = (torch.load(tmp_path / f'{i}.pt', weights_only=True) for i in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first['model.mask_token'], before)


@pytest.mark.parametrize('kwargs', [{}, EVERYTHING, XATTN], ids=['plain', 'everything', 'xattn'])
def test_it_trains_in_half_precision(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    losses = {}
    for precision in ('32-true', 'bf16-mixed'):
        seed_everything(0)
        record = Record()
        trainer = small_trainer(
            tmp_path, max_epochs=2, precision=precision, callbacks=[record], limit_val_batches=0
        )
        trainer.fit(small_task(**kwargs), datamodule=RandomPairsDataModule())
        losses[precision] = torch.tensor(record.losses)
    # The same crops and masks: only rounding differs, of three digits in the logits.
    torch.testing.assert_close(losses['bf16-mixed'], losses['32-true'], rtol=0.05, atol=0)
