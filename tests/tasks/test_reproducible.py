"""Runs with the same seed and data give the same numbers, with geofm's data module."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from geofm.datamodules import SEN12MSCRTSDataModule
from geofm.sen12ms import PairKey
from geofm.tasks import DINOv2
from tests.datasets.tree import grid_at, write_pair
from tests.tasks.test_dinov2 import Record, small_task, small_trainer

#: Pairs, and how many a step takes: seven steps an epoch.
PAIRS, BATCH = 14, 2


@pytest.fixture(scope='module')
def tree(module_path: Path) -> Path:
    for patch in range(PAIRS):
        key = PairKey('ROIs1868', 36, patch, 0)
        write_pair(module_path, key, grid_at(4326, 7 + patch / 100, 47.5, size=48))
    return module_path


class StopAt(Callback):
    """Save and stop a run after some steps, anywhere in an epoch."""

    def __init__(self, step: int, checkpoint: Path) -> None:
        self.step, self.checkpoint = step, checkpoint

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.checkpoint)
            trainer.should_stop = True


def run(
    tree: Path, path: Path, workers: int = 0, seed: int = 3, **kwargs: Any
) -> tuple[list[float], DINOv2]:
    """Compute the losses of a run of two epochs with all random augmentations."""
    seed_everything(seed)
    record, task = Record(), small_task(drop_path_rate=0.3, sensor_dropout=0.3)
    datamodule = SEN12MSCRTSDataModule(str(tree), BATCH, workers, patch_size=32)
    callbacks = [record, *kwargs.pop('callbacks', [])]
    trainer = small_trainer(path, max_epochs=2, callbacks=callbacks, limit_val_batches=0)
    trainer.fit(task, datamodule=datamodule, **kwargs)
    return record.losses, task


@pytest.fixture(scope='module')
def unbroken(tree: Path, module_path: Path) -> tuple[list[float], DINOv2]:
    return run(tree, module_path / 'unbroken')


def test_two_runs_are_equal_to_the_bit(
    tree: Path, tmp_path: Path, unbroken: tuple[list[float], DINOv2]
) -> None:
    first, one = unbroken
    # Who else draws from the process's generator, or how many workers read, changes nothing.
    torch.rand(7)
    second, two = run(tree, tmp_path / 'b', workers=2)
    assert len(first) == 2 * PAIRS // BATCH
    assert second == first
    states = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    other, _ = run(tree, tmp_path / 'c', seed=4)
    assert other != first


@pytest.mark.parametrize('step', [4, 7, 9])
def test_resumed_run_equals_an_unbroken_one_to_the_bit(
    tree: Path, tmp_path: Path, step: int, unbroken: tuple[list[float], DINOv2]
) -> None:
    """Interrupt a run within an epoch, at its end, and within the next."""
    whole, task = unbroken
    checkpoint = tmp_path / 'half.ckpt'
    before, _ = run(tree, tmp_path / 'half', callbacks=[StopAt(step, checkpoint)])
    assert before[:step] == whole[:step]
    # A resumed run is a new process, with other numbers drawn before it.
    after, resumed = run(tree, tmp_path / 'rest', seed=99, ckpt_path=checkpoint, weights_only=True)
    assert after == whole[step:]
    states = zip(task.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
