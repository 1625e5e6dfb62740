"""Generated labelled data for the tests of the benchmark."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from geofm.evaluation.data import LabelledData, Task
from geofm.sensors import BANDS, band_statistics

#: A ViT with a forward pass of about a millisecond.
TINY: dict[str, Any] = {'embed_dim': 32, 'depth': 2, 'num_heads': 2, 'init_values': 1.0}


class Noise(Dataset[dict[str, Tensor]]):
    """Noise about the mean of each band in dB and DN, brighter the higher the class."""

    def __init__(self, length: int, bands: tuple[str, ...], size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        mean, std = (s.view(-1, 1, 1) for s in band_statistics(BANDS))
        self.labels = torch.randint(0, 3, (length,), generator=generator)
        noise = torch.randn(length, len(BANDS), size, size, generator=generator)
        images = mean + std * (0.5 * noise + 0.5 * (self.labels - 1)[:, None, None, None])
        # The noise of a band does not depend on the other bands and their order.
        self.images = images[:, [BANDS.index(band) for band in bands]]
        self.bands = bands

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self.images[index]
        label = self.labels[index]
        several = torch.tensor([label > 0, label > 1, label == 1]).long()
        height = 100 + 10 * label + torch.zeros(image.shape[-2:])
        return {
            'image': image,
            'valid': torch.ones(image.shape[-2:], dtype=torch.bool),
            'dates': torch.tensor([17_600, 17_603]),
            'label': label,
            'several': several,
            'classes': label.expand(image.shape[-2:]).clone(),
            'height': height,
        }


class Renamed(Dataset[dict[str, Tensor]]):
    """Noise with the target of a task under the name that TorchGeo gives it."""

    def __init__(self, noise: Noise, task: Task) -> None:
        self.noise, self.task, self.bands = noise, task, noise.bands

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.noise[index]
        targets = {
            'classification': ('label', sample['label']),
            'multilabel': ('label', sample['several']),
            'segmentation': ('mask', sample['classes']),
            'regression': ('mask', sample['height']),
        }
        kept = {key: sample[key] for key in ('image', 'valid', 'dates')}
        return {**kept, **dict([targets[self.task]])}


def noise_data(
    task: Task = 'classification',
    bands: tuple[str, ...] = BANDS,
    length: int = 24,
    size: int = 32,
) -> LabelledData:
    sets = [Renamed(Noise(length, bands, size, seed), task) for seed in (1, 2, 3)]
    train, val, test = sets
    return LabelledData(
        'Noise', task, bands, {'train': train, 'val': val, 'test': test}, batch_size=8
    )
