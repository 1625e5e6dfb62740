from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import Dataset
from torchgeo.tasks import Classification

from geofm.datamodules import NamedBandsDataModule
from geofm.datamodules.hooks import check_targets


class Images(Dataset[dict[str, Tensor]]):
    """Noise with given labels."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {'image': 3000 * torch.rand(3, 32, 32), 'label': self.labels[index]}


def fit(folder: Path, labels: Tensor, **kwargs: Any) -> None:
    images = Images(labels)
    data = NamedBandsDataModule(['B04', 'B03', 'B02'], None, images, images, batch_size=len(labels))
    task = Classification('resnet10t', in_channels=3, **{'num_classes': 3, **kwargs})
    trainer = Trainer(
        accelerator='cpu',
        fast_dev_run=True,
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=data)


def test_labels_that_are_not_a_class_of_the_task_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'labels contain \[3, 5\].*set num_classes to 6 or more'):
        fit(tmp_path, torch.tensor([0, 3, 5, 2]))
    with pytest.raises(ValueError, match=r'labels contain \[-1\].*number classes from 0'):
        fit(tmp_path, torch.tensor([0, -1, 1, 2]))
    with pytest.raises(ValueError, match=r"task='multilabel' and num_labels=2"):
        fit(tmp_path, torch.tensor([[0, 1], [1, 1]]))
    with pytest.raises(ValueError, match='num_labels=3'):
        fit(
            tmp_path,
            torch.tensor([[0, 1], [1, 1]]),
            task='multilabel',
            num_classes=None,
            num_labels=3,
        )


def test_labels_with_an_axis_of_length_one_are_accepted(tmp_path: Path) -> None:
    fit(tmp_path, torch.tensor([[0], [1], [2], [2]]))


def test_masks_may_contain_classes_and_the_ignored_value() -> None:
    mask = torch.tensor([[[0, 1], [2, 255]]])
    task = {'num_classes': 3, 'num_labels': None, 'ignore_index': 255}
    assert check_targets({'mask': mask}, task)['mask'] is mask
    with pytest.raises(ValueError, match=r'masks contain \[255\].*num_classes=3.*or ignore_index'):
        check_targets({'mask': mask}, {**task, 'ignore_index': None})
    with pytest.raises(ValueError, match=r'masks contain \[2\].*ignore_index=255'):
        check_targets({'mask': mask}, {**task, 'num_classes': 2})


def test_targets_that_are_not_classes_are_not_checked() -> None:
    height = torch.full((1, 2, 2), 1234.5)
    assert check_targets({'mask': height}, {'num_classes': 3})['mask'] is height
    labels = torch.tensor([7, -1])
    assert check_targets({'label': labels}, {})['label'] is labels
