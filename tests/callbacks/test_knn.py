from pathlib import Path

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torchgeo.tasks import SimCLR

from geofm.callbacks import OnlineKNN
from geofm.datamodules import NamedBandsDataModule
from geofm.sensors import BANDS
from tests.pairs import RandomPairs, RandomPairsDataModule
from tests.tasks.test_dinov2 import SMALL, small_task, small_trainer


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
    """Batch norm of a ResNet must neither change with the bank nor stay in evaluation mode."""
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


class Several(RandomPairsDataModule):
    """Random pairs with several labels per image."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for dataset in (self.train_dataset, self.val_dataset):
            assert isinstance(dataset, RandomPairs)
            one = dataset.labels
            dataset.labels = torch.stack([one, 1 - one, one * 0 + 1], dim=1)


def test_images_with_several_labels_have_a_precision_and_no_accuracy(tmp_path: Path) -> None:
    knn = OnlineKNN(Several(length=32), k=(1, 5))
    trainer = small_trainer(tmp_path, max_epochs=1, callbacks=[knn], limit_val_batches=0)
    trainer.fit(small_task(), datamodule=RandomPairsDataModule())
    assert trainer.callback_metrics['knn/map_k5'] == pytest.approx(1.0)
    assert not any('top1' in name for name in trainer.callback_metrics)


class Folder(RandomPairsDataModule):
    """Data with given labels or number of channels."""

    def __init__(self, labels: torch.Tensor | None = None, channels: int = 15) -> None:
        super().__init__(length=8)
        self.labels, self.channels = labels, channels

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for dataset in (self.train_dataset, self.val_dataset):
            assert isinstance(dataset, RandomPairs)
            dataset.images = dataset.images[:, : self.channels]
            if self.labels is not None:
                dataset.labels = self.labels


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (Folder(channels=13), 'has 13 channels, but 15 bands are expected'),
        (Folder(torch.tensor([0, -1] * 4)), 'label -1 is not a class'),
        (Folder(torch.rand(8)), 'labels of shape'),
    ],
)
def test_data_that_do_not_fit_are_refused_before_a_step(
    data: Folder, message: str, tmp_path: Path
) -> None:
    task = small_task()
    trainer = small_trainer(tmp_path, max_epochs=1, callbacks=[OnlineKNN(data)])
    with pytest.raises(ValueError, match=message):
        trainer.fit(task, datamodule=RandomPairsDataModule())
    assert trainer.global_step == 0


def test_labelled_data_get_the_bands_of_the_backbone_by_name(tmp_path: Path) -> None:
    images = RandomPairs(8, channels=15)
    source = tuple(reversed(BANDS))
    data = NamedBandsDataModule(list(source), train_dataset=images, val_dataset=images)
    knn = OnlineKNN(data, k=(1,))
    bands = BANDS[2:]
    model = {**SMALL, 'model': 'geofm_vit_tiny_patch16_s2'}
    task = small_task(**model, in_channels=13, bands=bands)
    knn.setup(small_trainer(tmp_path, max_epochs=1), task, 'fit')
    assert data.bands == bands
    sample = data.train_dataset[3]  # type: ignore[index]
    expected = images[3]['image'][[source.index(band) for band in bands]]
    assert torch.equal(sample['image'], expected)
