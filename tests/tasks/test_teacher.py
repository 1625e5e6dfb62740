"""The teacher is in evaluation mode, has no gradients, and is an average of the student."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from tests.pairs import RandomPairsDataModule
from tests.tasks.test_dinov2 import batch, small_task, small_trainer

DROPOUT: dict[str, Any] = {
    'model': 'geofm_vit_tiny_patch16_xattn',
    'drop_path_rate': 0.0,
    'gram_weight': 1.0,
}


def with_dropout() -> Any:
    model_args = {**small_task().hparams['model_args'], 'dropout': 0.5}
    return small_task(**DROPOUT, model_args=model_args)


class Modes(Callback):
    """Callback that records two computations of targets, and the modes of all networks."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, i: int) -> None:
        teachers = (pl_module.model, pl_module.teacher_heads, pl_module.gram_backbone)
        assert not any(module.training for network in teachers for module in network.modules())
        assert all(module.training for module in pl_module.student.modules())
        with torch.no_grad():
            crops = pl_module.multi_crop(batch)
            first, second = (pl_module.teacher_forward(crops) for _ in range(2))
            anchors = [pl_module.gram_forward(crops) for _ in range(2)]
        assert torch.equal(first.cls, second.cls)
        assert torch.equal(first.patches, second.patches)
        assert torch.equal(*anchors)
        assert not torch.equal(*(pl_module.student_forward(crops).cls for _ in range(2)))
        self.steps += 1


def test_the_same_crops_have_the_same_targets_under_a_trainer(tmp_path: Path) -> None:
    """Targets with dropout in the fusion, before and after validation."""
    modes = Modes()
    trainer = small_trainer(tmp_path, max_epochs=2, callbacks=[modes])
    trainer.fit(with_dropout(), datamodule=RandomPairsDataModule())
    assert modes.steps == 8


def test_a_teacher_that_was_put_into_training_mode_is_put_right(tmp_path: Path) -> None:
    task, modes = with_dropout(), Modes()
    task.model.train().requires_grad_(True)
    trainer = small_trainer(tmp_path, max_epochs=1, callbacks=[modes], limit_val_batches=0)
    trainer.fit(task, datamodule=RandomPairsDataModule())
    assert modes.steps == 4
    assert not any(parameter.requires_grad for parameter in task.model.parameters())


def test_a_student_that_the_teacher_cannot_follow_is_refused(tmp_path: Path) -> None:
    task = small_task()
    backbone: Any = task.student['backbone']
    backbone.fusion.mlp[0] = nn.Sequential(backbone.fusion.mlp[0])
    with pytest.raises(ValueError, match=r'different parameters, e\.g\. backbone\.fusion\.mlp\.0'):
        small_trainer(tmp_path, max_epochs=1).fit(task, datamodule=RandomPairsDataModule())


@pytest.mark.parametrize('precision', ['bf16-true', '16-true'])
def test_weights_in_half_precision_are_refused(tmp_path: Path, precision: Any) -> None:
    """An EMA of bfloat16 weights with a momentum of 0.9995 never moves."""
    weight = torch.ones(1, dtype=torch.bfloat16)
    assert torch.lerp(weight, 1.5 * weight, 1 - 0.9995) == weight
    trainer = small_trainer(tmp_path, max_epochs=1, precision=precision)
    with pytest.raises(ValueError, match=r'is in .*float16.*precision=bf16-mixed'):
        trainer.fit(small_task(), datamodule=RandomPairsDataModule())
    # To embed images, which averages nothing, is fine.
    small_trainer(tmp_path, precision=precision).predict(
        small_task(), datamodule=RandomPairsDataModule()
    )


@pytest.mark.parametrize(
    'case',
    [
        {},
        {'centering': 'sinkhorn_knopp', 'separate_ibot_head': True, 'sensor_dropout': 0.5},
        {'model': 'geofm_vit_tiny_patch16_xattn', 'gram_weight': 1.0, 'gram_size': 48},
    ],
)
def test_double_precision(tmp_path: Path, case: dict[str, Any]) -> None:
    """Double precision gives the results of single precision up to rounding."""
    losses = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        task = small_task(**case).to(dtype)
        images = batch()
        images['image'] = images['image'].to(dtype)
        torch.manual_seed(1)
        values, _ = task.losses(images, 0.05, update_centers=True)
        assert all(value.dtype == dtype for value in values.values())
        losses.append(torch.stack(list(values.values())).detach().double())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    trainer = small_trainer(tmp_path, max_epochs=2, precision='64-true')
    trainer.fit(small_task(**case), datamodule=RandomPairsDataModule(batch_size=1, length=2))
    assert torch.isfinite(trainer.callback_metrics['val_loss'])
