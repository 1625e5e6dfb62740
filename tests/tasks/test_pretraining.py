"""Two example methods as subclasses of PretrainingTask, and what works with every subclass."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, seed_everything
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchgeo.tasks.utils import extract_backbone

from geofm.callbacks import CollapseWatch, OnlineKNN
from geofm.cli import main
from geofm.models import MultiSensorViT, load_backbone
from geofm.tasks import PretrainingTask, StudentTeacher
from geofm.tasks.nonfinite import DumpError, replay
from tests.pairs import RandomPairs, RandomPairsDataModule
from tests.tasks.test_dinov2 import SMALL, Record, batch, small_trainer

ARGS = {k: v for k, v in SMALL.items() if not k.startswith(('proto', 'head', 'warmup_teacher'))}


class Agree(PretrainingTask):
    """Method without a teacher: projections of an image's crops agree and are spread."""

    def __init__(self, width: int = 8, spread_weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def build_heads(self) -> dict[str, nn.Module]:
        return {'projection': nn.Linear(self.model.embed_dim, self.hparams['width'])}

    def configure_losses(self) -> None:
        self.loss_weights = {'agree': 1.0, 'spread': self.hparams['spread_weight']}

    def compute_losses(
        self, batch: Any, values: Mapping[str, float] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        crops = self.multi_crop(batch)
        tokens = self.model.forward_views(self.views(crops))
        views = self.heads['projection'](torch.cat([view.cls for view in tokens]))
        views = views.unflatten(0, (-1, len(batch['image'])))
        losses = {
            'agree': (views - views.mean(dim=0)).square().mean(),
            'spread': (1 - views.std(dim=1)).relu().mean(),
        }
        return losses, {'features': tokens[0].cls.detach()}


class Follow(StudentTeacher):
    """Method with an EMA teacher: the student predicts its features, without a temperature."""

    def build_heads(self) -> dict[str, nn.Module]:
        return {'head': nn.Linear(self.model.embed_dim, 8)}

    def configure_losses(self) -> None:
        self.loss_weights = {'cls': 1.0, 'patch': 1.0}

    def apply_heads(
        self, heads: nn.ModuleDict, cls: Tensor, patches: Tensor
    ) -> tuple[Tensor, Tensor]:
        return heads['head'](cls), heads['head'](patches)

    def compute_losses(
        self, batch: Any, values: Mapping[str, float] | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        crops = self.multi_crop(batch)
        with torch.no_grad():
            teacher = self.teacher_forward(crops)
        student = self.student_forward(crops)
        losses = {
            'cls': mse_loss(student.cls[: len(teacher.cls)], teacher.cls),
            'patch': mse_loss(student.patches, teacher.patches),
        }
        return losses, {'features': teacher.features}


@pytest.mark.parametrize('method', [Agree, Follow])
def test_a_run_its_callbacks_and_its_checkpoint(tmp_path: Path, method: Any) -> None:
    seed_everything(0)
    record, task = Record(), method(**ARGS, sensor_dropout=0.3)
    watch = [CollapseWatch(), OnlineKNN(RandomPairsDataModule(), k=[1])]
    trainer = small_trainer(tmp_path, max_epochs=2, callbacks=[record, *watch])
    trainer.fit(task, datamodule=RandomPairsDataModule())
    logged = {k: v for k, v in trainer.callback_metrics.items() if not k.startswith('train')}
    assert {'val_loss', 'collapse/feature_std', 'collapse/effective_rank'} <= set(logged)
    assert {'knn/top1_k1', 'schedule/lr', 'schedule/weight_decay'} <= set(logged)
    assert ('schedule/momentum' in logged) is (method is Follow)
    assert 'schedule/teacher_temperature' not in logged
    assert torch.isfinite(torch.tensor(record.losses)).all()

    path = tmp_path / 'last.ckpt'
    trainer.save_checkpoint(path)
    name, weights = extract_backbone(str(path))
    assert (name, set(weights)) == (ARGS['model'], {*task.model.state_dict(), 'architecture'})
    backbone = load_backbone(path)
    for key, value in task.model.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value), key
    (features, *_) = trainer.predict(task, datamodule=RandomPairsDataModule()) or []
    images = torch.stack([RandomPairs(8)[i]['image'] for i in range(4)])
    torch.testing.assert_close(features, backbone(images, batch()['dates']))
    # A second phase has the same weights, heads included.
    again = method(**ARGS, continue_from=str(path))
    for key, value in task.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


@pytest.mark.parametrize('method', [Agree, Follow])
def test_a_resumed_run_equals_an_unbroken_one(tmp_path: Path, method: Any) -> None:
    class Save(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / f'{trainer.current_epoch}.ckpt')

    whole, rest = Record(), Record()
    for record, path in ((whole, None), (rest, tmp_path / '0.ckpt')):
        seed_everything(0)
        trainer = small_trainer(
            tmp_path, max_epochs=2, callbacks=[record, Save()], limit_val_batches=0
        )
        data = RandomPairsDataModule()
        trainer.fit(method(**ARGS), datamodule=data, ckpt_path=path, weights_only=True)
    assert rest.losses == whole.losses[4:]
    assert rest.schedules == whole.schedules[4:]


def test_every_network_of_a_method_without_a_teacher_learns(tmp_path: Path) -> None:
    task = Agree(**ARGS)
    before = {k: v.clone() for k, v in task.state_dict().items()}
    trainer = small_trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    trainer.fit(task, datamodule=RandomPairsDataModule())
    still = {k for k, v in task.named_parameters() if torch.equal(v, before[k])}
    # Stand-ins of absent sensors are not used here, and nothing weighs patches.
    assert not {k for k in still if 'stand_in' not in k}
    assert isinstance(task.model, MultiSensorViT)


def test_a_step_is_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: dict[str, float] = {}

    class Explode(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 2:
                found = trainer.callback_metrics
                losses.update({k: found[f'train_{k}'].item() for k in ('agree', 'spread')})
                pl_module.heads['projection'].weight.grad[0] = torch.inf

    trainer = small_trainer(tmp_path, max_epochs=1, callbacks=[Explode()], limit_val_batches=0)
    with pytest.raises(FloatingPointError, match='gradient is not finite at step 2'):
        trainer.fit(Agree(**ARGS), datamodule=RandomPairsDataModule())
    dump = tmp_path / 'nonfinite-step2-rank0.pt'
    values = replay(dump)
    assert {name: values[name] for name in losses} == losses
    assert values['gradient of projection'] > 0

    # A dump names a class; it never has one imported.
    content = torch.load(dump, weights_only=True)
    torch.save({**content, 'task': 'os.system'}, dump)
    with pytest.raises(DumpError, match=r'its task os\.system is not imported'):
        replay(dump)


def test_the_command_line_knows_the_arguments_of_the_base(tmp_path: Path) -> None:
    """Arguments that a method passes on are checked and stored as its hyperparameters."""
    config = {
        'trainer': {
            'max_steps': 1,
            'accelerator': 'cpu',
            'logger': False,
            'enable_progress_bar': False,
            'default_root_dir': str(tmp_path),
            'limit_val_batches': 0,
        },
        'model': {'class_path': f'{__name__}.Agree', 'init_args': {**ARGS, 'width': 4}},
        'data': {'class_path': 'tests.pairs.RandomPairsDataModule'},
    }
    path = tmp_path / 'run.yaml'
    path.write_text(yaml.safe_dump(config))
    main(['fit', '--config', str(path)])
    (checkpoint,) = tmp_path.rglob('*.ckpt')
    kept = torch.load(checkpoint, weights_only=True)['hyper_parameters']
    assert (kept['width'], kept['n_local'], kept['spread_weight']) == (4, 2, 1.0)
    assert 'weights' not in kept


def test_a_head_that_torchgeo_would_take_for_the_backbone_is_refused() -> None:
    class Leaky(Agree):
        def build_heads(self) -> dict[str, nn.Module]:
            return {'head': nn.ModuleDict({'model': nn.Linear(2, 2)})}

    with pytest.raises(ValueError, match=r'heads\.head\.model\.weight: TorchGeo takes any key'):
        Leaky(**ARGS)
