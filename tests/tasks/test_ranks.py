"""Two ranks with half a batch each do what one does with all of it."""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import DataLoader

from geofm.callbacks import CollapseWatch, OnlineKNN
from geofm.tasks import DINOv2
from geofm.tasks.randomness import seeded
from geofm.transforms import Crops
from tests.pairs import RandomPairs, RandomPairsDataModule
from tests.ranks import as_rank
from tests.tasks.test_dinov2 import SMALL, small_trainer

IMAGES, STEPS, RANKS = 8, 3, 2

#: How the patches are masked: half of the crops; those of the first rank only; in one sensor only;
#: none at all.
MASKS: dict[str, dict[str, Any]] = {
    'half': {},
    'first rank': {'separate_ibot_head': True},
    'one sensor': {'one_sensor_masks': 0.5, 'sensor_dropout': 0.5},
    'none': {'mask_probability': 0.0},
}
FUSIONS = ('linear', 'xattn', 'early', 'joint')
SETTINGS = [
    (centering, fusion, masks)
    for centering, fusion, masks in itertools.product(('ema', 'sinkhorn_knopp'), FUSIONS, MASKS)
    # Early fusion has no patches of one sensor.
    if (fusion, masks) != ('early', 'one sensor')
]


class SameDraws(DINOv2):
    """Draws for the whole batch and takes the part of its rank, so that ranks do not matter."""

    masks_of = 'half'

    def _part(self, rows: Tensor) -> Tensor:
        """Rows of this rank's images, of rows that are crop-major."""
        size = IMAGES // self.trainer.world_size
        first = self.global_rank * size
        return rows.unflatten(0, (-1, IMAGES))[:, first : first + size].flatten(0, 1)

    def losses(
        self, batch: Any, temperature: float, update_centers: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        make_crops: Callable[[Any], Crops] = type(self.multi_crop).forward.__get__(self.multi_crop)
        self.multi_crop.forward = lambda batch: self._crops(make_crops)  # type: ignore[method-assign]
        return super().losses(batch, temperature, update_centers)

    def _crops(self, make_crops: Callable[[Any], Crops]) -> Crops:
        with seeded(self.global_step, self.device):
            images = [RandomPairs(IMAGES)[i] for i in range(IMAGES)]
            crops = make_crops(torch.utils.data.default_collate(images))
        masks = crops.masks
        if self.masks_of == 'first rank':
            masks = masks.unflatten(0, (2, IMAGES)).clone()
            masks[:, IMAGES // 2 :] = False
            masks = masks.flatten(0, 1)
        crops = replace(crops, masks=masks)
        parts = {f.name: getattr(crops, f.name) for f in fields(crops) if f.name != 'masked'}
        parts = {k: v if v is None else self._part(v) for k, v in parts.items()}
        return Crops(**parts, masked=parts['masks'].flatten().nonzero().flatten())

    def _drop_sensors(self, crops: int) -> Tensor | None:
        with seeded(self.global_step, self.device):
            seen = super()._drop_sensors(crops * self.trainer.world_size)
        return None if seen is None else self._part(seen)

    def _hidden(self, crops: Crops) -> Tensor:
        if not self.hparams['one_sensor_masks']:
            return super()._hidden(crops)
        with seeded(self.global_step, self.device):
            every = torch.ones(2 * IMAGES, crops.masks.shape[1], dtype=torch.bool)
            return crops.masks[:, None] & self._part(super()._hidden(replace(crops, masks=every)))


class Keep(Callback):
    """Losses, and the gradient of the student before it is clipped, of each step."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        found = [p.grad for p in pl_module.parameters() if p.requires_grad]
        # Without a rank that masks anything, nothing is learned of masked patches.
        self.gradients.append(torch.cat([g.flatten() for g in found if g is not None]).clone())

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        names = ('train_loss', 'train_dino', 'train_ibot', 'train_koleo')
        self.losses.append(torch.stack([trainer.callback_metrics[name] for name in names]))


def train(setting: tuple[str, str, str], path: Path, ranks: int) -> dict[str, Any]:
    """Three steps; on several ranks, this process is one of them."""
    centering, fusion, masks = setting
    seed_everything(0, verbose=False)
    kwargs: dict[str, Any] = {
        **SMALL,
        'model': f'geofm_vit_tiny_patch16_{fusion}',
        'centering': centering,
        'koleo_gather': True,
        'drop_path_rate': 0.0,
        'warmup_epochs': 0,
        'freeze_last_layer_epochs': 0,
        'warmup_teacher_temperature_epochs': 0,
        **MASKS[masks],
    }
    task = SameDraws(**kwargs)
    task.masks_of = masks
    keep = Keep()
    callbacks: list[Callback] = [keep, CollapseWatch()]
    if setting in SETTINGS[:2]:
        # Five batches of training and three of validation to be shared out; or one of each, so that
        # the second rank has none.
        size = 2 if setting == SETTINGS[0] else 10
        callbacks.append(OnlineKNN(RandomPairsDataModule(size, 10), k=(1, 3)))
    strategy: Any = DDPStrategy(gradient_as_bucket_view=True) if ranks > 1 else 'auto'
    trainer = small_trainer(
        path,
        max_epochs=1,
        devices=ranks,
        strategy=strategy,
        callbacks=callbacks,
        limit_val_batches=0,
        enable_checkpointing=False,
    )
    loader = DataLoader(RandomPairs(IMAGES * STEPS), batch_size=IMAGES // ranks)
    trainer.fit(task, loader)
    watched = {k: v for k, v in trainer.callback_metrics.items() if k[:3] in ('col', 'knn')}
    return {
        'losses': torch.stack(keep.losses),
        'gradients': keep.gradients,
        'state': {k: v.clone() for k, v in task.state_dict().items()},
        'watched': watched,
    }


def work(rank: int, path: Path, port: int) -> None:
    """What a rank does: all settings one after another."""
    torch.set_num_threads(1)
    as_rank(rank, RANKS, port)
    found = [train(setting, path, RANKS) for setting in SETTINGS]
    torch.save(found, path / f'{rank}.pt')
    dist.destroy_process_group()


def apart(found: Tensor, expected: Tensor) -> float:
    """Relative difference of two vectors."""
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.usefixtures('one_thread')
def test_two_ranks_are_one(tmp_path: Path) -> None:
    """For every centring, fusion and kind of mask: losses, gradients, weights, what is watched."""
    alone = [train(setting, tmp_path, 1) for setting in SETTINGS]
    start_processes(work, (tmp_path, find_free_network_port()), nprocs=RANKS, start_method='fork')
    ranks = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(RANKS)]
    for setting, expected, *found in zip(SETTINGS, alone, *ranks, strict=True):
        losses = torch.stack([part['losses'] for part in found]).mean(dim=0)
        for step in range(STEPS):
            of_loss = apart(losses[step], expected['losses'][step])
            of_gradient = apart(found[0]['gradients'][step], expected['gradients'][step])
            assert max(of_loss, of_gradient) < 1e-5, (setting, step, of_loss, of_gradient)
        first, second = (part['state'] for part in found)
        assert all(torch.equal(first[key], second[key]) for key in first), setting
        for name in ('student', 'model', 'teacher_heads', 'dino_center', 'ibot_center'):
            # One vector: AdamW makes steps of what is rounding alone, as in the bias of the keys.
            keys = [key for key in first if key.startswith(f'{name}.')]
            vectors = [
                torch.cat([s[k].flatten() for k in keys])
                for s in (first, expected['state'])
                if keys
            ]
            assert not keys or apart(*vectors) < 1e-3, (setting, name)
        for key, value in expected['watched'].items():
            of_rank = float(found[0]['watched'][key])
            assert of_rank == pytest.approx(float(value), rel=1e-3), (setting, key)
    assert all('knn/top1_k3' in of['watched'] for of in alone[:2])
