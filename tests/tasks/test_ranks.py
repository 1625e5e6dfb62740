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
from geofm.checkpoint_io import AtomicCheckpointIO
from geofm.losses.ranks import gathered
from geofm.models import export_backbone, load_backbone
from geofm.strategies import FullyShardedStrategy
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
CENTERINGS = ('ema', 'sinkhorn_knopp')
#: Every fusion with every kind of mask, and both with either centring.
SETTINGS = [
    (CENTERINGS[(i + j) % 2], fusion, masks)
    for (i, fusion), (j, masks) in itertools.product(enumerate(FUSIONS), enumerate(MASKS))
    # Early fusion has no patches of one sensor.
    if (fusion, masks) != ('early', 'one sensor')
]

#: Those that are also trained with sharded weights: every fusion, mask and centring.
SHARDED_MASKS = {'linear': 'half', 'xattn': 'first rank', 'early': 'none', 'joint': 'one sensor'}
SHARDED = [setting for setting in SETTINGS if SHARDED_MASKS[setting[1]] == setting[2]]
#: Those of them whose networks are built on the meta device first.
ON_META = ('xattn', 'joint')


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

    def _student_masks(self, crops: Crops) -> Tensor:
        if not self.hparams['one_sensor_masks']:
            return super()._student_masks(crops)
        with seeded(self.global_step, self.device):
            every = torch.ones(2 * IMAGES, crops.masks.shape[1], dtype=torch.bool)
            return crops.masks[:, None] & self._part(
                super()._student_masks(replace(crops, masks=every))
            )


class Keep(Callback):
    """Losses, and the gradient of the student before it is clipped, of each step.

    Args:
        checkpoint: Where to save one after two steps.
    """

    def __init__(self, checkpoint: Path | None = None) -> None:
        self.losses: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.checkpoint = checkpoint
        self.teacher: dict[str, Tensor] = {}

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        found = [p.grad for p in pl_module.parameters() if p.requires_grad]
        # Without a rank that masks anything, nothing is learned of masked patches.
        whole = [gathered(gradient).flatten() for gradient in found if gradient is not None]
        self.gradients.append(torch.cat(whole).clone())

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.checkpoint is not None and trainer.global_step == 2:
            trainer.save_checkpoint(self.checkpoint)
            model: Any = trainer.lightning_module.model
            self.teacher = {k: gathered(v).clone() for k, v in model.state_dict().items()}
        names = ('train_loss', 'train_dino', 'train_ibot', 'train_koleo')
        self.losses.append(torch.stack([trainer.callback_metrics[name] for name in names]))


