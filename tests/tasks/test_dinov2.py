import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torchgeo.tasks.utils import extract_backbone

from geofm.models import load_backbone
from geofm.tasks import DINOv2
from tests.pairs import RandomPairs, RandomPairsDataModule

SMALL: dict[str, Any] = {
    'model': 'geofm_vit_tiny_patch16_linear',
    'model_args': {
        'embed_dim': 32,
        'depth': 2,
        'num_heads': 2,
        'patch_size': 8,
        'init_values': 1.0,
    },
    'global_size': 32,
    'local_size': 16,
    'n_local': 2,
    'prototypes': 64,
    'head_hidden_dim': 32,
    'head_bottleneck_dim': 16,
    'warmup_epochs': 1,
    'warmup_teacher_temperature_epochs': 2,
    'drop_path_rate': 0.1,
}


def small_task(**kwargs: Any) -> DINOv2:
    return DINOv2(**{**SMALL, **kwargs})


def small_trainer(path: Path, **kwargs: Any) -> Trainer:
    quiet = {'enable_progress_bar': False, 'enable_model_summary': False, 'logger': False}
    return Trainer(default_root_dir=path, accelerator='cpu', **{**quiet, **kwargs})


def batch(images: int = 4) -> dict[str, Tensor]:
    return torch.utils.data.default_collate([RandomPairs()[i] for i in range(images)])


