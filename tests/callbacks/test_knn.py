from pathlib import Path

import pytest

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
