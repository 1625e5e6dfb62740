from pathlib import Path

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torchgeo.tasks import SimCLR

from geofm.callbacks import OnlineKNN
from tests.pairs import RandomPairsDataModule
from tests.tasks.test_dinov2 import small_task, small_trainer


def test_knn_while_pretraining_tells_the_classes_apart(tmp_path: Path) -> None:
    knn = OnlineKNN(RandomPairsDataModule(length=32), every_n_epochs=2, k=(1, 5))
    trainer = small_trainer(tmp_path, max_epochs=1, callbacks=[knn], limit_val_batches=0)
    trainer.fit(small_task(), datamodule=RandomPairsDataModule())
    # Classes of opposite sign in every band: even random features keep them apart.
    assert trainer.callback_metrics['knn/top1_k1'] == pytest.approx(1.0)
    assert trainer.callback_metrics['knn/top1_k5'] == pytest.approx(1.0)


def test_it_measures_only_when_it_is_time(tmp_path: Path) -> None:
    measured: list[int] = []

    class Counting(OnlineKNN):
        def _measure(self, pl_module) -> None:  # type: ignore[no-untyped-def]
            measured.append(pl_module.trainer.current_epoch)

    knn = Counting(RandomPairsDataModule(), every_n_epochs=2)
    trainer = small_trainer(tmp_path, max_epochs=5, callbacks=[knn], limit_val_batches=0)
    trainer.fit(small_task(), datamodule=RandomPairsDataModule())
    assert measured == [1, 3, 4]


def test_a_task_without_a_backbone_is_refused_before_it_trains(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, max_epochs=1, callbacks=[OnlineKNN(RandomPairsDataModule())])
    with pytest.raises(TypeError, match='BoringModel has no backbone'):
        trainer.fit(BoringModel())


def test_modes_are_as_they_were_after_a_measurement(tmp_path: Path) -> None:
    """Batch norm of a ResNet must not learn from the bank, nor stay in evaluation mode."""
    task = SimCLR('resnet10t', in_channels=15, version=1, layers=2, memory_bank_size=0, size=32)
    backbone = task.backbone
    after: list[bool] = []

    class Watched(OnlineKNN):
        def _measure(self, pl_module) -> None:  # type: ignore[no-untyped-def]
            before = {k: v.clone() for k, v in backbone.state_dict().items()}
            super()._measure(pl_module)
            after.extend(module.training for module in backbone.modules())
            assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())

    knn = Watched(RandomPairsDataModule(), k=(1,))
    trainer = small_trainer(tmp_path, max_epochs=1, callbacks=[knn], limit_val_batches=0)
    trainer.fit(task, datamodule=RandomPairsDataModule())
    assert after
    assert all(after)
    assert 'knn/top1_k1' in trainer.callback_metrics
    assert 'knn_mean_of_patches/top1_k1' not in trainer.callback_metrics