class Record(Callback):
    """Callback that records each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.schedules: list[dict[str, float]] = []
        self.steps: list[int] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs['loss'].item())
        self.steps.append(trainer.global_step)
        optimizer: Any = trainer.optimizers[0]
        self.schedules.append(
            {f'{g["lr_mult"]}/{g["last_layer"]}': g['lr'] for g in optimizer.param_groups}
            | {
                f'wd/{g["lr_mult"]}/{g["wd_mult"]}': g['weight_decay']
                for g in optimizer.param_groups
            }
            | {k: float(v) for k, v in trainer.callback_metrics.items() if 'schedule' in k}
        )


@pytest.mark.parametrize(
    'kwargs',
    [
        {},
        {'model': 'geofm_vit_tiny_patch16_xattn', 'centering': 'sinkhorn_knopp'},
        {'model': 'geofm_vit_tiny_patch16_early', 'sensor_dropout': 0.5},
        {'separate_ibot_head': True, 'ibot_prototypes': 32, 'sensor_dropout': 0.5},
        {'n_local': 0, 'mask_probability': 0.0, 'koleo_weight': 0.0},
    ],
)
def test_it_trains(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    record = Record()
    task = small_task(**kwargs)
    before = {k: v.clone() for k, v in task.state_dict().items()}
    trainer = small_trainer(tmp_path, max_epochs=2, callbacks=[record])
    trainer.fit(task, datamodule=RandomPairsDataModule())
    assert len(record.losses) == 8
    assert torch.isfinite(torch.tensor(record.losses)).all()
    changed = {
        k.split('.')[0] for k, v in task.state_dict().items() if not torch.equal(v, before[k])
    }
    assert {'model', 'student', 'teacher_heads'} <= changed
    assert 'val_loss' in trainer.callback_metrics


def test_student_learns_from_a_teacher_that_stands_still(tmp_path: Path) -> None:
    seed_everything(0)
    record = Record()
    still = {
        'momentum': (1.0, 1.0),
        'teacher_temperature': (0.07, 0.07),
        'centering': 'sinkhorn_knopp',
    }
    task = small_task(**still, lr=1e-2)
    small_trainer(tmp_path, max_epochs=10, callbacks=[record], limit_val_batches=0).fit(
        task, datamodule=RandomPairsDataModule()
    )
    losses = torch.tensor(record.losses)
    assert losses[-8:].mean() < losses[:8].mean() - 0.1


def test_teacher_is_the_moving_average_of_the_student(tmp_path: Path) -> None:
    task = small_task(momentum=(0.9, 0.9))
    snapshots: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    class Snapshot(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, i: int) -> None:
            self.take()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.take()

        def take(self) -> None:
            teacher, student = task.model.state_dict(), task.student['backbone'].state_dict()
            snapshots.append(
                (
                    {k: v.clone() for k, v in teacher.items()},
                    {k: v.clone() for k, v in student.items()},
                )
            )

    trainer = small_trainer(tmp_path, max_epochs=1, callbacks=[Snapshot()], limit_val_batches=0)
    trainer.fit(task, datamodule=RandomPairsDataModule())
    assert len(snapshots) == 5
    for (teacher, _), (next_teacher, next_student) in itertools.pairwise(snapshots):
        for key in teacher:
            expected = 0.9 * teacher[key] + 0.1 * next_student[key]
            torch.testing.assert_close(next_teacher[key], expected)
    assert not any(p.requires_grad for p in task.model.parameters())


def test_the_teacher_moves_once_an_optimiser_step(tmp_path: Path) -> None:
    task = small_task(momentum=(0.5, 0.5))
    momenta: list[Tensor] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            encoder: Any = task.model.encoders['s1']
            momenta.append(encoder.patch_embed.proj.weight.clone())

    trainer = small_trainer(
        tmp_path, max_epochs=2, accumulate_grad_batches=2, callbacks=[Watch()], limit_val_batches=0
    )
    trainer.fit(task, datamodule=RandomPairsDataModule())
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(momenta)]
    # The first step has a learning rate of zero; each other one follows two batches.
    assert moved == [False, False, True, False, True, False, True]


def test_last_layers_stay_as_they_are_in_the_first_epoch(tmp_path: Path) -> None:
    task = small_task(freeze_last_layer_epochs=1, warmup_epochs=0)
    before = task.student['dino_head'].last_layer.weight_v.clone()  # type: ignore[union-attr, operator]
    after_epoch: list[bool] = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            weight = task.student['dino_head'].last_layer.weight_v  # type: ignore[union-attr]
            after_epoch.append(torch.equal(weight, before))  # type: ignore[arg-type]

    trainer = small_trainer(tmp_path, max_epochs=2, callbacks=[Watch()], limit_val_batches=0)
    trainer.fit(task, datamodule=RandomPairsDataModule())
    assert after_epoch == [True, False]


def test_gradients_are_clipped_in_each_sub_network(tmp_path: Path) -> None:
    task = small_task(clip_grad=1e-3)
    norms: list[float] = []

    class Watch(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            for module in task.student.values():
                gradients = [p.grad for p in module.parameters() if p.grad is not None]
                if gradients:
                    norms.append(torch.nn.utils.get_total_norm(gradients).item())

    trainer = small_trainer(tmp_path, max_epochs=1, callbacks=[Watch()], limit_val_batches=0)
    trainer.fit(task, datamodule=RandomPairsDataModule())
    assert len(norms) >= 2
    assert max(norms) == pytest.approx(1e-3, rel=1e-2)


def test_resumed_run_equals_an_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    seed_everything(0)
    whole = Record()
    task = small_task()
    small_trainer(tmp_path / 'a', max_epochs=4, callbacks=[whole], limit_val_batches=0).fit(
        task, datamodule=RandomPairsDataModule()
    )

    seed_everything(0)
    interrupted = Record()

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    trainer = small_trainer(
        tmp_path / 'b', max_epochs=4, callbacks=[interrupted, Stop()], limit_val_batches=0
    )
    trainer.fit(small_task(), datamodule=RandomPairsDataModule())
    checkpoint = tmp_path / 'b' / 'half.ckpt'
    trainer.save_checkpoint(checkpoint)

    # Whatever happened in between, the resumed run draws what the unbroken one drew.
    seed_everything(7)
    resumed = Record()
    task_again = small_task()
    small_trainer(tmp_path / 'c', max_epochs=4, callbacks=[resumed], limit_val_batches=0).fit(
        task_again, datamodule=RandomPairsDataModule(), ckpt_path=checkpoint, weights_only=True
    )
    assert interrupted.steps + resumed.steps == whole.steps == list(range(1, 17))
    assert interrupted.schedules + resumed.schedules == whole.schedules
    assert interrupted.losses + resumed.losses == whole.losses


def test_checkpoint_holds_the_teacher_where_torchgeo_looks_for_it(tmp_path: Path) -> None:
    task = small_task()
    trainer = small_trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    trainer.fit(task, datamodule=RandomPairsDataModule())
    checkpoint = tmp_path / 'last.ckpt'
    trainer.save_checkpoint(checkpoint)

    name, weights = extract_backbone(str(checkpoint))
    assert name == SMALL['model']
    # Beside the weights, what the model is: a model built by its name is rebuilt from it.
    assert set(weights) == {*task.model.state_dict(), 'architecture'}
    for key, value in task.model.state_dict().items():
        assert torch.equal(weights[key], value), key
    backbone = load_backbone(checkpoint)
    assert not backbone.training
    assert all(
        torch.equal(a, b)
        for a, b in zip(backbone.parameters(), task.model.parameters(), strict=True)
    )
    continued = small_task(weights=str(checkpoint))
    assert torch.equal(continued.model.mask_token, task.model.mask_token)
    assert 'weights' not in continued.hparams


def test_losses_of_a_step_are_those_of_the_parts() -> None:
    """Compare a step with a reference that loops over crops and heads."""
    task = small_task(drop_path_rate=0.0, centering='sinkhorn_knopp').train()
    torch.manual_seed(3)
    losses, _ = task.losses(batch(), temperature=0.05)
    torch.manual_seed(3)
    crops = task.multi_crop(batch())
    images, registers = 4, 5

    backbone: Any = task.student['backbone']
    dates = batch()['dates']
    views = [*crops.globals.split(images), *crops.locals.split(images)]
    masks = list(crops.masks.split(images))
    student_cls, student_patches = [], []
    for i, view in enumerate(views):
        tokens = backbone.forward_features(view, dates, masks[i] if i < 2 else None)
        student_cls.append(tokens[:, 0])
        if i < 2:
            student_patches.append(tokens[:, registers:][masks[i]])
    teacher = [task.model.forward_features(view, dates) for view in views[:2]]

    head: Any = task.student['dino_head']
    teacher_head: Any = task.teacher_heads['dino_head']
    targets = task.dino_center(teacher_head(torch.cat([t[:, 0] for t in teacher])), 0.05).split(
        images
    )
    terms = [
        -(targets[t] * (head(cls) / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()
        for t in range(2)
        for v, cls in enumerate(student_cls)
        if t != v
    ]
    assert len(terms) == 2 * 3
    torch.testing.assert_close(losses['dino'], torch.stack(terms).mean())

    koleo = sum(task.koleo_loss(cls) for cls in student_cls[:2])
    torch.testing.assert_close(losses['koleo'], koleo)

    hidden = torch.cat([t[:, registers:][m] for t, m in zip(teacher, masks, strict=True)])
    patch_targets = task.ibot_center(teacher_head(hidden), 0.05)
    entropies = -(patch_targets * (head(torch.cat(student_patches)) / 0.1).log_softmax(-1)).sum(-1)
    of_image = torch.arange(8).repeat_interleave(crops.masks.sum(dim=1))
    per_image = [entropies[of_image == i].mean() for i in range(8) if (of_image == i).any()]
    torch.testing.assert_close(losses['ibot'], torch.stack(per_image).sum() / 8)


def test_predict_embeds_with_the_teacher(tmp_path: Path) -> None:
    task = small_task()
    (first, *_) = small_trainer(tmp_path).predict(task, datamodule=RandomPairsDataModule()) or []
    images = torch.stack([RandomPairs(8)[i]['image'] for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(first, task.model(images, batch()['dates']))


def test_not_a_geofm_model() -> None:
    with pytest.raises(TypeError):
        DINOv2(model='resnet18')


def test_several_dates_of_an_image() -> None:
    """Each view has its own date; k equal dates give the result of one."""
    task = small_task(drop_path_rate=0.0).train()
    dated = {key: torch.stack([value] * 2, dim=1) for key, value in batch().items()}
    crops = task.multi_crop(dated)
    assert crops.global_dates.shape == (8, 2)
    assert crops.local_dates.shape == (8, 2)
    losses, _ = task.losses(dated, temperature=0.05)
    assert all(torch.isfinite(loss) for loss in losses.values())

    dated['dates'][:, 1] += 180
    crops = task.multi_crop(dated)
    cls = task.teacher_forward(crops).features
    views = crops.globals.split(4)
    for date in range(2):
        expected = task.model.forward_features(views[date], dated['dates'][:, date])[:, 0]
        torch.testing.assert_close(cls[4 * date : 4 * date + 4], expected)
