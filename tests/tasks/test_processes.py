"""Training on several processes, and in half precision."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from torchgeo.tasks import Classification, SemanticSegmentation

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
    """Save the final state of a process, or the weights whose names end as given."""

    def __init__(self, folder: Path, end: str = '') -> None:
        self.folder, self.end = folder, end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state = {k: v for k, v in pl_module.state_dict().items() if k.endswith(self.end)}
        torch.save(state, self.folder / f'{trainer.global_rank}.pt')


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


class PartsModule(RandomPairsDataModule):
    """Pairs with some bands only, and with or without dates."""

    def __init__(self, channels: slice, dates: bool) -> None:
        super().__init__()
        self.channels, self.dates = channels, dates

    def _loader(self, dataset: Any) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(dataset, batch_size=self.batch_size, collate_fn=self.part)

    def part(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = torch.utils.data.default_collate(samples)
        image = batch['image'][:, self.channels]
        return {'image': image, **({'dates': batch['dates']} if self.dates else {})}


def freeze_half(task: LightningModule) -> None:
    """Train only the fusion and one block of each ViT."""
    for name, parameter in task.student['backbone'].named_parameters():  # type: ignore[index, union-attr]
        parameter.requires_grad_('.blocks.1.' in name or 'fusion' in name)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize(
    ('variant', 'data'),
    [('linear', 'no dates'), ('linear', 's2 only'), ('early', 's2 only'), ('linear', 'frozen')],
)
def test_every_parameter_takes_part(tmp_path: Path, variant: str, data: str) -> None:
    """Training works without dates or a sensor, and with a partly frozen backbone."""
    alone: list[dict[str, Tensor]] = []
    together: list[dict[str, Tensor]] = []
    channels = slice(2, None) if data == 's2 only' else slice(None)
    for devices, states in ((1, alone), (2, together)):
        seed_everything(0)
        task = small_task(
            model=f'geofm_vit_tiny_patch16_{variant}',
            in_channels=13 if data == 's2 only' else 15,
            koleo_weight=0.0,
            scale_lr=False,
            lr=1e-3,
        )
        if data == 'frozen':
            freeze_half(task)
        states.append({k: v.clone() for k, v in task.state_dict().items()})
        trainer = small_trainer(
            tmp_path,
            max_epochs=2,
            limit_train_batches=1,
            devices=devices,
            strategy='ddp_fork' if devices == 2 else 'auto',
            enable_checkpointing=False,
            limit_val_batches=0,
            callbacks=[KeepWeights(tmp_path)],
        )
        trainer.fit(task, datamodule=PartsModule(channels, dates=data == 's2 only'))
        states += [torch.load(tmp_path / f'{i}.pt', weights_only=True) for i in range(devices)]
    start, first, second = together
    assert all(torch.equal(first[key], second[key]) for key in first)
    moved = {key for key, value in first.items() if not torch.equal(value, start[key])}
    # The same parameters learn as in one process.
    assert moved == {key for key, value in alone[1].items() if not torch.equal(value, start[key])}
    absent = {key for key in first if key.startswith('student.backbone.encoders.s1')}
    assert absent.isdisjoint(moved) == (data == 's2 only' or not absent)
    assert ('student.backbone.stand_in' in moved) == (data == 's2 only' and variant != 'early')


class LabelledModule(PartsModule):
    """Pairs without dates, with a label or a mask of it."""

    def __init__(self, dense: bool) -> None:
        super().__init__(slice(None), dates=False)
        self.dense = dense

    def part(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        labels = torch.stack([sample['label'] for sample in samples])
        mask = labels[:, None, None].repeat(1, 32, 32)
        return super().part(samples) | ({'mask': mask} if self.dense else {'label': labels})


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('dense', [False, True])
def test_backbone_trains_in_other_tasks(tmp_path: Path, dense: bool) -> None:
    """A TorchGeo task needs no dates, masks or missing-sensor tokens."""
    kwargs: dict[str, Any] = {'in_channels': 15, 'num_classes': 2}
    name = 'geofm_vit_nano_patch16_linear'
    if dense:
        segmentation = SemanticSegmentation('dpt', f'tu-{name}', **kwargs)
        task: LightningModule = segmentation
    else:
        task = Classification(name, **kwargs)
    before = {k: v.clone() for k, v in task.state_dict().items()}
    trainer = small_trainer(
        tmp_path,
        max_epochs=1,
        limit_train_batches=2,
        devices=2,
        strategy='ddp_fork',
        enable_checkpointing=False,
        limit_val_batches=1,
        callbacks=[KeepWeights(tmp_path, 'qkv.weight')],
    )
    trainer.fit(task, datamodule=LabelledModule(dense))
    first, second = (torch.load(tmp_path / f'{i}.pt', weights_only=True) for i in range(2))
    assert first
    for key in first:
        assert torch.equal(first[key], second[key])
        assert not torch.equal(first[key], before[key])


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