def train(
    setting: tuple[str, str, str],
    path: Path,
    strategy: Any = 'auto',
    save: Path | None = None,
    resume: Path | None = None,
) -> dict[str, Any]:
    """Three steps; with a strategy for several ranks, this process is one of them."""
    ranks = 1 if strategy == 'auto' else RANKS
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
    sharded = isinstance(strategy, FullyShardedStrategy)
    with torch.device('meta' if sharded and fusion in ON_META else 'cpu'):
        task = SameDraws(**kwargs)
    task.masks_of = masks
    keep = Keep(save)
    callbacks: list[Callback] = [keep, CollapseWatch()]
    if setting in SETTINGS[:2] and resume is None:
        # Five batches of training and three of validation to be shared out; or one of each, so that
        # the second rank has none.
        size = 2 if setting == SETTINGS[0] else 10
        callbacks.append(OnlineKNN(RandomPairsDataModule(size, 10), k=(1, 3)))
    trainer = small_trainer(
        path,
        max_epochs=1,
        devices=ranks,
        strategy=strategy,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        limit_val_batches=0,
        enable_checkpointing=False,
    )
    loader = DataLoader(RandomPairs(IMAGES * STEPS), batch_size=IMAGES // ranks)
    trainer.fit(task, loader, ckpt_path=resume, weights_only=True)
    watched = {k: v for k, v in trainer.callback_metrics.items() if k[:3] in ('col', 'knn')}
    return {
        'losses': torch.stack(keep.losses),
        'gradients': keep.gradients,
        'state': {k: gathered(v).clone() for k, v in task.state_dict().items()},
        'watched': watched,
        'teacher': keep.teacher,
    }


def work(rank: int, path: Path, port: int) -> None:
    """What a rank does: all settings one after another."""
    torch.set_num_threads(1)
    as_rank(rank, RANKS, port)
    found = [
        train(setting, path, DDPStrategy(gradient_as_bucket_view=True)) for setting in SETTINGS
    ]
    for setting in SHARDED:
        save = path / 'sharded.ckpt' if setting == SHARDED[0] else None
        found.append(train(setting, path, FullyShardedStrategy(), save))
    found += [
        train(SHARDED[0], path, FullyShardedStrategy(), resume=path / f'{resume}.ckpt')
        for resume in ('sharded', 'alone')
    ]
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


def state_apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative difference of a network, as one vector.

    AdamW makes steps of what is rounding alone, as in the bias of the keys.
    """
    differences = [0.0]
    for name in ('student', 'model', 'teacher_heads', 'dino_center', 'ibot_center'):
        keys = [key for key in found if key.startswith(f'{name}.')]
        vectors = [torch.cat([s[k].flatten() for k in keys]) for s in (found, expected) if keys]
        differences += [apart(*vectors)] if keys else []
    return max(differences)


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.usefixtures('one_thread')
def test_two_ranks_are_one(tmp_path: Path) -> None:
    """For every fusion with every kind of mask: losses, gradients, weights, what is watched.

    Weights are sharded or not; sharded checkpoints are those that one process would have written.
    """
    saved = {name: tmp_path / f'{name}.ckpt' for name in ('alone', 'sharded')}
    alone = [
        train(setting, tmp_path, save=saved['alone'] if setting == SHARDED[0] else None)
        for setting in SETTINGS
    ]
    start_processes(work, (tmp_path, find_free_network_port()), nprocs=RANKS, start_method='fork')
    ranks = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in range(RANKS)]
    expected_of = dict(zip(SETTINGS, alone, strict=True))
    for setting, *found in zip([*SETTINGS, *SHARDED], *(of[:-2] for of in ranks), strict=True):
        expected = expected_of[setting]
        losses = torch.stack([part['losses'] for part in found]).mean(dim=0)
        for step in range(STEPS):
            of_loss = apart(losses[step], expected['losses'][step])
            of_gradient = apart(found[0]['gradients'][step], expected['gradients'][step])
            assert max(of_loss, of_gradient) < 1e-5, (setting, step, of_loss, of_gradient)
        first, second = (part['state'] for part in found)
        assert all(torch.equal(first[key], second[key]) for key in first), setting
        assert state_apart(first, expected['state']) < 1e-3, setting
        for key, value in expected['watched'].items():
            of_rank = float(found[0]['watched'][key])
            assert of_rank == pytest.approx(float(value), rel=1e-3), (setting, key)
    assert all('knn/top1_k3' in of['watched'] for of in alone[:2])

    # From shards to shards, from one file to shards, and from shards to one process.
    unbroken = expected_of[SHARDED[0]]['state']
    resumed = [of['state'] for of in ranks[0][-2:]]
    resumed.append(train(SHARDED[0], tmp_path, resume=saved['sharded'])['state'])
    assert [state_apart(state, unbroken) < 1e-5 for state in resumed] == [True] * 3
    teacher = ranks[0][len(SETTINGS)]['teacher']
    exported = export_backbone(saved['sharded'], tmp_path / 'torchgeo.pth', 'torchgeo').path
    for file in (saved['sharded'], exported):
        weights = load_backbone(file).state_dict()
        assert weights.keys() == teacher.keys()
        assert all(torch.equal(weights[key], teacher[key]) for key in teacher)
    assert state_apart(torch.load(saved['alone'], weights_only=True)['state_dict'], unbroken) > 1e-3
