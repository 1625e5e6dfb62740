"""Random pairs of images for tests of training."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchgeo.datamodules import BaseDataModule

from geofm.datasets import SEN12MSCRTS
from geofm.sensors import BANDS


class RandomPairs(Dataset[dict[str, Tensor]]):
    """Normalised noise with a blob whose position depends on the label."""

    def __init__(self, length: int = 16, size: int = 32, channels: int = len(BANDS)) -> None:
        generator = torch.Generator().manual_seed(length)
        self.labels = torch.arange(length) % 2
        self.images = torch.randn(length, channels, size, size, generator=generator)
        self.images += 2 * self.labels[:, None, None, None] - 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images[index]
        return {
            'image': image,
            'valid': torch.ones(image.shape[1:], dtype=torch.bool),
            'dates': torch.tensor([17_600, 17_603]),
            'label': self.labels[index],
        }


class RandomPairsDataModule(BaseDataModule):
    """Random pairs, with a few batches per epoch."""

    mean = torch.zeros(len(BANDS))
    std = torch.ones(len(BANDS))

    def __init__(self, batch_size: int = 4, length: int = 16, size: int = 32) -> None:
        super().__init__(SEN12MSCRTS, batch_size)
        self.length, self.size = length, size
        self.aug = lambda batch: batch
        self.collate_fn: Any = torch.utils.data.default_collate

    def setup(self, stage: str) -> None:
        self.train_dataset = RandomPairs(self.length, self.size)
        self.val_dataset = self.test_dataset = RandomPairs(self.length // 2, self.size)
        self.predict_dataset = self.val_dataset

    def _loader(self, dataset: Any) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(dataset, batch_size=self.batch_size)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader(self.train_dataset)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader(self.val_dataset)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader(self.test_dataset)

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader(self.predict_dataset)
